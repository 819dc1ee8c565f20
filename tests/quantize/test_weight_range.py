"""INT8 files are right on every processor: by arithmetic, and by the kernels of a lesser one.

Where a processor has no integer dot products, two neighbouring products of u8 and s8 are added in
16 bits that saturate.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized import SIZE, images, network, quantized, section, small_start, sqnr
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored import stored_weights

from care_compress.cli import main
from care_compress.errors import ExportError, RecipeError, TargetError
from care_compress.machine import read_machine
from care_compress.model.checkpoint import QUANTIZED_HEADER
from care_compress.pipeline import run_recipe
from care_compress.quantize.artifact import load_saved, save_quantized
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network, retarget
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import RewriteSection
from care_compress.recipe.target import DOT_PRODUCTS, all_targets, load_target
from care_compress.runtime import dot_products
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.dot_products import onnxruntime_is_exact
from care_compress.runtime.on_openvino import openvino_core

pytest.importorskip("openvino", reason="needs the openvino extra")
CPU = torch.device("cpu")
CPU_TARGETS = ("onnxruntime-cpu", "openvino-cpu", "openvino-gpu", "openvino-npu")
INT16 = np.iinfo(np.int16)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    few = ["quantize.calibrate.images=16", f"export.targets=[{', '.join(CPU_TARGETS)}]"]
    return [*small_start(tmp_path_factory.mktemp("start")), *few]


@pytest.fixture(scope="module")
def run(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    run_recipe(load_recipe("int8_ptq", start), runs, "int8", Console(quiet=True))
    return runs / "int8"


@pytest.fixture(scope="module")
def full(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported as where dot products are, wherever this runs."""
    runs = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, exact=True)
        # On a processor without them the read-back finds out what the metadata says.
        with contextlib.suppress(ExportError):
            recipe = load_recipe("int8_ptq", [*start, "quantize.full_range=true"])
            run_recipe(recipe, runs, "int8", Console(quiet=True))
    return runs / "int8"


def pretend(patch: pytest.MonkeyPatch, exact: bool) -> None:
    for probe in ("onnxruntime_is_exact", "openvino_is_exact"):
        patch.setattr(dot_products, probe, lambda: exact)


def file_of(run: Path, target: str, name: str = "int8") -> Path:
    suffix = ".onnx" if target.startswith("onnxruntime") else ".xml"
    return run / "exports" / target / f"{name}{suffix}"


def test_what_runs_on_a_cpu_keeps_to_the_range_and_nvidia_uses_all_of_it() -> None:
    reduced = {target.name for target in all_targets() if target.weights.reduce_range}
    assert reduced == set(CPU_TARGETS)


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_no_pair_of_products_overflows_16_bits(run: Path, target: str) -> None:
    weights = stored_weights(file_of(run, target))
    assert len(weights) > 20
    for name, integers in weights.items():
        # Any two of one output may be neighbours, and each may meet the largest activation.
        rows = np.sort(integers.reshape(len(integers), -1).astype(np.int64), axis=1)
        pairs = rows[:, :2].sum(axis=1), rows[:, -2:].sum(axis=1)
        assert 255 * pairs[0].min() >= INT16.min, f"{name} may overflow"
        assert 255 * pairs[1].max() <= INT16.max, f"{name} may overflow"
    largest = max(np.abs(integers.astype(int)).max() for integers in weights.values())
    assert largest >= 63, "the range that is there is used"


_ANSWERS = """
import sys
import numpy as np
import torch
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.dot_products import openvino_is_exact
logits = OpenVinoPredictor(sys.argv[1])(torch.from_numpy(np.load(sys.argv[2])))
np.save(sys.argv[3], logits.numpy())
print(openvino_is_exact())
"""


