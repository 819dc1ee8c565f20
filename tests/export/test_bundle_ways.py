"""What a TensorRT bundle brings for other programs fits its model, as far as a CPU can tell.

DeepStream and Triton are held to the names that they document, the C++ program runs with a stand-in
TensorRT and has to prepare pictures as the evaluation does.
"""

import configparser
import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from qdq import CLASSES, SIDE, make_content, write_classifier

from care_compress.device.build import OPEN_BATCH
from care_compress.device.images import load_pixels, normalize_pixels
from care_compress.device.manifest import open_bundle
from care_compress.export.bundle import BundleContent, Model, unpack_bundle, write_bundle
from care_compress.export.bundle_ways import nearest_scale
from care_compress.files import sha256_file

NASTY = ("ant; or not", 'q"u\\o?" ??/', "two\nlines", "éclair\t☃", "${PATH} %s {{ x }} # */")
SHOWN = ("ant; or not", 'q"u\\o?" ??/', "two lines", "éclair ☃", "${PATH} %s {{ x }} # */")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STUB = Path(__file__).resolve().parent.parent / "support" / "tensorrt_stub"


def content_of(folder: Path, batch: int | str = 1, **other: Any) -> BundleContent:
    """Content with hostile names, of ONNX files with this batch."""
    folder.mkdir(exist_ok=True)
    content = make_content(folder)
    models = {
        name: Model((path,), sha256_file(path), 20.0)
        for name in ("int8", "fp16")
        for path in [write_classifier(folder / f"{name}.onnx", int8=name == "int8", batch=batch)]
    }
    changed: dict[str, Any] = {
        "run": "mine\\", "classes": NASTY, "mean": MEAN, "std": STD, "models": models,
        "input_shape": (batch, 3, SIDE, SIDE), "output_shape": (batch, CLASSES),
    }  # fmt: skip
    return dataclasses.replace(content, **(changed | other))


def bundle_of(content: BundleContent, folder: Path) -> Path:
    return unpack_bundle(write_bundle(content, folder / "b.tar.gz"), folder / "unpacked")


@pytest.fixture(scope="module", params=[1, 4, "batch"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return bundle_of(content_of(folder / "made", request.param), folder)


def shape_of(value: onnx.ValueInfoProto) -> list[int]:
    """The shape, with -1 for what is free."""
    return [size.dim_value or -1 for size in value.type.tensor_type.shape.dim]


def in_and_out(bundle: Path, model: str) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]:
    graph = onnx.load(bundle / f"{model}.onnx").graph
    (given,), (found,) = graph.input, graph.output
    return given, found


# ---- DeepStream ----------------------------------------------------------------------------------

# Of the table in NVIDIA's page on Gst-nvinfer: those that such a file could have.
NVINFER_KEYS = {
    "gie-unique-id", "process-mode", "network-type", "network-mode", "model-engine-file",
    "labelfile-path", "batch-size", "infer-dims", "output-blob-names", "model-color-format",
    "network-input-order", "net-scale-factor", "offsets", "maintain-aspect-ratio",
    "symmetric-padding", "classifier-threshold", "interval", "gpu-id", "output-tensor-meta",
    "scaling-filter", "scaling-compute-hw", "workspace-size", "classifier-type", "onnx-file",
}  # fmt: skip


def nvinfer(bundle: Path, model: str) -> configparser.SectionProxy:
    file = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=True)
    file.read(bundle / "examples/deepstream" / f"nvinfer_{model}.txt", encoding="utf-8")
    assert file.sections() == ["property"]
    return file["property"]


