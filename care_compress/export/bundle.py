"""The bundle a device receives: models, one script, samples with their expected answers, digests.

The same content gives the same bytes: no time, no user and no machine stands in the archive, so two
exports can be compared by their digests.
"""

import gzip
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from care_compress.data.samples import spread_indices
from care_compress.device.answers import ANSWERS, LEAST_AGREEMENT, Answers
from care_compress.device.cpu_session import LIBRARIES as CPU_LIBRARIES
from care_compress.device.manifest import (
    BUNDLE_FORMAT,
    BUNDLE_KIND,
    TASK_FORMAT,
    required_module,
    usual_models,
)
from care_compress.device.verbs import format_table, verify_header
from care_compress.export.bundle_ways import Deployed, page, ways
from care_compress.files import atomic_file
from care_compress.run.stages import reached_modules

_PACKAGE = "care_compress.device"

# Of answers as large as images.
LEAST_SAMPLES = 4
SAMPLES_BYTES = 32_000_000

Runtime = Literal["tensorrt", "cpu"]
# The module that ends each script, and what the script says of itself.
_LAST: dict[Runtime, str] = {"tensorrt": "app", "cpu": "cpu_app"}
_ABOUT: dict[Runtime, str] = {
    "tensorrt": """\
care_deploy.py: build, verify and measure the TensorRT engines of this bundle, on this device.

    python3 care_deploy.py build      make int8.engine and fp16.engine for this GPU
    python3 care_deploy.py verify     compare their answers with the exported ones
    python3 care_deploy.py bench      measure their latency and energy
    python3 care_deploy.py tune       try every variant and keep the fastest that is right
    python3 care_deploy.py infer cat.jpg
    python3 care_deploy.py info

It needs Python 3.10, numpy and TensorRT, which JetPack brings. `infer` needs Pillow as well.""",
    "cpu": """\
care_deploy.py: verify and measure the models of this bundle, on this processor.

    python3 care_deploy.py verify     compare their answers with the exported ones
    python3 care_deploy.py bench      measure their latency
    python3 care_deploy.py infer cat.jpg
    python3 care_deploy.py info

It needs Python 3.10, numpy and the runtime that manifest.json names. `infer` needs Pillow, too.""",
}
_NUMPY: dict[Runtime, str] = {
    "tensorrt": "sudo apt install python3-numpy",
    "cpu": "python3 -m pip install numpy",
}

_MAIN = '''"""{about}
Made from the modules of care_compress.device: change them, not this file.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("care_deploy.py needs Python 3.10 or later. Fix: python3.10 care_deploy.py ...")
try:
    import numpy
except ImportError:
    sys.exit("care_deploy.py needs numpy. Fix: {fix}")

from {module} import main

sys.exit(main())
'''


def device_script(runtime: Runtime) -> bytes:
    """care_deploy.py: a zip that Python runs, of the modules that one kind of runtime needs.

    The same modules give the same bytes: no time stands in it, and nothing is compressed.
    """
    module = f"{_PACKAGE}.{_LAST[runtime]}"
    main = _MAIN.format(about=_ABOUT[runtime], fix=_NUMPY[runtime], module=module)
    files = {"__main__.py": main, "care_compress/__init__.py": ""}
    files["care_compress/device/__init__.py"] = ""
    for name, path in reached_modules(module).items():
        files[f"{name.replace('.', '/')}.py"] = path.read_text(encoding="utf-8")
    packed = io.BytesIO(b"#!/usr/bin/env python3\n")
    packed.seek(0, io.SEEK_END)
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in sorted(files.items()):
            about = zipfile.ZipInfo(name)
            about.create_system = 3  # Unix, wherever this runs
            archive.writestr(about, text)
    return packed.getvalue()


