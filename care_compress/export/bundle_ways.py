"""The ways into a program that a TensorRT bundle brings: C++, DeepStream, Triton, a container.

Each is written from a template in ``ways/`` with this model's names, shapes, classes and
preprocessing. The C++ program is the one of ``examples/tensorrt_cpp``, with a header of its own.

Nobody here can run DeepStream, Triton or a Jetson: the tests hold every file against what these
programs document and against the ONNX file, and the files say that they have not run.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from care_compress.console import one_line
from care_compress.device.build import OPEN_BATCH
from care_compress.device.manifest import usual_models
from care_compress.shipped import shipped

TEMPLATES = Path(__file__).resolve().parent / "ways"
CPP_PROGRAM = shipped("examples/tensorrt_cpp")
CPP_FILES = ("CMakeLists.txt", "main.cpp")
FOLDER = "examples"
_PLAIN = frozenset(map(chr, range(0x20, 0x7F))) - set('"\\?')  # ?: GCC warns of trigraphs


@dataclass(frozen=True)
class Image:
    """A container image that has TensorRT, and which devices it is for."""

    name: str
    tag: str
    said: str


# By the device of the target. JetPack 7 uses the images of servers, there is none for it alone.
IMAGES = {
    "jetson-orin": Image(
        "nvcr.io/nvidia/l4t-tensorrt",
        "r10.3.0-devel",
        "r10.3.0 is of JetPack 6.1 and 6.2 (TensorRT 10.3, CUDA 12.6).",
    ),
    "jetson-thor": Image(
        "nvcr.io/nvidia/tensorrt",
        "25.08-py3",
        "25.08 fits JetPack 7 (TensorRT 10.13, CUDA 13.0).",
    ),
    "gpu": Image(
        "nvcr.io/nvidia/tensorrt",
        "25.08-py3",
        "25.08 needs a driver of 580 or later (TensorRT 10.13, CUDA 13.0).",
    ),
}


@dataclass(frozen=True)
class Deployed:
    """What the templates have to know of a bundle; shapes as the ONNX file has them."""

    run: str
    target: str
    device: str  # as in the target file
    classes: tuple[str, ...]
    resolution: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_name: str
    input_shape: tuple[int | str, ...]
    output_name: str
    output_shape: tuple[int | str, ...]
    models: tuple[str, ...]
    input_type: Literal["float32", "uint8"] = "float32"
    has_programs: bool = True  # whether the C++ program and DeepStream know what its answers are

    @property
    def takes_bytes(self) -> bool:
        """Whether engines take pixels as they are, channels last."""
        return self.input_type == "uint8"

    @property
    def is_free(self) -> bool:
        """Whether an engine takes more than one number of images."""
        return not isinstance(self.input_shape[0], int)

    @property
    def most(self) -> int:
        """How many images an engine takes at once, as `build` makes it unasked."""
        batch = self.input_shape[0]
        return batch if isinstance(batch, int) else OPEN_BATCH[2]

    @property
    def image(self) -> Image:
        """The container image for its device."""
        return IMAGES[self.device]


def ways(about: Deployed, others: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files by their path in the bundle; `others` are its other files but the manifest."""
    labels = [one_line(name) for name in about.classes]
    texts = {"docker/Dockerfile": _dockerfile(about, others)}
    program = {}
    if about.has_programs:
        resize = math.floor(about.resolution / about.crop_pct)
        texts["cpp/model.h"] = _rendered("model.h.j2", about, labels=labels, resize=resize)
        program = {f"cpp/{name}": (CPP_PROGRAM / name).read_bytes() for name in CPP_FILES}
    if about.has_programs and not about.takes_bytes:  # nvinfer prepares planes of floats only
        # One line is one classifier, and DeepStream knows no escape.
        texts["deepstream/labels.txt"] = ";".join(name.replace(";", ",") for name in labels) + "\n"
        for model in about.models:
            texts[f"deepstream/nvinfer_{model}.txt"] = _nvinfer(about, model)
    for model in about.models:
        name = f"care_{model}"
        texts[f"triton/{name}/config.pbtxt"] = _triton(about, model, name)
        if about.has_programs:
            texts[f"triton/{name}/labels.txt"] = "".join(f"{label}\n" for label in labels)
    written = {path: text.encode() for path, text in texts.items()}
    return {f"{FOLDER}/{path}": data for path, data in (program | written).items()}


