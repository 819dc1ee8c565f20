"""Which engine infer uses: of those that answer rightly, the fastest that was measured here."""

import json
from pathlib import Path
from typing import Any

import pytest
from fakeboard import FakeGpu, fake_host
from PIL import Image
from qdq import make_content

from care_compress.device.app import main
from care_compress.device.choice import choose_engine
from care_compress.device.manifest import Bundle
from care_compress.export.bundle import unpack_bundle, write_bundle

Found = dict[str, dict[str, Any]]


def lying(
    folder: Path, found: Found, requirement: str = "tensorrt>=10.3"
) -> tuple[Bundle, list[str]]:
    """Engines that lie in a bundle, and what results.json says of them."""
    for model in found:
        about = {"engine_sha256": f"{model} as it is"}
        (folder / f"{model}.engine.json").write_text(json.dumps(about))
    models = {
        model: {"engine_sha256": f"{model} as it is", **one} for model, one in found.items() if one
    }
    (folder / "results.json").write_text(json.dumps({"models": models}))
    return Bundle(folder, {"requirement": requirement}), list(found)


def of(passed: bool | None = None, p50: float | None = None, batch: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = {"": ""}
    if passed is not None:
        found["accuracy"] = {"passed": passed}
    if p50 is not None:
        found["speed"] = {"latency_ms": {"p50": p50}, "batch": batch}
    return found


@pytest.mark.parametrize(
    ("found", "model", "words"),
    [
        ({"fp16": of(True, 2.0), "int8": of(True, 1.0)}, "int8", "fastest of 2"),
        ({"fp16": of(True, 1.0), "int8": of(True, 2.0)}, "fp16", "fastest of 2"),
        ({"fp16": of(True, 2.0), "int8": of(False, 1.0)}, "fp16", "fastest of 1"),
        ({"fp16": of(True, 2.0), "int8": of(None, 1.0)}, "fp16", "fastest of 1"),
        ({"fp16": of(True, 2.0), "int8": of(True, 4.0, 4)}, "int8", "1.000 ms for an image"),
        ({"fp16": of(True, 2.0), "int8-late": of(True, 1.5)}, "int8-late", "fastest of 2"),
        ({"fp16": of(True), "int8": of()}, "fp16", "bench has not timed it"),
        ({"fp16": {}, "int8": {}}, "int8", "no engine here has passed verify yet"),
        ({"fp16": {}, "int8": of(False)}, "fp16", "no engine here has passed"),
        ({"fp16": of(False), "int8": of(False)}, "fp16", "FAILED"),
    ],
)
def test_the_engine_that_passed_and_won_is_used(
    tmp_path: Path, found: Found, model: str, words: str
) -> None:
    chosen, why = choose_engine(*lying(tmp_path, found))
    assert chosen == model and words in why


def test_on_rtx_float16_is_used_until_something_was_measured(tmp_path: Path) -> None:
    """TensorRT for RTX multiplies no integers."""
    untried = {"int8": of(), "fp16": of()}
    assert choose_engine(*lying(tmp_path, untried))[0] == "int8"
    assert choose_engine(*lying(tmp_path, untried, "tensorrt-rtx>=1.7"))[0] == "fp16"
    timed = {"int8": of(True, 1.0), "fp16": of(True, 2.0)}
    assert choose_engine(*lying(tmp_path, timed, "tensorrt-rtx>=1.7"))[0] == "int8"


def test_figures_of_an_engine_that_was_built_again_count_for_nothing(tmp_path: Path) -> None:
    bundle, built = lying(tmp_path, {"fp16": of(True, 2.0), "int8": of(True, 1.0)})
    (tmp_path / "int8.engine.json").write_text('{"engine_sha256": "another"}')
    assert choose_engine(bundle, built)[0] == "fp16"


@pytest.mark.parametrize("text", ["", "[]", '{"models": 3}', '{"models": {"int8": {"speed": 1}}}'])
def test_results_that_are_no_results_count_for_nothing(tmp_path: Path, text: str) -> None:
    bundle, built = lying(tmp_path, {"fp16": {}, "int8": {}})
    (tmp_path / "results.json").write_text(text)
    assert choose_engine(bundle, built)[0] == "int8"


def test_infer_says_which_engine_it_uses_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = make_content(tmp_path)
    bundle = unpack_bundle(write_bundle(content, tmp_path / "bundle.tar.gz"), tmp_path)
    host = fake_host(tmp_path / "root", gpu=FakeGpu())
    picture = tmp_path / "a.png"
    Image.new("RGB", (30, 40), (200, 10, 60)).save(picture)

    def run(verb: str, *options: str) -> int:
        return main([verb, "--bundle", str(bundle), *options], host)

    assert run("build") == run("infer", str(picture)) == 0
    printed = capsys.readouterr()
    assert "using int8.engine: no engine here has passed verify yet" in printed.err
    assert run("verify") == 0
    results = json.loads((bundle / "results.json").read_text())
    for model, p50 in (("int8", 3.0), ("fp16", 2.0)):
        results["models"][model]["speed"] = of(p50=p50)["speed"]
    (bundle / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert run("infer", str(picture)) == 0
    printed = capsys.readouterr()
    assert "using fp16.engine: it passed verify and is the fastest of 2" in printed.err
    assert "a.png (fp16)" in printed.out
    assert run("infer", str(picture), "--int8-only") == 0
    assert "a.png (int8)" in capsys.readouterr().out
