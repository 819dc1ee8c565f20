"""A run of masks or boxes, tiny and untrained, from its recipe to an answer on a device."""

import json
from pathlib import Path

import pytest
import torch
from alone import alone
from PIL import Image
from rich.console import Console
from torch import nn

from care_compress.export.bundle import unpack_bundle
from care_compress.export.deploy import make_bundle, take_results
from care_compress.model.care import build_model
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.tasks.known import TASKS

QUIET = Console(quiet=True)
RECIPES = {"segmentation": ("seg_int8_ptq", 7), "detection": ("det_int8_ptq", 6)}


@pytest.mark.slow
@pytest.mark.parametrize("task", RECIPES)
def test_a_run_reaches_a_device(task: str, tmp_path: Path) -> None:
    """INT8 beside the float model, which is made for the bundle alone."""
    recipe, classes = RECIPES[task]
    torch.manual_seed(0)
    model = build_model("care_nano", classes, kind=TASKS[task].kind)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # or every place would answer alike
            module.weight.data.copy_(torch.exp(torch.randn(module.num_features) * 0.5))
    save_checkpoint(model.eval(), tmp_path / "model.safetensors", {})
    changed = [
        f"model.checkpoint={tmp_path / 'model.safetensors'}", "data.resolution=64",
        "data.workers=0", "quantize.calibrate.images=8", "evaluate.images=8", "export.images=6",
        "export.targets=[onnxruntime-cpu]", "quantize.equalize='off'", "quantize.prescale=trained",
    ]  # fmt: skip
    run_recipe(load_recipe(recipe, changed), tmp_path / "runs", "tiny", QUIET)
    archive = make_bundle(tmp_path / "runs", "tiny", "onnxruntime-cpu", QUIET)
    (tmp_path / "device").mkdir()
    bundle = unpack_bundle(archive, tmp_path / "device")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["task"], manifest["letterbox"]) == (task, True)
    assert manifest["models"].keys() == {"int8", "fp32"}
    verified = alone(bundle, "verify")
    assert verified.returncode == 0, verified.stderr
    Image.effect_noise((90, 60), 90).save(tmp_path / "x.png")
    asked = alone(bundle, "infer", str(tmp_path / "x.png"), "--out", str(tmp_path / "drawn.png"))
    assert asked.returncode == 0 and (tmp_path / "drawn.png").is_file()
    take_results(bundle / "results.json", tmp_path / "runs", None, QUIET)
    (taken,) = (tmp_path / "runs" / "tiny" / "measured").iterdir()
    assert json.loads(taken.read_text())["models"]["int8"]["accuracy"]["agreement"] > 90
