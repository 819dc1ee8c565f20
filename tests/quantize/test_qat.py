import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from quantized import SIZE, W4A4, batches, images, network, quantized, section, sqnr
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import image_folder
from torch import Tensor
from torch.fx import Interpreter, Node

import care_compress
from care_compress.data.loader import Batch
from care_compress.errors import CareError, CheckpointError, DataError
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.quantize.artifact import load_quantized, quantized_header
from care_compress.quantize.placement import site_of
from care_compress.quantize.qat import FollowFloat, dampening, parameter_groups, prepare_to_learn
from care_compress.recipe.quantize import QatSection
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import TrainSection
from care_compress.run.processes import World
from care_compress.tasks.classification import Classification
from care_compress.train.display import Silent
from care_compress.train.loop import Course, set_up, train_step

QUIET = Console(quiet=True)
RULES = [
    {"weight": 8, "input": 8},
    {"role": "residual_add", "input": "float"},
    {"role": "attention.kv", "input": "float"},
    {"role": "attention.out", "input": "float"},
    {"role": "pointwise", "weight": 4},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained float model of four colours."""
    folder = tmp_path_factory.mktemp("float")
    recipe = {
        "claim": "a test",
        "model": {"arch": "care_nano"},
        "data": {"source": str(data), "resolution": 32, "crop_pct": 1.0, "workers": 0},
        "train": {"epochs": 4, "batch_size": 16, "learning_rate": 2e-3},
        "export": {"targets": []},
    }
    (folder / "float.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(load_recipe(str(folder / "float.yaml")), folder, "float", QUIET)
    return folder / "float" / "float" / "model.safetensors"


def recipe(folder: Path, data: Path, checkpoint: Path, **qat: object) -> Path:
    plan = {
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "dampening": 0.1,
        "checkpoint_steps": 2,
        **qat,
    }
    content = {
        "claim": "a test",
        "precision": "w4a8",
        "model": {"checkpoint": str(checkpoint)},
        "data": {"source": str(data), "resolution": 32, "crop_pct": 1.0, "workers": 0},
        "rewrite": {"fold_norms": False},
        "export": {"targets": []},
        "quantize": {
            "target": None,
            "rules": RULES,
            "calibrate": {"images": 32},
            "qat": plan,
        },
    }
    path = folder / "qat.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_interrupted_training_ends_with_the_same_bits(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, data, checkpoint)
    run_recipe(load_recipe(str(path)), tmp_path, "whole", QUIET)

    calls = {"left": 7}
    original = FollowFloat.__call__

    def until_killed(self: FollowFloat, *given: object) -> object:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyboardInterrupt
        return original(self, *given)

    monkeypatch.setattr(FollowFloat, "__call__", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(str(path)), tmp_path, "cut", QUIET)
    assert (tmp_path / "cut" / "qat" / "train_state.pt").exists()
    calls["left"] = 10**6
    run_recipe(load_recipe(str(path)), tmp_path, "cut", QUIET)
    assert calls["left"] > 10**6 - 12, "the steps before the interruption were not done again"
    states = [
        load_quantized(tmp_path / run / "qat" / "model.safetensors").state_dict()
        for run in ("whole", "cut")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_processes_train_what_one_does(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, data, checkpoint, max_steps=6)
    run_recipe(load_recipe(str(path)), tmp_path, "one", QUIET)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "care_compress", "quantize", str(path), "--runs", str(tmp_path)]
    done = subprocess.run([*two, *command, "--name", "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    models = [load_quantized(tmp_path / name / "qat/model.safetensors") for name in ("one", "two")]
    x = images(8)
    assert sqnr(models[1](x), models[0](x)) > 25, "the same but for rounding that tips over"


def test_a_ruinous_training_keeps_the_ptq_weights_and_says_so(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, data, checkpoint, learning_rate=0.5, ema_decay=None, max_steps=3)
    results = run_recipe(load_recipe(str(path)), tmp_path, "run", Console())
    assert results["kept"] == "ptq" and results["model"] == "ptq/model.safetensors"
    assert results["accuracy"]["top1"] == results["candidates"]["ptq"]["top1"]
    assert "ptq weights are kept" in " ".join(capsys.readouterr().out.split())


def test_the_kept_file_opens_and_scores_what_was_reported(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, data, checkpoint, max_steps=4)
    results = run_recipe(load_recipe(str(path)), tmp_path, "run", QUIET)
    from care_compress.evaluate.scoring import measure_artifact

    loaded = load_recipe(str(path))
    artifact = str(tmp_path / "run" / results["model"])
    measured = measure_artifact(artifact, loaded.data, None, 64, None, QUIET)
    assert measured.top1 == results["accuracy"]["top1"]
    assert quantized_header(Path(artifact)) is not None


def test_a_quantized_file_is_no_float_checkpoint(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, data, checkpoint, max_steps=1)
    run_recipe(load_recipe(str(path), ["quantize.qat=null"]), tmp_path, "run", QUIET)
    made = tmp_path / "run" / "ptq" / "model.safetensors"
    with pytest.raises(CheckpointError, match="already quantized"):
        run_recipe(load_recipe(str(path), [f"model.checkpoint={made}"]), tmp_path, "b", QUIET)


def test_a_checkpoint_with_nan_names_where_it_comes_from(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model = care_compress.load_checkpoint(checkpoint)
    model.stages[1].blocks[0].inter_layer.inter1_fc2.weight.data[0, 0] = float("nan")
    broken = tmp_path / "broken.safetensors"
    with pytest.raises(CareError, match="NaN|nan|finite") as caught:
        save_checkpoint(model, broken, {})
        path = recipe(tmp_path, data, broken)
        run_recipe(load_recipe(str(path)), tmp_path, "run", QUIET)
    assert "stages.1.blocks.0.inter_layer.inter1_fc2" in str(caught.value)


def test_attention_stays_in_float32_under_autocast() -> None:
    model = quantized(section()).model
    plain = model.graph.code
    seen: dict[str, torch.dtype] = {}

    class Watch(Interpreter):
        def run_node(self, n: Node) -> object:
            out = super().run_node(n)
            if ".core" in site_of(n) and isinstance(out, Tensor):
                seen[n.name] = out.dtype
            return out

    model.guard_attention(True)
    with torch.autocast("cpu", torch.bfloat16):
        Watch(model.graph).run(images(2))
        model(images(2))
    assert len(seen) > 10 and set(seen.values()) == {torch.float32}
    copy.deepcopy(model)  # weight averaging copies it
    model.guard_attention(False)
    assert model.graph.code == plain, "and what is exported is the plain graph"


def test_half_precision_training_ends_with_a_model(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    gentle = {"max_steps": 3, "learning_rate": 1e-5}
    path = recipe(tmp_path, data, checkpoint, precision="bf16", **gentle)
    results = run_recipe(load_recipe(str(path)), tmp_path, "run", QUIET)
    assert results["candidates"]["qat"]["agreement"] > 90


@pytest.mark.slow
def test_what_a_search_chose_is_what_is_trained(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, data, checkpoint, max_steps=2)
    search = ["quantize.search={trials: 2, images: 16}", "budget.max_top1_drop=90"]
    results = run_recipe(load_recipe(str(path), search), tmp_path, "run", QUIET)
    plans = {
        stage: load_quantized(tmp_path / "run" / stage / "model.safetensors").plan
        for stage in ("ptq", "qat")
    }
    assert plans["ptq"] == plans["qat"] and results["plan"]["macs"]
    widths = {decision.precision for decision in plans["qat"].decisions if decision.site.weighted}
    assert "w4a4" in widths, "no rule of the recipe says so"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.qat.batch_size=15", r"quantize\.qat\.batch_size 15 does not divide"),
        ("quantize.qat.batch_size=4000", r"set quantize\.qat\.batch_size to \d+ or less"),
        ("quantize.calibrate.list=absent.json", "cannot read absent.json"),
        ("quantize.rules=[{role: nothing, weight: 8}]", "matches no site"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    data: Path, checkpoint: Path, tmp_path: Path, override: str, message: str
) -> None:
    earlier = tmp_path / "run" / "results.json"
    earlier.parent.mkdir()
    earlier.write_text("{}")
    path = recipe(tmp_path, data, checkpoint)
    with pytest.raises(CareError, match=message):
        run_recipe(load_recipe(str(path), [override]), tmp_path, "run", QUIET)
    assert [p.name for p in earlier.parent.iterdir()] == ["results.json"], "old results stay"


def test_another_resolution_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=f"quantized at {SIZE}x{SIZE}, the images are 64x64"):
        quantized(section()).model(torch.zeros(1, 3, 64, 64))


def test_scales_stop_where_the_recipe_says_and_weights_go_on() -> None:
    model = quantized(section(W4A4)).model
    prepare_to_learn(model)
    plan = QatSection(batch_size=16, freeze_scales=0.5)
    groups = parameter_groups(model, plan)
    assert [group.until for group in groups] == [1.0, 1.0, 0.5]
    gains = {id(quantizer.gain) for quantizer in model.integers()}
    learned = {id(parameter) for parameter in groups[2].parameters}
    assert gains <= learned, "every scale learns"
    grouped = [id(p) for group in groups for p in group.parameters]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained), "each parameter once"

    plan = plan.model_copy(update={"epochs": 1, "freeze_scales": 0.5})
    batch = Batch(images(16), torch.zeros(16, dtype=torch.int64), torch.arange(16))
    course = Course(
        plan, Classification(), 4, 5, 0, "", lambda s: (), lambda x: x, lambda m: None,
        parameter_groups,
    )  # fmt: skip
    trainee = set_up(model, plan, World(), parameter_groups)
    moved = []
    for _ in range(4):
        before = [p.detach().clone() for g in (groups[2], groups[0]) for p in g.parameters[:3]]
        objective = FollowFloat(Classification(), network(), plan)
        train_step(trainee, trainee.model.train(), objective, batch, course, World(), Silent())
        after = [p for g in (groups[2], groups[0]) for p in g.parameters[:3]]
        same = [torch.equal(b, a) for b, a in zip(before, after, strict=True)]
        moved.append((not all(same[:3]), not all(same[3:])))
    assert moved == [(True, True), (True, True), (False, True), (False, True)]


def test_learning_reduces_the_distance_to_the_float_model() -> None:
    model, teacher = quantized(section(W4A4)).model, network()
    prepare_to_learn(model)
    plan = QatSection(batch_size=16, learning_rate=2e-4)
    trainee = set_up(model, plan, World(), parameter_groups)
    objective, x = FollowFloat(Classification(), teacher, plan), images(32, seed=3)
    losses = []
    runner = trainee.model.train()
    targets = torch.zeros(32, 5)
    for _ in range(25):
        outcome = objective(runner, x, targets, 0.0)
        losses.append(float(outcome.loss))
        trainee.optimizer.zero_grad()
        outcome.loss.backward()
        trainee.optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_dampening_is_zero_on_the_grid_only() -> None:
    model = quantized(section(W4A4)).model
    off = dampening(model)
    with torch.no_grad():
        for quantizer in model.integers("weight"):
            weight = model.weight(quantizer.site)
            weight.copy_(quantizer(weight))
    assert float(off) > 0.01 and float(dampening(model)) < 1e-6


def test_the_teacher_itself_has_no_loss() -> None:
    plan = QatSection(batch_size=16)
    model = quantized(section(prescale="trained", equalize="off", bias_correction=False)).model
    model.enable(False)

    class Same(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            logits, *features = model.graph(x)
            return logits, features

    outcome = FollowFloat(Classification(), network(), plan)(
        Same(), images(8), torch.zeros(8, 5), 0.5
    )
    assert float(outcome.loss) < 1e-6


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    from care_compress.quantize.artifact import save_quantized
    from care_compress.recipe.sections import RewriteSection

    chosen = section(W4A4, hadamard=True)
    model = quantized(chosen).model
    save_quantized(model, chosen, RewriteSection(fold_norms=False), tmp_path / "m.safetensors")
    drawn = torch.random.get_rng_state()
    again = load_quantized(tmp_path / "m.safetensors")
    assert torch.equal(torch.random.get_rng_state(), drawn), "what is read changes no training"
    x = images(4)
    assert torch.equal(again(x), model(x))
    assert again.plan == model.plan

    tensors = load_file(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    del tensors[sorted(name for name in tensors if name.endswith("scale"))[-1]]
    save_file(tensors, tmp_path / "part.safetensors", metadata)
    with pytest.raises(CheckpointError, match="no quantized model that can be read"):
        load_quantized(tmp_path / "part.safetensors")


def test_a_quantized_model_can_be_copied_for_averaging() -> None:
    model = quantized(section()).model
    twin = copy.deepcopy(model)
    next(twin.integers()).gain.data.mul_(2)
    assert float(next(model.integers()).gain.data.max()) == 1.0
    assert SIZE == model.plan.resolution and next(batches()).shape[-1] == SIZE


def test_qat_takes_no_second_teacher() -> None:
    with pytest.raises(ValueError, match="no distill"):
        QatSection(drop_path=0.1)
    assert issubclass(QatSection, TrainSection), "everything the float trainer has holds here"
