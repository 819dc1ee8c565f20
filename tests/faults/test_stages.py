"""A change of each section of a recipe redoes its stage and those after it, and nothing else."""

import shutil
from pathlib import Path

import pytest
from faulty import Product, assert_same, small_recipe
from rich.console import Console

from care_compress.errors import ExportError
from care_compress.export.variants import Variant
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import Recipe, load_recipe

EXPORTS = {"export onnxruntime-cpu", "export openvino-cpu"}
SAMPLES = {"export samples"}  # for the bundles of CPU targets; images, whatever the model
AFTER_PTQ = {"ptq", "evaluate ptq", "qat", "evaluate qat", *EXPORTS}
ALL = {"train", "calibration", *AFTER_PTQ}
# What is done again. The name stands in exported files alone.
CHANGES: dict[str, tuple[str, set[str]]] = {
    "name": ("other", EXPORTS),
    "claim": ("another", set()),
    "precision": ("mixed", EXPORTS),
    "seed": ("1", ALL),
    "model": ("{arch: care_nano, checkpoint: CHECKPOINT}", ALL),
    "data": ("{crop_pct: 0.9}", ALL - {"train"} | SAMPLES),  # random crops do not ask for it
    "train": ("{learning_rate: 1.0e-3}", ALL),
    "slim": ("{budget.macs: 0.7}", ALL - {"train"}),
    "rewrite": ("{fuse_normaliser: false}", ALL - {"train"}),
    "quantize": ("{bias_correction: false}", AFTER_PTQ),
    "export": ("{images: 4}", EXPORTS | SAMPLES),
    "budget": ("{max_top1_drop: 50.0}", set()),
    "evaluate": ("{images: 20}", {"evaluate ptq", "evaluate qat"}),
}
INNER = {
    "quantize.qat.learning_rate=1e-4": {"qat", "evaluate qat", *EXPORTS},
    "quantize.calibrate.images=8": ALL - {"train"},
    "export.targets=[onnxruntime-cpu]": set(),
    "export.targets=[onnxruntime-cpu, openvino-cpu, openvino-npu]": {"export openvino-npu"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("recipe"), ["onnxruntime-cpu", "openvino-cpu"])


def redone(product: Product, *overrides: str) -> set[str]:
    settings = [part for override in overrides for part in ("--set", override)]
    process = product.start(None, *settings)
    assert process.wait() == 0, process.said
    return {
        line.split(": ")[0]
        for line in process.said.splitlines()
        if line.endswith((", made again", "anew")) and not line.startswith("recipe or data changed")
    }


def overrides_of(key: str, value: str, recipe: Path) -> list[str]:
    """A section's value as changes of its keys: the others stay as they are."""
    value = value.replace("CHECKPOINT", str(recipe.parent / "four.safetensors"))
    if not value.startswith("{"):
        return [f"{key}={value}"]
    pairs = value.strip("{}").split(", ")
    return [f"{key}.{name}={text}" for name, text in (pair.split(": ") for pair in pairs)]


def test_a_change_redoes_what_it_reaches_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    # Another task is another network: a run of one is refused for the other.
    assert CHANGES.keys() == Recipe.model_fields.keys() - {"task"}, "a new section needs a place"
    product = Product(recipe, tmp_path / "runs")
    left = product.finish()
    assert redone(product) == set()
    changes = {
        tuple(overrides_of(key, value, recipe)): stages for key, (value, stages) in CHANGES.items()
    }
    changes |= {(override,): stages for override, stages in INNER.items()}
    shutil.copytree(product.run, tmp_path / "finished")
    for overrides, stages in changes.items():
        shutil.rmtree(product.run)
        shutil.copytree(tmp_path / "finished", product.run)
        assert redone(product, *overrides) == stages - _new(stages), overrides
    shutil.rmtree(product.run)
    shutil.copytree(tmp_path / "finished", product.run)
    assert redone(product, "seed=1") and redone(product) == ALL, "and back"
    assert_same(product.left(), left)


def _new(stages: set[str]) -> set[str]:
    """A target that the run never had is not made again."""
    return stages & {"export openvino-npu"}


def test_an_export_that_failed_is_tried_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ExportError("nothing came out.")

    chosen, quiet = (
        load_recipe(str(recipe), ["export.targets=[onnxruntime-cpu]"]),
        Console(quiet=True),
    )
    with monkeypatch.context() as patch:
        patch.setattr(Variant, "write", broken)
        with pytest.raises(ExportError, match="nothing came out"):
            run_recipe(chosen, tmp_path, "run", quiet)
    results = run_recipe(chosen, tmp_path, "run", quiet)
    assert results["exports"]["onnxruntime-cpu"]["models"]["int8"]["holds"]
