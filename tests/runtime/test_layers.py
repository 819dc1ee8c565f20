"""What a runtime executes is what is told: names, precisions, times that add up."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from qdq import SIDE, write_classifier
from quantized import SIZE, care, section
from quantized import quantized as quantize
from rich.console import Console

from care_compress.cli import main
from care_compress.evaluate import layers
from care_compress.export.to_onnx import float_graph, put_integers
from care_compress.libraries import silent
from care_compress.model.rewrite import rewrite
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network
from care_compress.recipe.sections import RewriteSection
from care_compress.runtime.layer_times import CONVERT, FLOAT, GROUPS, INTEGER, LayerTime, Profile
from care_compress.runtime.profile import profile_layers, read_engine_profile

openvino = pytest.importorskip("openvino", reason="needs the openvino extra")
onnx_ir = pytest.importorskip("onnx_ir")
IMAGE = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small CARE for both runtimes, float and in INT8."""
    folder = tmp_path_factory.mktemp("files")
    # One input range for a depthwise conv, which is what ONNX Runtime has integer kernels for.
    chosen = section({"role": "depthwise", "input": {"bits": 8, "granularity": "tensor"}})
    model = quantize(chosen).model
    compact = rewrite(care(), RewriteSection(fold_norms=False))
    skeleton, _ = planned(compact, chosen, SIZE)
    graphs = {"fp32": float_graph(compact, SIZE, 1)}
    graphs["int8"] = float_graph(float_network(model, skeleton), SIZE, 1)
    put_integers(graphs["int8"], model)
    found = {}
    for name, graph in graphs.items():
        found[f"{name}.onnx"] = folder / f"{name}.onnx"
        onnx_ir.save(graph, found[f"{name}.onnx"])
        found[f"{name}.xml"] = folder / f"{name}.xml"
        with silent():
            converted = openvino.convert_model(found[f"{name}.onnx"])
            openvino.save_model(converted, found[f"{name}.xml"], compress_to_fp16=False)
    return found


@pytest.fixture(scope="module")
def profiles(files: dict[str, Path]) -> dict[str, Profile]:
    return {name: profile_layers(path, IMAGE, seconds=0.1) for name, path in files.items()}


def share_of_products(profile: Profile, group: str) -> float:
    products = [layer for layer in profile.layers if layer.group in (INTEGER, FLOAT)]
    assert len(products) > 50
    return sum(layer.group == group for layer in products) / len(products)


def test_products_of_a_quantized_file_are_integers_and_those_of_a_float_file_are_not(
    profiles: dict[str, Profile],
) -> None:
    assert share_of_products(profiles["int8.xml"], INTEGER) > 0.8
    for name in ("fp32.xml", "fp32.onnx"):
        assert share_of_products(profiles[name], FLOAT) == 1.0
        assert {layer.precision for layer in profiles[name].layers} <= {"f32", "i32", "int64"}
    # ONNX Runtime has a kernel only where a quantize stands right behind the product.
    assert 0 < share_of_products(profiles["int8.onnx"], INTEGER) < 1
    kinds = {layer.kind for layer in profiles["int8.onnx"].layers if layer.group == INTEGER}
    assert "QLinearConv" in kinds


@pytest.mark.parametrize("name", ["fp32.onnx", "fp32.xml", "int8.onnx", "int8.xml"])
def test_every_product_says_which_site_it_is(profiles: dict[str, Profile], name: str) -> None:
    found = [layer.sites[0] for layer in profiles[name].layers if layer.group in (INTEGER, FLOAT)]
    for site in (
        "stem.0",
        "stages.0.blocks.0.token_mixer.dwconv1",
        "stages.1.blocks.1.inter_layer.inter1_fc1",
        "stages.3.blocks.0.inter_layer.inter2_fc2",
    ):
        assert found.count(site) == 1, site


