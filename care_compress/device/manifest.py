"""A bundle: one folder with graphs, samples, expected answers and the digests of all of them.

Models are called after their precision, ``int8``, and a variant of one with its name behind a dash.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from care_compress.device.problems import BundleDamagedError, WrongBundleError
from care_compress.device.storage import digest_file, read_json_object

BUNDLE_KIND = "care-deploy-bundle"
BUNDLE_FORMAT = 2  # 1 had one limit for all models; its own script reads it
# Of tasks other than classification: a script of format 2 would take any output for classes.
TASK_FORMAT = 3
FLOAT = "fp16"  # the model that INT8 has to beat in an engine
_FRESH = "unpack the archive again, or copy it again if that does not help"
# Key of manifest.json -> what it has to be.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "run": str,
    "recipe": str,
    "target": str,
    "fingerprint": str,
    "requirement": str,
    "classes": list,
    "resolution": int,
    "crop_pct": (int, float),
    "exif_rotate": bool,
    "mean": list,
    "std": list,
    "input": dict,
    "output": dict,
    "models": dict,
    "files": dict,
}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files are all as they were exported."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def models(self) -> tuple[str, ...]:
        """The models in it: int8 and fp16, or int8 and fp32, and variants such as int8-late."""
        return tuple(self.manifest["models"])

    @property
    def usual_models(self) -> tuple[str, ...]:
        """The models without the variants, which are for a device to choose among."""
        return usual_models(self.models)

    def file(self, model: str) -> Path:
        """A model's graph."""
        return self.folder / str(self.manifest["models"][model]["file"])

    def files(self, model: str) -> tuple[Path, ...]:
        """All files of a model; OpenVINO's weights lie beside its graph."""
        path = self.file(model)
        return (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)

    def sha256(self, model: str) -> str:
        """The digest by which the run knows a model; OpenVINO's two files have one together."""
        return str(self.manifest["models"][model]["sha256"])

    def limits(self, model: str) -> Mapping[str, float]:
        """How near a model has to come to its exported answers: percent of them, and dB."""
        limits: Mapping[str, float] = self.manifest["models"][model]["limits"]
        return limits

    def needs(self, model: str) -> str:
        """What a processor must have to run a model rightly; nothing for most."""
        return str(self.manifest["models"][model].get("needs") or "")

    @property
    def task(self) -> str:
        """What the outputs are; a bundle of a classifier does not say it."""
        return str(self.manifest.get("task", "classification"))

    @property
    def is_letterboxed(self) -> bool:
        """Whether whole images lie between bars in the input, and are not cropped to it."""
        return bool(self.manifest.get("letterbox", False))

    @property
    def input_shape(self) -> tuple[int | str, ...]:
        """Of the models' images; a name stands for a free batch."""
        shape = self.manifest["input"].get("shape")
        if not isinstance(shape, list) or not all(isinstance(size, (int, str)) for size in shape):
            raise BundleDamagedError("manifest.json has no usable shape of the input.", _FRESH)
        return tuple(shape)

    def engine(self, model: str) -> Path:
        """Where a model's engine is built."""
        return self.folder / f"{model}.engine"

    @property
    def results(self) -> Path:
        """What was verified and measured here."""
        return self.folder / "results.json"

    @property
    def timing_cache(self) -> Path:
        """What TensorRT measured of kernels; it makes the next build faster."""
        return self.folder / "timing.cache"

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """One of the sample arrays: pixels, logits_int8 and, of a classifier, labels."""
        path = self.folder / "samples" / f"{name}.npy"
        try:
            # A pickle in an array could run code; ours have none.
            return np.asarray(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise BundleDamagedError(f"{path} cannot be read ({error}).", _FRESH) from error


def open_bundle(folder: Path, libraries: Sequence[str]) -> Bundle:
    """Read manifest.json and check every file against it; it must be for one of the libraries."""
    path = folder / "manifest.json"
    manifest = read_json_object(path)
    if manifest is None:
        raise BundleDamagedError(
            f"{path} is missing or is no JSON.",
            "run this inside the unpacked bundle, or name its folder with --bundle",
        )
    known = manifest.get("format") in (BUNDLE_FORMAT, TASK_FORMAT)
    if manifest.get("kind") != BUNDLE_KIND or not known:
        raise BundleDamagedError(
            f"{path} is not a bundle this program knows.", "use the care_deploy.py beside it"
        )
    of_task = {"task": str, "letterbox": bool} if manifest["format"] == TASK_FORMAT else {}
    for key, wanted in (_KEYS | of_task).items():
        if not isinstance(manifest.get(key), wanted):
            raise BundleDamagedError(f"{path} has no usable {key!r}.", _FRESH)
    library = required_module(manifest["requirement"])
    if library not in libraries:
        raise WrongBundleError(
            f"this bundle is of target {manifest['target']}, whose files run in {library:.60}.",
            "use the care_deploy.py beside it",
        )
    for name, digest in manifest["files"].items():
        # A name that leads out of the folder would let a manifest vouch for, or read, any file.
        plain = not ("\\" in name or ":" in name or name.startswith("/"))
        if not plain or any(part in ("", ".", "..") for part in name.split("/")):
            raise BundleDamagedError(
                f"manifest.json names {name!r}, which is outside the bundle.", _FRESH
            )
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise BundleDamagedError(f"{name} is missing from the bundle.", _FRESH)
        if digest_file(file) != digest:
            raise BundleDamagedError(f"{name} is not the file that was exported.", _FRESH)
    for model, entry in manifest["models"].items():
        known = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not known or entry.get("file") not in manifest["files"]:
            raise BundleDamagedError(f"{path} lists no file for model {model!r}.", _FRESH)
        # An engine is written under it.
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", model):
            raise BundleDamagedError(f"{path} has a model named {model!r:.60}.", _FRESH)
        limits = entry.get("limits")
        usable = isinstance(limits, dict) and limits.keys() == {"agreement", "sqnr_db"}
        if not usable or not all(isinstance(limit, (int, float)) for limit in limits.values()):
            raise BundleDamagedError(f"{path} has no usable limits of model {model!r}.", _FRESH)
    return Bundle(folder, manifest)


def usual_models(models: Iterable[str]) -> tuple[str, ...]:
    """Those that are no variant of another one: what is built unless others are asked for."""
    return tuple(sorted(model for model in models if model == precision_of(model)))


def precision_of(model: str) -> str:
    """int8 of ``int8`` and of ``int8-late``."""
    return model.partition("-")[0]


def version_numbers(text: str) -> tuple[int, ...]:
    """(10, 3, 0, 30) of ``10.3.0.30`` and of ``10.3.0.30.post1``."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def satisfies(version: tuple[int, ...], requirement: str) -> bool:
    """Whether a version meets ``tensorrt>=10.3,<12``; a board may have no pip to ask."""
    for operator, wanted in re.findall(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", requirement):
        limit = version_numbers(wanted)
        # 10.3.0.30 counts as 10.3 here, as it does for pip with ==10.3.*.
        short = version[: len(limit)]
        met = {
            ">=": short >= limit,
            "<=": short <= limit,
            "==": short == limit,
            "!=": short != limit,
            ">": short > limit,
            "<": short < limit,
        }
        if not met[operator]:
            return False
    return True


def required_module(requirement: str) -> str:
    """The module that ``tensorrt>=10.3`` or ``tensorrt-rtx>=1.7`` names."""
    return re.split(r"[<>=!~\s\[]", requirement.strip(), maxsplit=1)[0].replace("-", "_")
