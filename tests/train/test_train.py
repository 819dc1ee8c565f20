import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference import relative_error
from rich.console import Console
from safetensors.torch import load_file
from tiny import image_folder, recipe_file
from torch import nn
from torch.nn import functional as F

import care_compress
from care_compress.data.loader import Batch
from care_compress.errors import CareError, TrainingError
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import AugmentSection, DistillSection, TrainSection
from care_compress.run.processes import World
from care_compress.tasks.classification import (
    BothHeads,
    Classification,
    follow_teacher,
    mix,
    neighbours,
    soft_targets,
)
from care_compress.tasks.task import Outcome
from care_compress.train.display import Silent
from care_compress.train.loop import (
    GUARD_STEPS,
    Course,
    _check_loss,
    averaged,
    learning_rate,
    set_up,
    train_step,
)
from care_compress.train.state import Progress

# Everything a training can hold, so that resuming is tested on all of it.
RICH_PLAN: dict[str, object] = {
    "drop_path": 0.2,
    "clip_grad_norm": 1.0,
    "augment": {"scale": [0.3, 1.0], "jitter": 0.3, "erase": 0.3, "mixup": 0.2, "cutmix": 1.0},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


def train(recipe: Path, runs: Path, name: str = "run", *overrides: str) -> dict[str, torch.Tensor]:
    """Train in this process; the resulting weights."""
    run_recipe(load_recipe(str(recipe), overrides), runs, name, Console(quiet=True))
    return load_file(runs / name / "float" / "model.safetensors")


def command(recipe: Path, runs: Path, name: str, *launcher: str) -> list[str]:
    start = list(launcher) or [sys.executable]
    return [
        *start,
        "-m",
        "care_compress",
        "quantize",
        str(recipe),
        "--runs",
        str(runs),
        "--name",
        name,
    ]


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} tensors differ, first {different[0]}"