def page(about: Deployed) -> str:
    """The part of a bundle's page that says how else its engines are built, timed and used."""
    shapes = [
        f"{about.input_name}:{'x'.join(map(str, (batch, *about.input_shape[1:])))}"
        for batch in OPEN_BATCH
    ]
    quantized = (name for name in about.models if name in ("int8", "fp8"))
    first = next(quantized, about.models[0])
    replaced = any(";" in name for name in about.classes)
    usual = usual_models(about.models)
    return _rendered(
        "page.md.j2", about, usual=usual, shapes=shapes, first=first, replaced=replaced
    )


def nearest_scale(std: Sequence[float]) -> tuple[float, float]:
    """The one factor for all channels nearest to 1 / (255 std), and its relative error.

    The error of the channel with the least std is minus that of the channel with the largest one:
    any other factor makes one of both larger.
    """
    return 2 / (255 * (min(std) + max(std))), (max(std) - min(std)) / (max(std) + min(std))


def _nvinfer(about: Deployed, model: str) -> str:
    scale, scale_error = nearest_scale(about.std)
    given = [  # what nvinfer gives for black and white, what the model knows them as
        (scale * (pixel - 255 * mean), (pixel / 255 - mean) / std)
        for mean, std in zip(about.mean, about.std, strict=True)
        for pixel in (0, 255)
    ]
    return _rendered(
        "nvinfer.txt.j2",
        about,
        model=model,
        is_int8=model.startswith("int8"),
        scale=f"{scale:.9g}",
        offsets=[f"{255 * mean:.9g}" for mean in about.mean],
        scale_error=scale_error,
        largest_error=max(abs(there - here) for there, here in given),
        range=max(here for _, here in given) - min(here for _, here in given),
    )


def _triton(about: Deployed, model: str, name: str) -> str:
    # Triton puts the batch in front itself where it may choose it.
    start = 1 if about.is_free else 0
    return _rendered(
        "config.pbtxt.j2",
        about,
        model=model,
        name=name,
        input_dims=about.input_shape[start:],
        output_dims=about.output_shape[start:],
    )


def _dockerfile(about: Deployed, others: Mapping[str, bytes]) -> str:
    """It copies whatever the manifest lists, because the script checks all of it."""
    digest = hashlib.sha256()
    for path, data in sorted(others.items()):
        digest.update(path.encode() + data)
    paths = [*others, "manifest.json", f"{FOLDER}/docker/Dockerfile"]
    return _rendered(
        "Dockerfile.j2",
        about,
        tag=f"care-{digest.hexdigest()[:12]}",
        files=sorted(path for path in paths if "/" not in path),
        folders=sorted({path.split("/")[0] for path in paths if "/" in path}),
    )


def _rendered(template: str, about: Deployed, **values: Any) -> str:
    environment = Environment(  # nosec B701 # no markup; the filters below quote
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "comment": _comment,
        "cpp_string": cpp_string,
        "cpp_float": lambda value: f"{float(value)!r}F",
        "pbtxt_string": cpp_string,  # the text form of protocol buffers takes C's escapes
    }
    return environment.get_template(template).render(about=about, **values)


def cpp_string(text: str) -> str:
    """The text as UTF-8 in a literal of C++; anything but plain ASCII as three octal digits."""
    escaped = (
        letter if letter in _PLAIN else "".join(f"\\{byte:03o}" for byte in letter.encode())
        for letter in text
    )
    return f'"{"".join(escaped)}"'


def _comment(text: str) -> str:
    """The text on one line; a backslash at its end would make a comment of the next one, too."""
    return one_line(text).replace("\\", "/")
