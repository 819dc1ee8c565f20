"""What users copy works, and prepares pictures as the evaluation does."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quantized import SIZE, network
from torch import nn

from care_compress.data.annotated_transforms import LetterboxTransform
from care_compress.data.letterbox import Letterbox
from care_compress.data.transforms import EvalTransform, normalize
from care_compress.device.boxes import find_boxes
from care_compress.export.result import About, Preprocessing
from care_compress.export.to_onnx import float_graph, write_onnx
from care_compress.export.to_openvino import write_ir
from care_compress.model.care import build_model
from care_compress.model.rewrite import rewrite
from care_compress.recipe.sections import DataSection, RewriteSection
from care_compress.recipe.target import DOT_PRODUCTS
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.tasks.known import TASKS
from care_compress.tasks.segmentation import mask_of

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
    longest = {"classify": 34, "segment": 50, "detect": 60}
    files = list(EXAMPLES.glob("*.py"))
    assert len(files) == 2 * len(longest)
    for file in files:
        text = file.read_text()
        assert "import care_compress" not in text and "from care_compress" not in text
        assert len(text.splitlines()) <= longest[file.stem.split("_")[0]]


DENSE_SIZE = 64


def dense_file(folder: Path, task: str, runtime: str) -> Path:
    """A network of a task with random weights, of answers that differ from place to place."""
    torch.manual_seed(0)
    model = build_model("care_nano", len(CLASSES), kind=TASKS[task].kind)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.weight.data.copy_(torch.exp(torch.randn(module.num_features) * 0.5))
    prepared = Preprocessing.of(DataSection(resolution=DENSE_SIZE), letterbox=True)
    about = About("r", "f", CLASSES, prepared, task=task)
    path = folder / "m.onnx"
    network = rewrite(model.eval(), RewriteSection())
    write_onnx(float_graph(network, DENSE_SIZE, 1), about, path, None)
    if runtime == "openvino":
        write_ir(path, about, path.with_suffix(".xml"), half=False)
    return path


def run_example(name: str, folder: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_places_are_those_of_the_evaluation(
    task: str, runtime: str, pictures: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    path = dense_file(tmp_path, task, runtime)
    suffix = ".xml" if runtime == "openvino" else ".onnx"
    verb, shown = ("segment", "mask") if task == "segmentation" else ("detect", "boxes")
    done = run_example(f"{verb}_{runtime}", tmp_path, path.with_suffix(suffix), *pictures)
    assert done.returncode == 0, done.stderr
    said: dict[str, dict[str, list[float]]] = {str(picture): {} for picture in pictures}
    for line in done.stdout.splitlines():
        picture, _, words = line.partition(": ")
        name, *numbers = re.split(r" (?=[(\d])", words)
        values = [float(one) for one in re.findall(r"[\d.]+", " ".join(numbers))]
        said[picture].setdefault(name, values)
    data, close = DataSection(resolution=DENSE_SIZE), 1.5  # bfloat16 where the processor has it
    transform, predict = LetterboxTransform(DENSE_SIZE), OnnxPredictor(path)
    for picture in pictures:
        with Image.open(picture) as image:
            size, pixels = image.size[::-1], transform(image)[None]
        (output,) = predict(normalize(pixels, data.mean, data.std))
        told = said[str(picture)]
        with Image.open(tmp_path / f"{picture.stem}-{shown}.png") as drawn:
            assert drawn.size == size[::-1]
        if task == "segmentation":
            mask = mask_of(output, size, DENSE_SIZE)
            assert sum(share for (share,) in told.values()) == pytest.approx(100, abs=0.5)
            for k, name in enumerate(CLASSES):
                share = 100 * float((mask == k).mean())
                assert told.get(name, [0.0])[0] == pytest.approx(share, abs=close)
        else:
            found = find_boxes(output.numpy(), Letterbox.of(size, DENSE_SIZE), 0.25)
            assert len(found), "or this tests nothing"
            assert {CLASSES[k] for k in found.classes} == told.keys()
            for name, (score, *corners) in told.items():
                first = int(np.flatnonzero(found.classes == CLASSES.index(name))[0])
                assert score == pytest.approx(found.scores[first], abs=0.02)
                assert corners == pytest.approx(found.corners[first].tolist(), abs=close)


@pytest.mark.parametrize("name", ["segment_onnxruntime", "detect_onnxruntime"])
def test_an_example_refuses_a_file_of_another_task(
    name: str, model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    done = run_example(name, tmp_path, model, pictures[0])
    assert done.returncode == 1 and "m.onnx is no " in done.stderr.splitlines()[-1]
