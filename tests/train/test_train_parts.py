"""Parts of training by hand: rates, averages, mixtures, what is kept, what decides."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from care_compress.data.loader import Batch
from care_compress.errors import TrainingError
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import AugmentSection, DistillSection, TrainSection
from care_compress.run.processes import World
from care_compress.tasks.classification import Accuracy, Classification, follow_teacher, mix
from care_compress.tasks.task import Outcome
from care_compress.train import display
from care_compress.train.loop import (
    GUARD_STEPS,
    Course,
    ParameterGroup,
    _check_loss,
    _validate,
    averaged,
    decayed_and_free,
    learning_rate,
    set_up,
    train_step,
)
from care_compress.train.stage import check_batch_size, starting_point, training_fingerprint
from care_compress.train.state import Progress, Trainee, drop_damaged, forget, step_back


def plan(**values: object) -> TrainSection:
    return TrainSection.model_validate(
        {"epochs": 10, "batch_size": 8, "learning_rate": 1.0, **values}
    )


def rates(**values: object) -> list[float]:
    section = plan(**values)
    return [learning_rate(step, 10, section) for step in range(section.total_steps(10))]


def test_a_warm_up_by_line_begins_with_a_step_and_ends_at_the_peak() -> None:
    found = rates(warmup_epochs=1, learning_rate=2.0)
    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert found[10] == pytest.approx(2.0) and found[11] < 2.0


def test_one_cycle_rises_from_a_twenty_fifth_on_a_cosine() -> None:
    found = rates(schedule="one_cycle", warmup_epochs=4, learning_rate=2.5)
    assert found[0] == pytest.approx(0.1) and found[20] == pytest.approx((0.1 + 2.5) / 2)
    assert found[40] == pytest.approx(2.5)


def test_the_rate_falls_on_a_cosine_to_its_fraction() -> None:
    found = rates(epochs=1, max_steps=9, final_lr_fraction=0.2)
    assert len(found) == 9
    assert found[0] == 1.0 and found[4] == pytest.approx(0.6) and found[8] == pytest.approx(0.2)
    assert found[2] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_a_training_ends_after_its_epochs_or_earlier_if_asked() -> None:
    assert plan().total_steps(7) == 70
    assert plan(max_steps=12).total_steps(7) == 12 and plan(max_steps=900).total_steps(7) == 70


def test_an_average_warms_up_and_then_holds_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = averaged(model, decay=0.3)
    means = []
    for value in (0.0, 1.0, 1.0, 1.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        means.append(float(average.module.weight.detach()))
    # Decays: the first is a copy; then 2/11, 3/12, and 0.3 in the place of 4/13.
    left = [2 / 11, 2 / 11 * 3 / 12, 2 / 11 * 3 / 12 * 0.3]
    assert means == pytest.approx([0.0, *(1 - part for part in left)], rel=1e-5)


def course(section: TrainSection, **more: Any) -> Course:
    given = {"validate": lambda m: None, **more}
    return Course(
        section, Classification(), 10, 4, 0, "", lambda s: cast(Any, ()), lambda x: x.float(),
        given["validate"], given.get("groups", decayed_and_free),
    )  # fmt: skip


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    model[0].bias.requires_grad_(False)
    decayed, free = decayed_and_free(model, plan(weight_decay=0.1))
    assert (decayed.weight_decay, free.weight_decay) == (0.1, 0.0)
    assert [p.dim() for p in decayed.parameters] == [4]
    assert len(free.parameters) == 2, "what is frozen is nobody's"


def test_the_guard_waits_and_looks_at_the_recent_losses() -> None:
    def after(losses: list[float], step: int) -> Progress:
        progress = Progress(step=step)
        for loss in losses:
            _check_loss(progress, loss, course(plan()))
        return progress

    progress = after([2.0, 4.0], 0)
    assert progress.first_loss == 2.0
    assert progress.recent_loss == pytest.approx(0.95 * 2.0 + 0.05 * 4.0)
    after([2.0, 900.0], GUARD_STEPS - 1)
    with pytest.raises(TrainingError, match="diverged"):
        after([2.0, 900.0], GUARD_STEPS)
    after([2.0, 50.0], GUARD_STEPS)  # one bad step is none
    low = [0.01, *[3.0] * 200]
    after(low, GUARD_STEPS)  # no more than three times a uniform guess over four classes
    with pytest.raises(TrainingError, match="diverged"):
        after([0.01, *[4.5] * 200], GUARD_STEPS)
    with pytest.raises(TrainingError, match="loss is nan at step 3"):
        after([math.nan], 2)


class Watcher(display.Silent):
    """Keeps what training shows."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def step(
        self, step: int, loss: float, accuracy: float | None, rate: float, images: int
    ) -> None:
        self.seen.append((step, loss, accuracy, rate, images))

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        self.seen.append((step, metrics))