@pytest.mark.parametrize("name", ["fp32.onnx", "fp32.xml", "int8.onnx", "int8.xml"])
def test_times_add_up_to_the_whole(profiles: dict[str, Profile], name: str) -> None:
    profile = profiles[name]
    # A busy machine stretches the gaps between layers; a wrong unit is a factor of a thousand.
    assert profile.whole_ms is not None
    assert 0.02 * profile.whole_ms < profile.total_ms < 1.3 * profile.whole_ms
    sums = profile.by_kind()
    assert set(sums) == set(GROUPS)
    assert sum(one["ms"] for one in sums.values()) == pytest.approx(profile.total_ms)
    assert sum(one["share"] for one in sums.values()) == pytest.approx(1.0)
    assert sum(one["layers"] for one in sums.values()) == len(profile.layers)


def test_conversions_are_counted_apart(profiles: dict[str, Profile]) -> None:
    for suffix in ("onnx", "xml"):
        plain, rounded = (
            profiles[f"{kind}.{suffix}"].by_kind()[CONVERT] for kind in ("fp32", "int8")
        )
        assert rounded["layers"] > plain["layers"], "quantizing is work, and is not hidden"


def test_anyones_file_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_classifier(tmp_path / "theirs.onnx", int8=True, half=False, batch="batch")
    before = set(tmp_path.iterdir())
    profile = profile_layers(path, torch.randn(1, 3, SIDE, SIDE), seconds=0.01)
    assert set(tmp_path.iterdir()) == before, "the runtime's own profile is thrown away"
    assert {"stem", "head"} <= {site for layer in profile.layers for site in layer.sites}


def test_the_verb_prints_and_writes(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layers.json"
    main_quietly(["layers", str(files["int8.xml"]), "--json", str(out)])
    said = capsys.readouterr().out
    assert "The 25 slowest of" in said and "integer products" in said
    value = json.loads(out.read_text())
    assert value["layers_ms"] == pytest.approx(sum(layer["ms"] for layer in value["layers"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["absent.onnx"], "absent.onnx is not a file"), (["int8.onnx", "--res", "33"], "33, 33")],
)
def test_mistakes_are_one_line_and_exit_code_2(
    files: dict[str, Path], arguments: list[str], message: str, capsys: Any
) -> None:
    name, *rest = arguments
    with pytest.raises(SystemExit) as ended:
        main(["layers", str(files.get(name, name)), *rest])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def main_quietly(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code


def test_an_engine_tells_precisions_and_no_times(tmp_path: Path) -> None:
    rows = [
        ("c", "CONVOLUTION", "INT8", "stem.0"), ("g", "gemm", "FP16", "heads.fc"),
        ("w", "gemm", "INT4", "fc"), ("r", "Reformat", "FP16", "r"),
        ("s", "CONSTANT", "INT64", "s"),
    ]  # fmt: skip
    keys = ("name", "type", "precision", "origin")
    layers = [{**dict(zip(keys, row, strict=True)), "origin": [row[3]]} for row in rows]
    (tmp_path / "int8.engine.json").write_text(
        json.dumps({"layers": layers, "traffic": {"kernels": 4}})
    )
    profile = read_engine_profile(tmp_path / "int8.engine")
    assert [layer.group for layer in profile.layers] == [INTEGER, FLOAT, INTEGER, CONVERT]
    assert not profile.is_timed and profile.traffic == {"kernels": 4}
    found = profile.as_json()
    assert found["layers_ms"] is None and found["by_kind"][INTEGER] == {
        "layers": 2, "ms": None, "share": None,
    }  # fmt: skip


def test_the_slowest_layers_are_shown_the_slowest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [LayerTime(f"n{n}", "Conv", (f"s{n}.",), "u8", INTEGER, float(n)) for n in range(30)]
    monkeypatch.setattr(layers, "probe", lambda *given: None)
    monkeypatch.setattr(layers, "profile_layers", lambda *given: Profile(tuple(rows), 500.0))
    (tmp_path / "a.onnx").write_bytes(b"")
    said = io.StringIO()
    layers.show_layers(tmp_path / "a.onnx", 32, "f32", None, Console(file=said, width=150))
    table, _, sums = said.getvalue().partition("By kind")
    assert re.findall(r"s\d+\.", table) == [f"s{n}." for n in range(29, 4, -1)]
    assert re.search(r"29\.000\D+6\.7 %", table), "of all 435 ms"
    assert "435.000 ms" in sums, "of all of them"