@pytest.mark.parametrize("model", ["int8", "fp16"])
def test_nvinfer_is_told_what_the_graph_takes(bundle: Path, model: str) -> None:
    told, (given, found) = nvinfer(bundle, model), in_and_out(bundle, model)
    assert set(told) <= NVINFER_KEYS and "onnx-file" not in told
    batch, *dims = shape_of(given)
    assert [int(size) for size in told["infer-dims"].split(";")] == dims
    assert int(told["batch-size"]) == (OPEN_BATCH[2] if batch < 0 else batch)
    assert told["output-blob-names"] == found.name
    assert told["network-mode"] == {"int8": "1", "fp16": "2"}[model]
    assert (told["network-type"], told["model-color-format"]) == ("1", "0")
    here = bundle / "examples/deepstream"
    assert (here / told["model-engine-file"]).resolve() == bundle.resolve() / f"{model}.engine"
    # It reads a line, splits it at each semicolon, and takes every further line as a classifier.
    (line,) = (here / told["labelfile-path"]).read_text(encoding="utf-8").splitlines()
    assert line.split(";") == [name.replace(";", ",") for name in SHOWN]
    assert "comma for each semicolon" in (bundle / "README.md").read_text()


def errors(told: configparser.SectionProxy, std: tuple[float, ...]) -> np.ndarray[Any, Any]:
    """What nvinfer's input differs from the model's, by channel and value of a pixel."""
    pixels = np.broadcast_to(np.arange(256, dtype=np.uint8), (1, 3, 1, 256))
    wanted = normalize_pixels(pixels, MEAN, std).astype(np.float64)
    offsets = np.array([float(value) for value in told["offsets"].split(";")]).reshape(3, 1, 1)
    return np.abs(float(told["net-scale-factor"]) * (pixels[0] - offsets) - wanted[0])


def test_nvinfer_normalizes_as_near_as_one_scale_can_and_says_how_near(bundle: Path) -> None:
    told = nvinfer(bundle, "int8")
    said = (bundle / "examples/deepstream/nvinfer_int8.txt").read_text().replace("\n# ", " ")
    stated = re.search(r"at most ([\d.]+) %, a value of the input by at most ([\d.]+) of", said)
    assert stated is not None
    assert errors(told, STD).max() == pytest.approx(float(stated[2]), abs=6e-5)
    scale = float(told["net-scale-factor"])
    contrast = max(abs(scale * 255 * std - 1) for std in STD)
    assert 100 * contrast == pytest.approx(float(stated[1]), abs=6e-3)
    for other in (0.999 * scale, 1.001 * scale):
        assert max(abs(other * 255 * std - 1) for std in STD) > contrast


def test_nvinfer_is_exact_for_one_std(tmp_path: Path) -> None:
    same = (0.25, 0.25, 0.25)
    bundle = bundle_of(content_of(tmp_path / "made", std=same), tmp_path)
    assert errors(nvinfer(bundle, "fp16"), same).max() < 1e-6
    assert "at most" not in (bundle / "examples/deepstream/nvinfer_fp16.txt").read_text()
    assert nearest_scale(same) == (1 / (255 * 0.25), 0)


# ---- Triton --------------------------------------------------------------------------------------

# Fields of Triton's ModelConfig and of the messages in it.
TRITON: dict[str, set[str]] = {
    "": {"name", "platform", "max_batch_size", "input", "output", "instance_group", "optimization",
         "dynamic_batching", "version_policy", "default_model_filename", "parameters"},
    "input": {"name", "data_type", "format", "dims", "reshape", "optional"},
    "output": {"name", "data_type", "dims", "reshape", "label_filename"},
    "instance_group": {"name", "kind", "count", "gpus", "profile", "passive"},
    "optimization": {"graph", "priority", "cuda", "input_pinned_memory", "output_pinned_memory"},
    "cuda": {"graphs", "busy_wait_events", "graph_spec", "output_copy_stream"},
    "dynamic_batching": {"preferred_batch_size", "max_queue_delay_microseconds"},
}  # fmt: skip
TOKEN = re.compile(r'\s+|#[^\n]*|"(?:[^"\\\n]|\\.)*"|[\w.+-]+|[\[\]{}:,]')


