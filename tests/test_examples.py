"""What users copy works, and prepares pictures as the evaluation does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quantized import SIZE, network

from care_compress.data.transforms import EvalTransform, normalize
from care_compress.export.result import About, Preprocessing
from care_compress.export.to_onnx import float_graph, write_onnx
from care_compress.export.to_openvino import write_ir
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import DOT_PRODUCTS
from care_compress.runtime.on_onnxruntime import OnnxPredictor

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DATA = DataSection(resolution=SIZE, crop_pct=0.8)
CLASSES = ("ant", "bee", "<cat>", "dog", "élan")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    about = About("r", "f", CLASSES, Preprocessing.of(DATA))
    write_onnx(float_graph(network(), SIZE, 1), about, path, None)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    made = []
    for number, size in enumerate([(61, 47), (40, 40), (45, 90), (32, 33)]):
        pixels = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(path)
        made.append(path)
    return made


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_example_answers_as_the_evaluation_does(
    runtime: str, model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    path = model
    if runtime == "openvino":
        path = tmp_path / "m.xml"
        write_ir(model, About("r", "f", CLASSES, Preprocessing.of(DATA)), path, half=False)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"classify_{runtime}.py"), str(path), *map(str, pictures)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    transform = EvalTransform(DATA.resolution, DATA.crop_pct)
    pixels = torch.stack([transform(Image.open(picture)) for picture in pictures])
    odds = OnnxPredictor(model)(normalize(pixels, DATA.mean, DATA.std)).softmax(dim=1)
    for line, picture, row in zip(done.stdout.splitlines(), pictures, odds, strict=True):
        said, _, share = line.removesuffix("%)").rpartition(" (")
        assert said == f"{picture}: {CLASSES[int(row.argmax())]}"
        # OpenVINO computes in bfloat16 where the processor has it.
        assert float(share) == pytest.approx(100 * float(row.max()), abs=0.5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_example_refuses_a_file_that_would_answer_wrong_here(
    runtime: str, pictures: list[Path], tmp_path: Path
) -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("examples read what a processor has from Linux's /proc/cpuinfo")
    about = About("r", "f", CLASSES, Preprocessing.of(DATA), needs=DOT_PRODUCTS)
    path = tmp_path / "int8-dotprod.onnx"
    write_onnx(float_graph(network(), SIZE, 1), about, path, None)
    if runtime == "openvino":
        write_ir(path, about, path.with_suffix(".xml"), half=False)
        path = path.with_suffix(".xml")
    text = (EXAMPLES / f"classify_{runtime}.py").read_text()
    assert '"/proc/cpuinfo"' in text
    for known, refused in (("avx2 avx512f", True), ("avx2 avx512_vnni", False)):
        (tmp_path / "cpuinfo").write_text(f"flags : {known}\n")
        script = tmp_path / "classify.py"
        script.write_text(text.replace("/proc/cpuinfo", str(tmp_path / "cpuinfo")))
        done = subprocess.run(
            [sys.executable, str(script), str(path), str(pictures[0])],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode != 0) == refused, done.stderr
        assert refused == (f"int8-dotprod{path.suffix} needs {DOT_PRODUCTS}" in done.stderr)


def test_examples_need_nothing_of_ours_and_stay_short() -> None:
    files = list(EXAMPLES.glob("*.py"))
    assert len(files) == 2
    for file in files:
        text = file.read_text()
        assert "import care_compress" not in text and "from care_compress" not in text
        assert len(text.splitlines()) <= 34