_ENGINE_README = """\
# {run} for {target}

The model `{recipe}` ({classes} classes, {resolution}x{resolution}) as ONNX, in {models}, with one
script that builds TensorRT engines from it on this device, checks them and measures them. Engines
move neither between boards nor between TensorRT versions, so they are built here.

It needs Python 3.10 or later, numpy and `{requirement}`, all of which JetPack brings; no network
and no pip.

## One command, or three

    python3 care_deploy.py tune

builds every model at two levels of the builder's effort, verifies each engine, times those that
passed in turns, and keeps the fastest: an hour or so, once for a board. `int8-late` and the like
are the same model with its integers in other places; which of them is fastest only the board can
tell. Killed, `tune` goes on where it was. Without that choice:

    python3 care_deploy.py build
    python3 care_deploy.py verify
    python3 care_deploy.py bench

`build` takes some minutes for each engine and writes {engines}, each with a
`.json` that lists its layers and the precision of each.
{notes}
`verify` runs the {images} images of `samples/` and compares with the exported model:

    {table}

with figures for the dots, then `PASSED` or `FAILED`. {passes}{samples}
`bench` prints p50, p90 and p99 of the latency of every engine and says which is faster. For figures
that can be compared, fix the clocks before `build`, which chooses kernels by their time, and tell
the power mode with the figures:

    sudo nvpmodel -q
    sudo jetson_clocks

All of them write `results.json`. Take that file back to the machine that exported this bundle.

`python3 care_deploy.py infer IMAGE...` {infers} by the engine that passed and is
fastest (needs Pillow: `sudo apt install python3-pil`), and `info` says what this board is.

{ways}## What can go wrong

- `TensorRtMissingError`: `sudo apt install python3-libnvinfer`, and use `/usr/bin/python3` rather
  than a virtual environment.
- `NoGpuError`: another program may fill the GPU's memory; a container needs `--runtime nvidia`.
- `EngineMismatchError`: JetPack was upgraded, or the engine is another board's: `build` again.
- `BundleDamagedError`: a file changed on its way: copy and unpack the archive again.
- `BuildFailedError` that speaks of memory: close other programs, or `build --workspace 1024`.
- `FAILED`: take `results.json` back; until then use the engine that passed, if one did.

Exit codes: 0 done, 1 wrong answers, 2 could not be done. `--debug` after the verb
shows a traceback.
"""


_RTX_NOTE = """
On TensorRT for RTX use `fp16.engine`: it knows INT8 for the weights of matrix products alone, and
`int8.engine` moves more bytes than it saves.
"""


_CPU_README = """\
# {run} for {target}

The model `{recipe}` ({classes} classes, {resolution}x{resolution}) for `{requirement}`, in
{models}, with one script that checks the files on this processor and measures them. The files run
as they are, on x86_64 and on aarch64.

It needs Python 3.10 or later, numpy and the runtime:

    python3 -m pip install numpy '{requirement}'

## Two commands

    python3 care_deploy.py verify
    python3 care_deploy.py bench

`verify` runs the {images} images of `samples/` and compares with the exported model:

    {table}

with figures for the dots, then `PASSED` or `FAILED`. {passes}{samples}
`bench` lets the models take turns, {batch}, on one thread or on `--threads N`. It prints p50, p90
and p99 of the latency of each and says which is faster. For figures that can be compared, stop what
else runs and let the clocks stand still, where that is allowed:

    sudo cpupower frequency-set --governor performance

Both write `results.json`. Take that file back to the machine that exported this bundle.

`python3 care_deploy.py infer IMAGE...` {infers} (needs Pillow: `python3 -m pip
install pillow`), and `info` says what this processor is.
{notes}
## What can go wrong

- `RuntimeMissingError`: the runtime is not installed for this Python, or in another version.
- `ProcessorError`: a 32-bit system, or a file that needs what this processor lacks.
- `ModelError`: the runtime does not load a file: it may be a build with fewer operations.
- `WrongBundleError`: the script is of another bundle.
- `BundleDamagedError`: a file changed on its way: copy and unpack the archive again.
- `FAILED`: take `results.json` back; until then use the model that passed, if one did.

Exit codes: 0 done, 1 wrong answers, 2 could not be done. `--debug` after the verb
shows a traceback.
"""
_PASSES = """\
It passes if at least {agreement} % {of}, at an SQNR in dB of at least {sqnr_db}.
"""
_DENSE_NOTE = """\
Answers in `samples/` are float16, whose rounding lies 66 dB below them. Labels are not in it: what
the model loses against them was measured on far more images where it was exported.
"""
_OPENVINO_NOTE = """
In a program of your own give OpenVINO the setting that was verified: `INFERENCE_PRECISION_HINT` is
`bf16` where the processor has bfloat16, else `f32`. OpenVINO may take float16 on Arm, which cannot
hold what this network's attention computes.
"""