def pbtxt(text: str) -> dict[str, Any]:
    """A text of protocol buffers as far as such files use them; a list for what is repeated."""
    tokens, at = [], 0
    while at < len(text):
        found = TOKEN.match(text, at)
        assert found, text[at : at + 40]
        at = found.end()
        if not found[0].isspace() and not found[0].startswith("#"):
            tokens.append(found[0])
    whole = message(iter([*tokens, "}"]), "")
    return whole


def message(tokens: Iterator[str], of: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in tokens:
        if key == "}":
            return found
        assert key in TRITON[of], f"{of or 'ModelConfig'} has no {key}"
        assert key not in found
        token = next(tokens)
        if token == ":":
            token = next(tokens)
        if token == "{":
            found[key] = message(tokens, key)
        elif token == "[":
            found[key] = [
                message(tokens, key) if item == "{" else item
                for item in iter(lambda: next(tokens), "]")
                if item != ","
            ]
        else:
            found[key] = token
    raise AssertionError(f"{of} does not end")


@pytest.mark.parametrize("model", ["int8", "fp16"])
def test_triton_is_told_what_the_graph_takes(bundle: Path, model: str) -> None:
    folder = bundle / "examples/triton" / f"care_{model}"
    told = pbtxt((folder / "config.pbtxt").read_text(encoding="utf-8"))
    assert told["name"] == f'"{folder.name}"', "Triton refuses another name than the folder's"
    assert told["platform"] == '"tensorrt_plan"'
    most = int(told["max_batch_size"])
    for key, value in zip(("input", "output"), in_and_out(bundle, model), strict=True):
        (tensor,) = told[key]
        assert tensor["name"] == f'"{value.name}"'
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert tensor["data_type"] == "TYPE_FP32"
        dims, shape = [int(size) for size in tensor["dims"]], shape_of(value)
        if shape[0] < 0:  # Triton puts the batch in front where it may choose it
            assert most == OPEN_BATCH[2] and [-1, *dims] == shape and "dynamic_batching" in told
        else:
            assert most == 0 and dims == shape and "dynamic_batching" not in told
    (label_file,) = [told["output"][0]["label_filename"].strip('"')]
    assert (folder / label_file).read_text(encoding="utf-8").splitlines() == list(SHOWN)
    assert told["optimization"]["cuda"]["graphs"] == "true"
    assert told["instance_group"][0]["kind"] == "KIND_GPU"
    put = f"cp {model}.engine examples/triton/{folder.name}/1/model.plan"
    assert put in (folder / "config.pbtxt").read_text()


# ---- Docker and trtexec --------------------------------------------------------------------------


def test_the_image_holds_a_whole_bundle(bundle: Path, tmp_path: Path) -> None:
    text = (bundle / "examples/docker/Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line[:1] not in ("", "#")]
    words = [line.split() for line in lines]
    assert {line[0] for line in words} <= {
        "ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"
    }  # fmt: skip
    assert words[0][0] == "ARG" and words[1][1].startswith("nvcr.io/nvidia/l4t-tensorrt:")
    care = tmp_path / "care"
    care.mkdir()
    for _, *sources, into in [line for line in words if line[0] == "COPY"]:
        for source in sources:
            if (bundle / source).is_dir():  # Docker copies what is in a folder, not the folder
                shutil.copytree(bundle / source, care / into, dirs_exist_ok=True)
            else:
                shutil.copy(bundle / source, care / into)
    assert open_bundle(care, ("tensorrt",)).models == ("fp16", "int8")
    assert "JetPack 6" in text


@pytest.mark.parametrize(
    ("device", "words"),
    [("jetson-orin", "l4t-tensorrt"), ("jetson-thor", "JetPack 7"), ("gpu", "driver of 580")],
)
def test_every_device_has_its_image(tmp_path: Path, device: str, words: str) -> None:
    bundle = bundle_of(content_of(tmp_path / "made", device=device), tmp_path)
    assert words in (bundle / "examples/docker/Dockerfile").read_text()


def test_a_volume_is_of_one_bundle_alone(tmp_path: Path) -> None:
    tags = []
    for number, fingerprint in enumerate(("a" * 64, "b" * 64, "a" * 64)):
        folder = tmp_path / str(number)
        folder.mkdir()
        content = content_of(folder / "made", crop_pct=0.9 - 0.1 * (fingerprint[0] == "b"))
        if fingerprint[0] == "b":
            content = dataclasses.replace(content, labels=content.labels[::-1].copy())
        text = (bundle_of(content, folder) / "examples/docker/Dockerfile").read_text()
        tags.append(re.findall(r"-t (care-[0-9a-f]{12}) ", text)[0])
    assert tags[0] == tags[2] != tags[1]


def test_the_page_gives_trtexec_lines_for_every_model(bundle: Path) -> None:
    page = (bundle / "README.md").read_text().replace("\\\n", " ")
    lines = [line.split() for line in page.splitlines() if line.startswith("    trtexec ")]
    given, _ = in_and_out(bundle, "int8")
    batch, *dims = shape_of(given)
    for model in ("fp16", "int8"):
        built, timed = (line[1:] for line in lines if f"{model}.plan" in " ".join(line))
        assert f"--onnx={model}.onnx" in built and (bundle / f"{model}.onnx").is_file()
        assert {"--stronglyTyped", "--avgTiming=8", "--skipInference"} <= set(built)
        assert f"--loadEngine={model}.plan" in timed
        assert {"--useCudaGraph", "--useSpinWait", "--noDataTransfers"} <= set(timed)
        shapes = {
            f"--{which}Shapes={given.name}:{'x'.join(map(str, [count, *dims]))}"
            for which, count in zip(("min", "opt", "max"), OPEN_BATCH, strict=True)
        }
        assert (shapes <= set(built)) == (batch < 0)
        assert any("hapes=" in word for word in built + timed) == (batch < 0)


@pytest.mark.parametrize("requirement", ["tensorrt-rtx>=1.7,<2", "onnxruntime>=1.20"])
def test_who_runs_no_tensorrt_gets_none_of_it(tmp_path: Path, requirement: str) -> None:
    half = "rtx" in requirement
    made = make_content(tmp_path, half=half)
    content = dataclasses.replace(made, requirement=requirement, device="rtx" if half else "cpu")
    bundle = bundle_of(content, tmp_path)
    assert not (bundle / "examples").exists()
    assert "trtexec" not in (bundle / "README.md").read_text()


# ---- C++ -----------------------------------------------------------------------------------------


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def has_jpeg() -> bool:
    """Whether a program can be built with libjpeg here."""
    code = "#include <cstdio>\n#include <jpeglib.h>\nint main() { jpeg_error_mgr e; "
    command = [compiler(), "-x", "c++", "-", "-ljpeg", "-o", "/dev/null"]
    code += "return jpeg_std_error(&e) == nullptr; }"
    return subprocess.run(command, input=code, text=True, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    return bundle_of(content_of(folder / "made"), folder) / "examples/cpp"


@pytest.fixture(scope="module", params=["libjpeg", "no libjpeg"])
def classify(request: pytest.FixtureRequest, made: Path) -> Path:
    """The bundle's program with a stand-in TensorRT, where a value that is not looked at fails."""
    program = made.parent / request.param.replace(" ", "_")
    command = [compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{STUB}"]
    command += [str(made / "main.cpp"), str(STUB / "stub.cpp"), "-o", str(program)]
    if request.param == "libjpeg":
        if not has_jpeg():
            pytest.skip("no libjpeg")
        command += ["-DCARE_JPEG", "-ljpeg"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Binary PPMs, wide and tall, larger and smaller than what is looked at.

    None is twice as high as wide: Pillow 13 resizes the height of such a one first.
    """
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    found = []
    for number, size in enumerate([(61, 47), (40, 40), (21, 33), (12, 9), (17, 18)]):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        found.append(folder / f"{number}.ppm")
        Image.fromarray(pixels).save(found[-1])
    return found


def run(
    program: Path, folder: Path, engine: str, *arguments: object
) -> tuple[subprocess.CompletedProcess[str], bytes]:
    """What it said, and what reached the engine."""
    plan, inputs = folder / "e.engine", folder / "inputs"
    plan.write_text(engine)
    inputs.unlink(missing_ok=True)
    done = subprocess.run(
        [str(program), str(plan), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"STUB_INPUTS": str(inputs)},
        timeout=60,
    )
    return done, inputs.read_bytes() if inputs.exists() else b""


def wanted(pictures: list[Path]) -> np.ndarray[Any, Any]:
    return np.stack([load_pixels(path, SIDE, 0.9, False) for path in pictures])


@pytest.mark.parametrize(
    ("engine", "batch", "runs"),
    [("1 1", 1, 5), ("2 2", 2, 3), ("-1 3", 3, 2), ("-1 8", 5, 1)],
    ids=["one", "two", "free, at most 3", "free, at most 8"],
)
@pytest.mark.parametrize("graph", ["graph", "nograph"])
def test_the_program_prepares_pictures_as_the_evaluation_does(
    classify: Path, pictures: list[Path], tmp_path: Path, engine: str, batch: int, runs: int,
    graph: str,
) -> None:  # fmt: skip
    line = f"float nchw {engine} {SIDE} {CLASSES} {graph} image"
    done, given = run(classify, tmp_path, line, *pictures)
    assert done.returncode == 0, done.stderr
    floats = normalize_pixels(wanted(pictures), MEAN, STD)
    batches = np.frombuffer(given, np.float32).reshape(runs + 1, batch, 3, SIDE, SIDE)
    # The first run warms up. To the bit: the filter of the resize and every rounding are the same.
    assert np.array_equal(batches[1:].reshape(-1, 3, SIDE, SIDE)[: len(pictures)], floats)
    logits = floats.reshape(len(pictures), -1)[:, :CLASSES].astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = 100 / odds.sum(axis=1)
    for said, path, row, share in zip(
        done.stdout.splitlines(), pictures, logits, shares, strict=True
    ):
        assert said == f"{path}: {SHOWN[int(row.argmax())]} ({share:.1f}%)"
    assert ("no CUDA graph (the engine does not run" in done.stderr) == (graph == "nograph")
    assert "were not freed" not in done.stderr


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_an_engine_that_takes_bytes_gets_them_as_they_are(
    classify: Path, pictures: list[Path], tmp_path: Path, layout: str
) -> None:
    line = f"uint8 {layout} -1 8 {SIDE} {CLASSES} graph image"
    done, given = run(classify, tmp_path, line, *pictures)
    assert done.returncode == 0, done.stderr
    pixels = wanted(pictures)
    if layout == "nhwc":
        pixels = pixels.transpose(0, 2, 3, 1)
    assert given[len(given) // 2 :] == pixels.tobytes()


ENGINE = f"float nchw 1 1 {SIDE} {CLASSES} graph image"


def test_a_cameras_bytes_are_read_as_a_picture(
    classify: Path, pictures: list[Path], tmp_path: Path
) -> None:
    raw = tmp_path / "frame.rgb"
    raw.write_bytes(Image.open(pictures[0]).tobytes())
    done, given = run(classify, tmp_path, ENGINE, "--raw", "61x47", raw)
    assert done.returncode == 0, done.stderr
    floats = normalize_pixels(wanted(pictures[:1]), MEAN, STD)
    assert given[len(given) // 2 :] == floats.tobytes()


def test_a_jpeg_is_read_or_refused_by_name(classify: Path, tmp_path: Path) -> None:
    path, cut = tmp_path / "a.jpg", tmp_path / "cut.jpg"
    ramp = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    Image.fromarray(ramp).save(path, quality=95)
    done, given = run(classify, tmp_path, ENGINE, path)
    if classify.name != "libjpeg":
        assert done.returncode == 2 and "libjpeg-dev" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    floats = normalize_pixels(wanted([path]), MEAN, STD)
    there = np.frombuffer(given, np.float32).reshape(2, 3, SIDE, SIDE)[1]
    # Pillow may bring another libjpeg, which rounds a little differently.
    assert np.abs(there - floats[0]).max() < 3 / 255 / min(STD)
    cut.write_bytes(path.read_bytes()[:20])
    done, _ = run(classify, tmp_path, ENGINE, cut)
    assert done.returncode == 2 and str(cut) in done.stderr


@pytest.mark.parametrize(
    ("engine", "arguments", "words"),
    [
        (ENGINE, (), "usage:"),
        (ENGINE, ("--raw", "axb", "x"), "usage:"),
        (ENGINE, ("--raw", "4x4", "SHORT"), "has 3 bytes, not 48"),
        (ENGINE, ("SHORT",), "neither a JPEG nor a binary PPM"),
        (ENGINE, ("PPM",), "no binary PPM of 8 bits"),
        (ENGINE, ("/nowhere/a.ppm",), "cannot read /nowhere/a.ppm"),
        ("rubbish", ("SHORT",), "was not built by this TensorRT"),
        (ENGINE.replace("image", "other"), ("SHORT",), "of another model"),
        (ENGINE.replace(" 16 ", " 32 "), ("SHORT",), "another size"),
        (ENGINE.replace(" 5 ", " 6 "), ("SHORT",), "other classes"),
    ],
)
def test_what_the_program_cannot_do_it_says(
    classify: Path, tmp_path: Path, engine: str, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "SHORT").write_bytes(b"abc")
    (tmp_path / "PPM").write_bytes(b"P6 # wide\n4 4 65535\n" + bytes(96))
    named = [tmp_path / word if word in ("SHORT", "PPM") else word for word in arguments]
    done, _ = run(classify, tmp_path, engine, *named)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "were not freed" not in done.stderr


def test_the_header_knows_every_class(made: Path, tmp_path: Path) -> None:
    source = tmp_path / "names.cpp"
    source.write_text(
        '#include <cstdio>\n#include "model.h"\n'
        "int main() { for (auto name : model::kClasses) std::puts(name); }\n"
    )
    command = [compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{made}", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "names")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = subprocess.run([str(tmp_path / "names")], capture_output=True, check=True).stdout
    assert names.decode().splitlines() == list(SHOWN)


def test_cmake_builds_it_optimised_unless_told_otherwise(made: Path, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    library = tmp_path / "libnvinfer.so"
    build = [compiler(), "-shared", "-fPIC", "-std=c++17", f"-I{STUB}", str(STUB / "stub.cpp")]
    subprocess.run([*build, "-o", str(library)], check=True)
    (tmp_path / "FindCUDAToolkit.cmake").write_text(
        "set(CUDAToolkit_FOUND TRUE)\n"
        "add_library(CUDA::cudart INTERFACE IMPORTED)\n"
        f'target_include_directories(CUDA::cudart INTERFACE "{STUB}")\n'
    )
    configure = [
        cmake, "-S", str(made), "-B", str(tmp_path / "build"), f"-DCMAKE_MODULE_PATH={tmp_path}",
        f"-DTensorRT_INCLUDE_DIR={STUB}", f"-DTensorRT_LIBRARY={library}",
    ]  # fmt: skip
    done = subprocess.run(configure, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CMAKE_BUILD_TYPE:STRING=Release" in (tmp_path / "build/CMakeCache.txt").read_text()
    done = subprocess.run(
        [cmake, "--build", str(tmp_path / "build"), "--verbose"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"-O[23]\b", done.stdout) and (tmp_path / "build/classify").is_file()
    lone = tmp_path / "lone"
    shutil.copytree(made, lone, ignore=shutil.ignore_patterns("model.h"))
    configure[2], configure[4] = str(lone), str(tmp_path / "other")
    done = subprocess.run(configure, capture_output=True, text=True)
    assert done.returncode != 0 and "model.h is missing" in done.stderr