@pytest.mark.skipif(
    read_machine().arch != "x86_64", reason="ONEDNN_MAX_CPU_ISA chooses among x86 kernels"
)
@pytest.mark.parametrize("target", ["openvino-cpu", "openvino-npu"])
def test_the_kernels_of_a_lesser_processor_answer_alike(
    run: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, x = file_of(run, target), images(24, seed=5)
    here = open_predictor(str(path), CPU)(x)
    np.save(tmp_path / "images.npy", x.numpy())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    files = [str(path), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    done = subprocess.run(
        [sys.executable, "-c", _ANSWERS, *files], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", "these are the kernels that saturate"
    there = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    # What stays in float is summed in another order, and now and then rounds to another step.
    assert sqnr(there, here) > 25
    assert (there.argmax(1) == here.argmax(1)).float().mean() >= 0.95


@pytest.mark.parametrize("target", ["openvino-cpu", "openvino-npu"])
def test_what_is_planned_in_float_is_not_quantized_by_the_runtime(run: Path, target: str) -> None:
    """Left to itself, OpenVINO rounds float inputs of 8-bit weights where it has dot products."""
    core = openvino_core()
    compiled = core.compile_model(core.read_model(file_of(run, target)), "CPU")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_the_probe_finds_what_the_processor_is_known_to_have() -> None:
    machine = read_machine()
    if machine.arch != "x86_64" or machine.cpu.dot_products is None:
        pytest.skip("elsewhere products are exact without them, or nothing is known")
    assert onnxruntime_is_exact() == machine.cpu.dot_products


def test_the_full_range_is_a_choice_that_the_file_tells(full: Path) -> None:
    for target in CPU_TARGETS:
        path = file_of(full, target, "int8-dotprod")
        largest = max(np.abs(w.astype(int)).max() for w in stored_weights(path).values())
        assert largest >= 127
        assert not file_of(full, target).exists(), "its name says that it is not for everyone"
        export = json.loads((path.parent / "export.json").read_text())
        assert export["needs"] == DOT_PRODUCTS
        assert export["models"]["int8"]["file"] == path.name


def test_a_full_range_file_is_refused_by_name_where_its_sums_saturate(
    run: Path, full: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pretend(monkeypatch, exact=False)
    data = ["--data", "builtin:shapes", "--res", str(SIZE)]
    for target in ("onnxruntime-cpu", "openvino-cpu"):
        path = file_of(full, target, "int8-dotprod")
        with pytest.raises(TargetError, match=f"{path.name} .* integer dot products"):
            open_predictor(str(path), CPU)
        beside = ["compare", str(file_of(run, target)), *data]
        for verb, *more in (["accuracy", *data], ["latency"], ["layers"], beside):
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main([verb, str(path), *more])
            said = capsys.readouterr()
            assert ended.value.code == 2, f"{verb}: {said}"
            assert path.name in said.err and "quantize.full_range: false" in said.err
            assert "Traceback" not in said.err


def test_where_it_could_not_be_read_back_no_full_range_file_is_written(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, exact=False)
    recipe = load_recipe("int8_ptq", [*start, "quantize.full_range=true"])
    results = run_recipe(recipe, tmp_path, "run", Console(quiet=True))
    for target in CPU_TARGETS:
        assert "integer dot products" in results["exports"][target]["skipped"]
    assert not list((tmp_path / "run" / "exports").rglob("int8*"))


def test_a_model_from_before_the_limit_keeps_its_range(tmp_path: Path) -> None:
    chosen = section(target="openvino-cpu", full_range=True)
    model = quantized(chosen).model
    path, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    save_quantized(model, chosen, RewriteSection(fold_norms=False), path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[QUANTIZED_HEADER])
    del about["quantize"]["full_range"]
    save_file(load_file(path), old, {QUANTIZED_HEADER: json.dumps(about)})
    with torch.no_grad():
        assert torch.equal(load_saved(old).model(images(4)), model(images(4)))
    assert load_saved(old).section.full_range, "so that its files are named for it"


def test_a_target_that_takes_all_8_bits_gets_the_weights_that_were_corrected() -> None:
    """Rounded anew in finer steps they would no longer fit their biases (LOG.md)."""
    chosen = section(target="openvino-cpu")
    model = quantized(chosen).model
    inner = float_network(model, planned(network(), chosen, SIZE)[0])
    moved = retarget(model, inner, chosen.rules, load_target("tensorrt-gpu"))
    assert {(q.quant_min, q.quant_max) for q in moved.integers("weight")} == {(-64, 63)}
    wider = load_target("openvino-cpu").at_full_range()
    with torch.no_grad():
        same = retarget(model, inner, chosen.rules, wider)(images(4))
        assert torch.equal(same, model(images(4)))


def test_products_of_two_activations_cannot_overflow_either() -> None:
    """OpenVINO multiplies u8 and u8 as floats, but takes zero point 128 for signed integers."""
    chosen = section({"role": "attention.*", "weight": 8, "input": 8}, target="openvino-cpu")
    model = quantized(chosen).model
    factors = [q for q in model.integers("right") if "token_mixer.core" in q.site]
    for quantizer in factors:
        quantizer.zero_point.fill_(128)
    inner = float_network(model, planned(network(), chosen, SIZE)[0])
    moved = retarget(model, inner, chosen.rules, load_target("openvino-cpu"))
    for quantizer in moved.integers("right"):
        if "token_mixer.core" in quantizer.site:
            assert int(quantizer.zero_point) == 127
    assert factors
    signed = {"role": "attention.*", "weight": 8, "input": {"bits": 8, "symmetric": True}}
    with pytest.raises(RecipeError, match="two symmetric activations"):
        planned(network(), section(signed, target="openvino-cpu"), SIZE)
    planned(network(), section(signed, target="openvino-cpu", full_range=True), SIZE)
    planned(network(), section(signed, target="tensorrt-gpu"), SIZE)
    performance = {"backend": "nncf", "nncf": {"preset": "performance"}}
    with pytest.raises(ValueError, match=r"nncf.ignored_types: \[MatMul\]"):
        QuantizeSection.model_validate(performance)
    QuantizeSection.model_validate({**performance, "full_range": True})


def test_a_model_made_for_all_8_bits_is_held_in_the_range_of_a_cpu() -> None:
    chosen = section(target="tensorrt-gpu")
    model = quantized(chosen).model
    inner = float_network(model, planned(network(), chosen, SIZE)[0])
    moved = retarget(model, inner, chosen.rules, load_target("onnxruntime-cpu"))
    assert {(q.quant_min, q.quant_max) for q in model.integers("weight")} == {(-128, 127)}
    assert {(q.quant_min, q.quant_max) for q in moved.integers("weight")} == {(-64, 63)}
    for quantizer in moved.integers("weight"):
        weight = moved.weight(quantizer.site)
        assert quantizer.cut(weight) == 0, "coarser steps, and all of it still fits"
