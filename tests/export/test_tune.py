"""Tuning keeps the fastest placement within the budget, and the run stays one compare trusts."""

import io
import json
from pathlib import Path

import pytest
from quantized import small_start
from rich.console import Console

from care_compress.errors import RunError, TargetError
from care_compress.evaluate.latency import LatencyPlan
from care_compress.export.tune import TriedPlacement, TuneOptions, choose, run_tune
from care_compress.files import digest_of
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.target import AS_SHIPPED, Placement, load_target
from care_compress.tasks.task import Drop

QUIET = Console(quiet=True)
QUICK = TuneOptions(images=8, latency=LatencyPlan(0.01, least_runs=6, warmup=1, turns=3))
TARGET = "onnxruntime-cpu"


def tried(name: str, speedup: tuple[float, float, float], drop: float = 0.0) -> TriedPlacement:
    return TriedPlacement(name, Drop(drop, drop, drop), 1.0, speedup)


def test_the_fastest_within_the_budget_is_kept() -> None:
    shipped = tried(AS_SHIPPED, (1.0, 1.0, 1.0))
    fast = tried("fast", (1.3, 1.2, 1.4))
    faster = tried("faster", (1.5, 1.4, 1.6), drop=2.0)
    assert choose([shipped, fast, faster], limit=None) is faster
    assert choose([shipped, fast, faster], limit=0.3) is fast
    assert choose([shipped, tried("noise", (1.1, 0.9, 1.3))], limit=None) is shipped


def test_every_placement_of_a_target_is_other_than_its_rules() -> None:
    for name in ("openvino-cpu", "onnxruntime-cpu"):
        target = load_target(name)
        assert target.placements
        assert Placement(rules=target.rules, gelu=target.gelu) not in target.placements.values()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    start = [*small_start(folder), f"export.targets=[{TARGET}, openvino-npu]"]
    few = [*start, "quantize.calibrate.images=32"]
    run_recipe(load_recipe("int8_ptq", few), folder, "mine", QUIET)
    run_recipe(load_recipe("fp32", [*start, "export.targets=[]"]), folder, "float", QUIET)
    return folder


@pytest.fixture(scope="module")
def tuned(runs: Path) -> tuple[str, str]:
    """The placement that was kept, and the digest of another target's file before."""
    other = digest_of(runs / "mine" / "exports" / "openvino-npu" / "int8.xml")
    return run_tune(runs, "mine", TARGET, QUICK, QUIET), other


@pytest.mark.slow
def test_the_run_holds_what_was_kept(runs: Path, tuned: tuple[str, str]) -> None:
    run, (kept, other) = runs / "mine", tuned
    export = json.loads((run / "exports" / TARGET / "export.json").read_text())
    file = run / "exports" / TARGET / "int8.onnx"
    assert export["models"]["int8"]["sha256"] == digest_of(file)
    results = json.loads((run / "results.json").read_text())
    assert results["exports"][TARGET]["placement"] == kept
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["outputs"][f"exports/{TARGET}/int8.onnx"] == digest_of(file)
    assert digest_of(run / "exports" / "openvino-npu" / "int8.xml") == other, "others are left"
    (record,) = (run / "tune").glob(f"{TARGET}-*.json")
    names = {one["name"] for one in json.loads(record.read_text())["tried"]}
    assert names == {AS_SHIPPED, *load_target(TARGET).placements}


@pytest.mark.slow
def test_what_is_known_is_not_measured_again(runs: Path, tuned: tuple[str, str]) -> None:
    (record,) = (runs / "mine" / "tune").glob(f"{TARGET}-*.json")
    before = json.loads(record.read_text())["tried"]
    said = io.StringIO()
    run_tune(runs, "mine", TARGET, QUICK, Console(file=said, width=200))
    assert "measured before on this processor" in said.getvalue()
    assert json.loads(record.read_text())["tried"] == before


@pytest.mark.parametrize(
    ("run", "target", "error", "said"),
    [
        ("nobody", TARGET, RunError, "no finished run called nobody"),
        ("float", TARGET, RunError, "quantized nothing"),
        ("mine", "tensorrt-jetson-orin", TargetError, "no placements to try on this machine"),
    ],
)
def test_what_cannot_be_tuned_says_why(
    runs: Path, run: str, target: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run_tune(runs, run, target, QUICK, QUIET)