def test_training_learns_and_is_reproducible(images: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, images, epochs=6)
    first = train(recipe, tmp_path, "first")
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert results["accuracy"]["top1"] > 60, "four colours are easy"
    assert_same_bits(train(recipe, tmp_path, "second"), first)
    other = train(recipe, tmp_path, "other", "seed=1")
    assert any(not torch.equal(other[name], first[name]) for name in first)
    assert list((tmp_path / "first" / "float" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_sigkill_anywhere_then_the_same_command_ends_with_the_same_bits(
    images: Path, tmp_path: Path
) -> None:
    # With a decoding worker, which outlives its killed parent for some seconds.
    recipe = recipe_file(tmp_path, images, workers=1, **RICH_PLAN)
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    calm = command(recipe, tmp_path, "undisturbed")
    subprocess.run(calm, env=threads, check=True, stdout=subprocess.DEVNULL)
    undisturbed = load_file(tmp_path / "undisturbed" / "float" / "model.safetensors")
    start = command(recipe, tmp_path, "killed")
    state = tmp_path / "killed" / "float" / "train_state.pt"
    rng = random.Random(0)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(start, env=threads, stdout=subprocess.DEVNULL)
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != before:
                time.sleep(rng.random() * 0.3)  # somewhere in the steps after a checkpoint
                process.kill()
                break
            time.sleep(0.005)
        kills += process.wait() == -9
    assert kills, "the training was never interrupted, so the test proves nothing"
    subprocess.run(start, env=threads, check=True, stdout=subprocess.DEVNULL)
    assert_same_bits(load_file(tmp_path / "killed" / "float" / "model.safetensors"), undisturbed)


def test_a_changed_recipe_trains_anew(images: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, images)
    train(recipe, tmp_path, "run", "train.epochs=2", "train.warmup_epochs=0.1")
    changed = train(recipe, tmp_path, "run", "train.learning_rate=1e-3")
    assert_same_bits(changed, train(recipe, tmp_path, "fresh", "train.learning_rate=1e-3"))


def test_a_finished_training_is_not_repeated(images: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, images)
    train(recipe, tmp_path)
    state = tmp_path / "run" / "float" / "train_state.pt"
    written = state.stat().st_mtime_ns
    train(recipe, tmp_path, "run", "train.checkpoint_steps=1")
    assert state.stat().st_mtime_ns == written


def test_two_processes_follow_one(images: Path, tmp_path: Path) -> None:
    """Same global batches, gradients and BatchNorm statistics, so the same network but rounding.

    Stated tolerance after 24 steps: losses 1e-4, weights 1e-3, logits 1e-2, all relative. Biases in
    front of a BatchNorm are left out: their true gradient is zero and Adam turns its rounding
    noise into full steps.
    """
    recipe = recipe_file(
        tmp_path, images, epochs=4, warmup_epochs=0, learning_rate=1e-4, clip_grad_norm=1.0,
        ema_decay=None, augment={"mixup": 0.3, "cutmix": 1.0},
    )  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--standalone"]
    train(recipe, tmp_path, "one")
    subprocess.run(
        command(recipe, tmp_path, "two", *launcher), check=True, capture_output=True, timeout=300
    )
    one, two = (
        care_compress.load_checkpoint(tmp_path / name / "float" / "model.safetensors")
        for name in ("one", "two")
    )
    weights = {name: tensor for name, tensor in two.named_parameters() if tensor.dim() > 1}
    for name, tensor in one.named_parameters():
        if name in weights:
            assert relative_error(weights[name].detach(), tensor.detach()) < 1e-3, name
    sample = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(two(sample), one(sample)) < 1e-2
    curves = [_curve(tmp_path / name / "float" / "tensorboard") for name in ("one", "two")]
    assert len(curves[0]) == 24 and curves[1] == pytest.approx(curves[0], rel=1e-4)


def _curve(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def test_a_nan_stops_with_the_step_and_keeps_the_last_checkpoint(
    images: Path, tmp_path: Path
) -> None:
    recipe = recipe_file(tmp_path, images, learning_rate=1e30, warmup_epochs=0, clip_grad_norm=None)
    for _ in range(2):  # the same command meets the same end, from the same state
        with pytest.raises(TrainingError, match=r"step \d+.*state after step 0 is kept.*rate"):
            train(recipe, tmp_path, "run", "train.checkpoint_steps=1", "train.ema_decay=null")
        state = torch.load(tmp_path / "run" / "float" / "train_state.pt", weights_only=True)
        assert state["progress"]["step"] == 0
        assert all(t.abs().max() < 10 for t in state["model"].values() if t.is_floating_point())


def course(section: TrainSection, classes: int) -> Course:
    return Course(
        section, Classification(), 10, classes, 0, "", lambda s: (), lambda x: x,
        lambda m: None,
    )  # fmt: skip


def test_divergence_is_told_from_a_fine_tuning_that_starts_low() -> None:
    tuning = Progress(step=GUARD_STEPS, first_loss=0.02, recent_loss=0.15)
    _check_loss(tuning, 0.2, course(plan(), 10))
    diverged = Progress(step=GUARD_STEPS, first_loss=2.3, recent_loss=40.0)
    with pytest.raises(TrainingError, match="diverged at step 51"):
        _check_loss(diverged, 50.0, course(plan(), 10))


def test_an_infinite_gradient_never_reaches_the_weights(images: Path) -> None:
    section = plan(learning_rate=1e-3)
    trainee = set_up(care_compress.build_model("care_nano", 4), section, World())
    before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}

    def exploding(
        model: nn.Module, x: torch.Tensor, targets: torch.Tensor, progress: float
    ) -> Outcome:
        logits, _ = model(x)
        return Outcome((logits * 0).sqrt().sum(), logits.detach())  # finite, its slope is not

    batch = Batch(torch.zeros(4, 3, 32, 32), torch.arange(4), torch.arange(4))
    with pytest.raises(TrainingError, match="gradient is (inf|nan) at step 1"):
        train_step(
            trainee, trainee.model.train(), exploding, batch, course(section, 4), World(), Silent()
        )
    assert all(torch.equal(p, before[name]) for name, p in trainee.model.named_parameters())


def test_fine_tuning_starts_from_the_checkpoint(images: Path, tmp_path: Path) -> None:
    start = care_compress.build_model("care_nano", num_classes=4)
    save_checkpoint(start, tmp_path / "start.safetensors", {})
    recipe = recipe_file(tmp_path, images, learning_rate=1e-12, warmup_epochs=0)
    tuned = train(recipe, tmp_path, "run", f"model.checkpoint={tmp_path / 'start.safetensors'}")
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(tuned[name], parameter.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("form", [".safetensors", ".onnx"])
def test_distillation_from_a_checkpoint_or_an_onnx_file(
    images: Path, tmp_path: Path, form: str, kind: str
) -> None:
    teacher = care_compress.build_model("care_nano", num_classes=4).eval()
    path = tmp_path / f"teacher{form}"
    if form == ".onnx":
        torch.onnx.export(
            teacher, (torch.zeros(16, 3, 32, 32),), str(path), dynamo=True, verbose=False
        )
    else:
        save_checkpoint(teacher, path, {})
    distill = {"teacher": str(path), "kind": kind, "temperature": 2.0}
    recipe = recipe_file(tmp_path, images, epochs=1, warmup_epochs=0, distill=distill)
    assert train(recipe, tmp_path)
    save_checkpoint(
        care_compress.build_model("care_nano", 7), tmp_path / "teacher7.safetensors", {}
    )
    wrong = f"train.distill.teacher={tmp_path / 'teacher7.safetensors'}"
    with pytest.raises(CareError, match="teacher has 7 classes, the data has 4"):
        train(recipe, tmp_path, "wrong", wrong)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(images: Path, tmp_path: Path, precision: str) -> None:
    recipe = recipe_file(tmp_path, images, epochs=1, warmup_epochs=0, precision=precision)
    assert all(
        t.isfinite().all() for t in train(recipe, tmp_path).values() if t.is_floating_point()
    )


def plan(**values: object) -> TrainSection:
    return TrainSection.model_validate(
        {"epochs": 10, "batch_size": 8, "learning_rate": 1.0, **values}
    )


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_schedules_rise_to_the_peak_and_end_at_the_fraction(schedule: str) -> None:
    section = plan(schedule=schedule, warmup_epochs=2, final_lr_fraction=0.01)
    rates = [learning_rate(step, 5, section) for step in range(50)]
    assert max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in {9, 10}
    assert rates[-1] == pytest.approx(0.01)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "augment", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}]
)
@pytest.mark.parametrize("count", [6, 7])
def test_mixing_matches_pixels_and_targets(augment: dict[str, float], count: int) -> None:
    section = AugmentSection(**augment)
    # Image i is a constant i, so a pixel's value tells which share of which image it holds.
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    targets = torch.eye(count)
    for step in range(10):
        mixed, soft = mix(images, targets, section, seed=0, step=step)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(count))
        expected = soft @ torch.arange(count).float()
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), expected)
    assert not torch.equal(mixed, images)