@dataclass(frozen=True)
class Model:
    """One model of a bundle: the paths of its files, the graph first."""

    files: tuple[Path, ...]
    sha256: str  # by which the run knows it
    least_sqnr_db: float  # that its answers on a device must reach
    needs: str = ""  # what a processor must have to run it rightly
    least_agreement: float = LEAST_AGREEMENT  # percent, as its task counts it


@dataclass(frozen=True)
class BundleContent:
    """Everything that goes into a bundle.

    Shapes: pixels (N, 3, H, W) uint8 as the evaluation prepares them, labels (N,), and logits,
    which are (N, K) of a classifier and (N, ...) of other tasks.
    """

    run: str
    recipe: str
    target: str
    device: str  # as in the target file
    fingerprint: str
    classes: tuple[str, ...]
    resolution: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_name: str
    input_shape: tuple[int | str, ...]
    output_name: str
    output_shape: tuple[int | str, ...]
    requirement: str  # as in the target file: "tensorrt>=10.3,<12"
    models: Mapping[str, Model]  # "int8" and "fp16", or "int8" and "fp32"
    pixels: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    logits: Mapping[str, np.ndarray[Any, Any]]
    exif_rotate: bool = False
    # uint8: pixels as they are, (B, H, W, 3), which the models normalize themselves.
    input_type: Literal["float32", "uint8"] = "float32"
    task: str = "classification"
    letterbox: bool = False

    @property
    def answers(self) -> Answers:
        """How its answers are compared and told."""
        return ANSWERS[self.task]

    @property
    def is_for_cpu(self) -> bool:
        """Whether the files run as they are, without engines."""
        return required_module(self.requirement) in CPU_LIBRARIES

    @property
    def deployed(self) -> Deployed | None:
        """What other programs have to know of it; nothing where they could not use it.

        DeepStream, Triton and trtexec are of TensorRT: they run neither TensorRT for RTX nor CPUs.
        """
        if required_module(self.requirement) != "tensorrt":
            return None
        names = {field.name for field in fields(Deployed)} - {"models", "has_programs"}
        known = {name: getattr(self, name) for name in names}
        programs = not self.answers.is_dense
        return Deployed(**known, models=tuple(sorted(self.models)), has_programs=programs)

    @property
    def fitting(self) -> "BundleContent":
        """The content with as few samples as keep it small, if answers are as large as images.

        64 images of 512 pixels with 150 classes would be 629 MB in float32, for each model.
        """
        if not self.answers.is_dense:
            return self
        count = len(self.pixels)
        each = self.pixels[0].nbytes + sum(2 * rows[0].size for rows in self.logits.values())
        chosen = spread_indices(count, max(LEAST_SAMPLES, SAMPLES_BYTES // each))
        logits = {name: rows[chosen] for name, rows in self.logits.items()}
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen], logits=logits)


def write_bundle(content: BundleContent, path: Path) -> Path:
    """Write the .tar.gz, whole or not at all."""
    count, side = len(content.pixels), content.resolution
    assert content.pixels.shape == (count, 3, side, side), content.pixels.shape
    assert content.pixels.dtype == np.uint8
    assert content.labels.shape == (count,)
    assert content.logits.keys() == content.models.keys()
    for logits in content.logits.values():
        assert logits.shape == (count, *content.output_shape[1:]), logits.shape
        assert np.isfinite(logits).all()
    files = _files(content)
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{content.run}-{content.target}").strip("-.")
    with atomic_file(path) as temporary, temporary.open("wb") as raw:
        # gzip's header would hold the file's name and the time.
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for name, data in sorted(files.items()):
                    # Time, owner and group of a TarInfo are 0 and empty already.
                    entry = tarfile.TarInfo(f"{folder}/{name}")
                    entry.size = len(data)
                    entry.mode = 0o755 if name.endswith(".py") else 0o644
                    archive.addfile(entry, io.BytesIO(data))
    return path