def one_step(step: int = 0, clip: float | None = None) -> tuple[list[float], Any]:
    """Two weights with slopes of 3 and 4, in groups of rates 1 and 10; how far each went."""
    model = nn.ParameterList([nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))])

    def groups(model: nn.Module, section: TrainSection) -> list[ParameterGroup]:
        first, second = model.parameters()
        return [ParameterGroup([first]), ParameterGroup([second], rate=10.0, until=0.5)]

    def objective(runner: Any, images: Any, targets: Any, progress: float) -> Outcome:
        first, second = runner
        return Outcome((3 * first + 4 * second).sum(), torch.eye(4))

    section = plan(learning_rate=0.01, clip_grad_norm=clip, epochs=1, final_lr_fraction=0.99)
    trainee, watcher = set_up(model, section, World(), groups), Watcher()
    trainee.optimizer = torch.optim.SGD(trainee.optimizer.param_groups, lr=0.01)
    trainee.progress.step = step
    batch = Batch(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]), torch.arange(4))
    train_step(trainee, model, objective, batch, course(section), World(), watcher)
    return [1 - float(p.detach()) for p in model], watcher.seen[0]


def test_groups_move_at_their_own_rate_until_their_time_has_come() -> None:
    moved, (step, loss, accuracy, rate, images) = one_step()
    assert moved == pytest.approx([0.03, 0.4], rel=1e-4)
    assert (step, loss, accuracy, rate, images) == (1, 7.0, 75.0, 0.01, 4)
    assert one_step(step=4)[0] == pytest.approx([0.03, 0.4], rel=0.02)
    assert one_step(step=5)[0] == pytest.approx([0.03, 0.0], rel=0.02)


def test_a_gradient_is_clipped_to_its_norm() -> None:
    """3 and 4 make 5; clipped to 1 they are 0.6 and 0.8."""
    assert one_step(clip=1.0)[0] == pytest.approx([0.006, 0.08], rel=1e-4)
    assert one_step(clip=100.0)[0] == pytest.approx([0.03, 0.4], rel=1e-4)


def test_a_validation_is_top1_in_percent_at_its_epoch() -> None:
    trainee = set_up(nn.Linear(1, 1), plan(), World())
    trainee.progress.step, trainee.progress.recent_loss = 25, 1.5
    watcher = Watcher()
    _validate(trainee, course(plan(), validate=lambda model: Accuracy(8, 6, 7)), World(), watcher)
    assert trainee.progress.history == [{"epoch": 2.5, "top1": 75.0, "loss": 1.5}]
    lost = course(plan(), validate=lambda model: Accuracy(8, 0, 0, broken=8))
    _validate(trainee, lost, World(), watcher)
    assert trainee.progress.history[-1]["top1"] == 0.0, "a training may still recover"


def test_soft_distillation_is_the_students_distance_from_the_softened_teacher() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    section = DistillSection(teacher="x", kind="soft", temperature=4.0)
    p, q = (teacher / 4).softmax(dim=1), (student / 4).softmax(dim=1)
    wanted = 16 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(follow_teacher(student, teacher, section), wanted)
    hard = DistillSection(teacher="x", kind="hard")
    wanted = F.cross_entropy(student, teacher.argmax(dim=1))
    torch.testing.assert_close(follow_teacher(student, teacher, hard), wanted)


def test_mixup_and_cutmix_take_turns_where_both_are_asked_for() -> None:
    images, targets = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16), torch.eye(4)
    cut = 0
    for step in range(200):
        mixed, _ = mix(images, targets, AugmentSection(mixup=1.0, cutmix=1.0), 0, step)
        cut += bool((mixed == mixed.round()).all())
    assert 80 <= cut <= 120
    other = [mix(images, targets, AugmentSection(mixup=1.0), seed, 0)[1] for seed in (0, 1)]
    assert not torch.equal(*other), "another seed, another mixture"


def trainee(decay: float | None = 0.5) -> Trainee:
    torch.manual_seed(0)
    return set_up(nn.Linear(2, 2), plan(ema_decay=decay), World())


def stepped(one: Trainee) -> Trainee:
    one.optimizer.zero_grad()
    one.model(torch.ones(1, 2)).square().sum().backward()
    one.optimizer.step()
    assert one.average is not None
    one.average.update_parameters(one.model)
    one.progress.step += 1
    one.progress.history.append({"top1": 50.0})
    return one