def test_mixing_does_not_depend_on_how_many_processes_share_a_batch() -> None:
    images, targets = torch.rand(8, 3, 8, 8), torch.eye(8)
    section = AugmentSection(mixup=0.4, cutmix=1.0)
    for step in range(6):
        whole, _ = mix(images, targets, section, seed=3, step=step)
        halves = [mix(images[i : i + 4], targets[i : i + 4], section, 3, step)[0] for i in (0, 4)]
        assert torch.equal(torch.cat(halves), whole)
    assert neighbours(3, torch.device("cpu")).tolist() == [1, 0, 2]


def test_the_average_follows_weights_and_statistics_and_forgets_its_start() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = averaged(model, decay=0.999)
    for _ in range(200):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(5)
        average.update_parameters(model)
    for tensor in average.module.state_dict().values():
        assert float(tensor.float().mean()) == pytest.approx(5, rel=0.01)


def test_soft_targets_are_those_of_torchs_label_smoothing() -> None:
    labels, logits = torch.tensor([0, 2]), torch.randn(2, 3)
    ours = F.cross_entropy(logits, soft_targets(labels, 3, 0.1))
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_the_distillation_head_follows_the_teacher_by_its_weight() -> None:
    logits, distilled, taught = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5)
    targets = soft_targets(torch.arange(4), 5, 0.0)

    class Teacher:
        num_classes = 5

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return taught

    hard = DistillSection(teacher="x", kind="hard", weight=0.25)
    student = lambda x: (logits, distilled)  # noqa: E731
    loss = BothHeads(hard, Teacher())(student, torch.zeros(4, 3, 8, 8), targets, 0.0).loss
    expected = 0.75 * F.cross_entropy(logits, torch.arange(4))
    expected = expected + 0.25 * F.cross_entropy(distilled, taught.argmax(dim=1))
    torch.testing.assert_close(loss, expected)
    alone = BothHeads(None, None)(student, torch.zeros(4, 3, 8, 8), targets, 0.0).loss
    both = F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(distilled, torch.arange(4))
    torch.testing.assert_close(alone, both / 2)


def test_soft_distillation_is_zero_only_at_the_teacher() -> None:
    soft = DistillSection(teacher="x", kind="soft", temperature=3.0)
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    assert float(follow_teacher(teacher, teacher, soft)) == pytest.approx(0, abs=1e-6)
    assert float(follow_teacher(student, teacher, soft)) > 0.01