def unpack_bundle(archive: Path, folder: Path) -> Path:
    """Unpack a bundle below `folder` and return the bundle's own folder."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
        return folder / packed.getnames()[0].split("/")[0]


def _files(content: BundleContent) -> dict[str, bytes]:
    """The files of a bundle; the manifest holds the digests of all others."""
    paths = [path for model in content.models.values() for path in model.files]
    files = {path.name: path.read_bytes() for path in paths}
    files["care_deploy.py"] = device_script("cpu" if content.is_for_cpu else "tensorrt")
    files["README.md"] = _readme(content).encode()
    files["samples/pixels.npy"] = _npy(content.pixels)
    # Labels with a place are not carried, and answers with one are halved: see `_DENSE_NOTE`.
    if not content.answers.is_dense:
        files["samples/labels.npy"] = _npy(content.labels.astype(np.int64))
    stored = np.float16 if content.answers.is_dense else np.float32
    for model, logits in content.logits.items():
        files[f"samples/logits_{model}.npy"] = _npy(logits.astype(stored))
    if content.deployed is not None:
        files |= ways(content.deployed, files)
    # A classifier's says nothing of its task, as ever.
    of_task = {"task": content.task, "letterbox": content.letterbox}
    is_usual = content.task == "classification"
    manifest = {
        "format": BUNDLE_FORMAT if is_usual else TASK_FORMAT,
        "kind": BUNDLE_KIND,
        **({} if is_usual else of_task),
        "run": content.run,
        "recipe": content.recipe,
        "target": content.target,
        "fingerprint": content.fingerprint,
        "requirement": content.requirement,
        "classes": list(content.classes),
        "resolution": content.resolution,
        "crop_pct": content.crop_pct,
        "exif_rotate": content.exif_rotate,
        "mean": list(content.mean),
        "std": list(content.std),
        "input": {
            "name": content.input_name,
            "shape": list(content.input_shape),
            "type": content.input_type,
        },
        "output": {"name": content.output_name, "shape": list(content.output_shape)},
        "models": {
            name: {
                "file": model.files[0].name,
                "sha256": model.sha256,
                "needs": model.needs,
                "limits": {"agreement": model.least_agreement, "sqnr_db": model.least_sqnr_db},
            }
            for name, model in sorted(content.models.items())
        },
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    files["manifest.json"] = (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()
    return files


def _readme(content: BundleContent) -> str:
    answers, usual = content.answers, usual_models(content.models)
    rows = [verify_header(answers)]
    for model in usual:
        dots = ["..."] * (len(rows[0]) - 3)
        rows.append([model, str(len(content.pixels)), *dots, "passed"])
    models = {model: content.models[model] for model in usual}
    agreements = " and ".join(dict.fromkeys(str(one.least_agreement) for one in models.values()))
    ratios = " and ".join(f"{one.least_sqnr_db:.1f} ({name})" for name, one in models.items())
    batch = content.input_shape[0] if isinstance(content.input_shape[0], int) else 1
    notes = {"openvino": _OPENVINO_NOTE, "tensorrt_rtx": _RTX_NOTE}
    return (_CPU_README if content.is_for_cpu else _ENGINE_README).format(
        run=content.run,
        target=content.target,
        recipe=content.recipe,
        classes=len(content.classes),
        resolution=content.resolution,
        models=" and ".join(model.upper() for model in usual),
        engines=" and ".join(f"`{model}.engine`" for model in usual),
        requirement=content.requirement,
        images=len(content.pixels),
        table=format_table(rows).replace("\n", "\n    "),
        passes=_PASSES.format(agreement=agreements, of=answers.passes, sqnr_db=ratios),
        infers=answers.infers,
        samples=_DENSE_NOTE if answers.is_dense else "",
        batch="one image at a time" if batch == 1 else f"{batch} images at a time",
        notes=notes.get(required_module(content.requirement), ""),
        ways="" if content.deployed is None else page(content.deployed),
    )


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    # C order, or equal arrays could be written in two ways.
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