def test_a_training_that_resumes_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    first = stepped(stepped(trainee()))
    first.save(path, "f")
    second = trainee()
    assert not second.resume(path, "other recipe") and second.progress.step == 0
    assert second.resume(path, "f") and second.progress == first.progress
    for one in (first, second):
        stepped(stepped(one))
    for tensor, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(tensor, other), "the optimizer remembers"
    for tensor, other in zip(first.result.parameters(), second.result.parameters(), strict=True):
        assert torch.equal(tensor, other), "so does the average"
    assert first.result is not first.model


def test_the_state_before_is_kept_and_stepped_back_to(tmp_path: Path) -> None:
    path, one = tmp_path / "state.pt", trainee()
    for _ in range(3):
        stepped(one).save(path, "f")
    assert step_back(path) == 2, "the newest may be spoilt"
    again = trainee()
    assert again.resume(path, "f") and again.progress.step == 2
    one.save(path, "f")
    path.unlink()  # killed between the two renames
    assert trainee().resume(path, "f")
    one.save(path, "f")
    forget(path)
    assert not trainee().resume(path, "f") and not list(tmp_path.iterdir())


def test_a_flipped_bit_is_named_and_dropped_when_asked(tmp_path: Path) -> None:
    path, one = tmp_path / "state.pt", stepped(trainee())
    one.save(path, "f")
    stepped(one).save(path, "f")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="damaged"):
        trainee().resume(path, "f")
    drop_damaged(path)
    again = trainee()
    assert again.resume(path, "f") and again.progress.step == 1, "the one before is whole"


def test_a_float_training_is_another_one_where_anything_that_decides_it_differs(
    tmp_path: Path,
) -> None:
    checkpoint = tmp_path / "start.safetensors"

    def fingerprint(*overrides: str, content: str = "a", start: bytes | None = None) -> str:
        more = list(overrides)
        if start is not None:
            checkpoint.write_bytes(start)
            more.append(f"model.checkpoint={checkpoint}")
        recipe = load_recipe("fp32_shapes", more)
        samples = SimpleNamespace(content_digest=lambda: content)
        return training_fingerprint(recipe, cast(Any, samples))

    usual = fingerprint()
    assert usual == fingerprint("train.checkpoint_steps=7", "data.workers=3", "data.crop_pct=0.5")
    others = [
        fingerprint("seed=1"),
        fingerprint("train.epochs=41"),
        fingerprint("model.arch=care_s0"),
        fingerprint("data.resolution=96"),
        fingerprint(content="b"),
        fingerprint(start=b"one"),
        fingerprint(start=b"two"),
    ]
    assert len({usual, *others}) == 8


def test_the_seed_decides_a_fresh_network_and_the_recipe_its_drop_path() -> None:
    one, same, other = (
        starting_point(load_recipe("fp32_shapes", [f"seed={seed}", "train.drop_path=0.2"]), 4)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.head.fc.weight, same.head.fc.weight)
    assert not torch.equal(one.head.fc.weight, other.head.fc.weight)
    dropped = max(getattr(module, "drop_path", 0.0) for module in one.modules())
    assert dropped == pytest.approx(0.2)


def test_a_batch_must_divide_into_pairs_over_all_processes() -> None:
    two = World(size=2)
    check_batch_size(plan(batch_size=8), 8, two)
    with pytest.raises(TrainingError, match="use a multiple of 4"):
        check_batch_size(plan(batch_size=6), 100, two)
    with pytest.raises(TrainingError, match="fewer than one batch"):
        check_batch_size(plan(batch_size=8), 7, World())


def test_speed_and_time_left_count_from_the_first_batch_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Resumed after step 100 of 400; a step of 64 images takes 20 seconds."""
    clock = iter(range(1000, 2000, 20))
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    writer = SimpleNamespace(add_scalar=lambda *given: None, close=lambda: None)
    monkeypatch.setattr(display, "SummaryWriter", lambda *given, **how: writer)
    said = io.StringIO()
    console = Console(file=said, width=200)
    with display.TrainingDisplay(console, Classification.metric, tmp_path, 100, 400) as shown:
        clock = iter([0.0, 0.0, 20.0, 40.0])
        for step, loss in ((101, 2.0), (102, 3.0), (103, 3.0)):
            shown.step(step, loss, 50.0, 0.1, 64)
    lines = said.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 102/400", "step 103/400"]
    assert "loss 2.050" in lines[0] and "3 images/s" in lines[0]
    assert lines[0].endswith("99.3 min left") and lines[1].endswith("99.0 min left")
