"""Reading and writing float checkpoints: safely, strictly, and with errors that say what fits.

Pickles are always read with ``weights_only=True``; the few harmless non-tensor types found in
published training checkpoints are allowed by name, everything else is refused unexecuted.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import pickle  # nosec B403 # only for the name of its error
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from care_compress.errors import CheckpointError, UnsafeCheckpointError
from care_compress.files import atomic_file
from care_compress.model.boxes import BoxCare
from care_compress.model.care import ARCHITECTURES, Care, Widths, architecture
from care_compress.model.hub import fetch, is_hub
from care_compress.model.masks import MaskCare

BUILTIN_PREFIX = "builtin:"
WEIGHTS_DIR = Path(__file__).resolve().parent.parent / "weights"

# Where training scripts put the weights, best first: the averaged weights are the ones that a
# training checkpoint's published accuracy belongs to.
WEIGHT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
PICKLE_MAGIC = b"\x80"  # how every pickle since protocol 2 begins
# What DistributedDataParallel and torch.compile put in front of every name.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

# Plain data that argparse, pathlib and numpy leave in training checkpoints. None of these runs
# code when it is rebuilt.
HARMLESS_TYPES: list[Any] = [
    argparse.Namespace,
    *(getattr(pathlib, name) for name in ("PurePosixPath", "PosixPath", "PureWindowsPath")),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "u1", "?")},
    # numpy 1 and 2 pickle scalars under these two names for one function.
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]
# Narrower floats are quantized weights, whose scales a file may keep anywhere.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KINDS: tuple[type[Care], ...] = (Care, MaskCare, BoxCare)
QUANTIZED_HEADER = "care_compress_quantized"  # metadata key of files that are no float model


def load_checkpoint(path: str | Path, arch: str | None = None) -> Care:
    """A CARE in eval mode with the weights of `path`; arch, widths and class count are inferred.

    Reads ``.pth``, ``.pth.tar``, ``.pt`` and ``.safetensors``, bare or nested under the usual
    keys, ``builtin:NAME`` for weights that ship with the package, and
    ``hf-hub:owner/name[@revision]`` for those of a repository on the Hugging Face Hub.
    """
    where = resolve_checkpoint(path)
    state = read_state_dict(where)
    if arch is not None:
        architecture(arch)
    told = told_widths(where)
    found, kind = infer_arch(state, where, arch, told), kind_in(state)
    classes = int(state[kind.classes_in].shape[0])
    if classes < 1:
        raise CheckpointError(f"{where} has a head with no classes.")
    if is_hub(path):
        fetch(str(path)).check(found, classes)
    model = kind(found, classes, widths=widths_in(state, found, told))
    # Some exporters drop the step counters of BatchNorm, which do not affect inference.
    own = model.state_dict()
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    model.load_state_dict({**counters, **state}, strict=True)
    return model.eval()


def resolve_checkpoint(path: str | Path) -> Path:
    """The file behind a checkpoint argument; one of the Hub is downloaded if need be."""
    if is_hub(path):
        return fetch(str(path)).weights
    if not str(path).startswith(BUILTIN_PREFIX):
        # Not Path.expanduser, which raises for ~nobody.
        return Path(os.path.expanduser(path))
    name = str(path).removeprefix(BUILTIN_PREFIX)
    known = sorted(file.stem for file in WEIGHTS_DIR.glob("*.safetensors"))
    if name not in known:
        raise CheckpointError(
            f"there are no built-in weights {name!r}.", f"use one of: {', '.join(known) or 'none'}"
        )
    return WEIGHTS_DIR / f"{name}.safetensors"


def save_checkpoint(model: Care, path: Path, metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, with arch and class count beside `metadata` in the header."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    about: dict[str, object] = {
        "arch": model.arch,
        "num_classes": model.num_classes,
        **metadata,
    }
    if model.task != Care.task:
        about["task"] = model.task
    if model.is_slimmed:  # for readers of the header; loading goes by the shapes
        about["widths"] = asdict(model.widths)
    # One key, because safetensors writes several in random order: equal weights, equal bytes.
    content = save(tensors, metadata={"care_compress": json.dumps(about, sort_keys=True)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a file as finite float32 tensors under their published names."""
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise CheckpointError(f"{path} is not a file.", "check the path")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _find_weights(content, path)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > 2 * path.stat().st_size:
        # One stored number can be said to be a billion, which take gigabytes when looked at.
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes and claims {claimed:,} of weights.",
            "save them with torch.save(model.state_dict(), ...)",
        )
    return {name: _checked(tensor, name, path) for name, tensor in state.items()}


def _checked(tensor: Tensor, name: str, path: Path) -> Tensor:
    """A dense, finite, real weight as float32; step counters as they are."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    whole = tensor.dtype in (torch.int64, torch.int32)
    if name.endswith("num_batches_tracked") and dense and whole:
        return tensor
    if not dense or tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype} ({tensor.layout}), no float weight.",
            "give the float checkpoint, not one already quantized or pruned to a sparse layout",
        )
    tensor = tensor.float()
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            f"{path}: {name} holds {bad} NaN or infinite values of {tensor.numel()}.",
            "use a checkpoint from before training diverged",
        )
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise CheckpointError(f"{path}: {name} holds a negative variance.", "fetch it again")
    return tensor


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            quantized = QUANTIZED_HEADER in (file.metadata() or {})
        if quantized:
            raise CheckpointError(
                f"{path} is already quantized.", "start from the float checkpoint it was made of"
            )
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_pickle(path: Path) -> Any:
    """What torch saved, as far as rebuilding it runs no code."""
    # Torch stores what it saves unpacked; a file that unpacks to more was made by hand. A pickle
    # without a zip passes, and so does a damaged one, which torch will say.
    held, promised = path.stat().st_size, 0
    no_zip = (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, struct.error)
    with contextlib.suppress(*no_zip), zipfile.ZipFile(path) as archive:
        promised = sum(entry.file_size for entry in archive.infolist())
    if promised > 2 * held:
        raise CheckpointError(
            f"{path} has {held:,} bytes and unpacks to {promised:,}.",
            "save it again with torch.save, which does not pack",
        )
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS_TYPES):
            warnings.simplefilter("ignore")  # about pickle versions; what matters raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)|(?:class|function) (\S+)", str(error))
        if asked is not None:
            what = (asked[1] or asked[2]).rstrip(".,")
        elif path.read_bytes()[:1] == PICKLE_MAGIC:
            what = "an instruction that no saved tensor needs"
        else:
            # torch's own text recommends switching the safety off, so none of it is shown.
            reason = ValueError("it is no pickle that holds tensors")
            raise _unreadable(path, reason) from None
        raise UnsafeCheckpointError(
            f"{path} is a pickle that asks for {what}, which could run code; nothing was executed.",
            "save only the state dict: torch.save(model.state_dict(), ...), or use .safetensors",
        ) from None
    # A damaged archive surfaces as almost any of these, depending on where it is cut.
    except (
        RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
        AttributeError, AssertionError, OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(
        f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint: {reason}.",
        "it may be truncated or of another format; fetch it again and compare its size",
    )


def _find_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a file's content, under the names that the bare network has."""
    if isinstance(content, Mapping):
        for key in WEIGHT_KEYS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path} holds {type(content).__name__}, no state dict.",
            f"save the weights bare or under one of {', '.join(WEIGHT_KEYS)}",
        )
    odd = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(
            f"{path} holds no state dict: {odd[0]!r} is a {type(content[odd[0]]).__name__}.",
            f"save the weights bare or under one of {', '.join(WEIGHT_KEYS)}",
        )
    state = {str(name): value for name, value in content.items()}
    while True:
        prefix = next((p for p in WRAPPER_PREFIXES if all(n.startswith(p) for n in state)), None)
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def infer_arch(
    state: Mapping[str, Tensor],
    path: Path,
    wanted: str | None = None,
    told: Widths | None = None,
) -> str:
    """The size whose names and shapes these weights have; `wanted` must be that one."""
    differences = {arch: _differences(state, arch, told) for arch in ARCHITECTURES}
    nearest = min(differences, key=lambda arch: len(differences[arch]))
    if differences[nearest]:
        listed = "; ".join(differences[nearest][:4])
        raise CheckpointError(
            f"{path} fits no CARE; nearest is {nearest}, "
            f"with {len(differences[nearest])} differences: {listed}.",
            f"known sizes: {', '.join(ARCHITECTURES)}",
        )
    if wanted not in {None, nearest}:
        listed = "; ".join(differences[str(wanted)][:2])
        raise CheckpointError(
            f"{path} is a {nearest}, not a {wanted}: {listed}.",
            f"use arch={nearest}, or leave arch out",
        )
    return nearest


def told_widths(path: Path) -> Widths | None:
    """The widths that a file of ours says it has; None of a whole network, and of other files."""
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})["care_compress"])["widths"]
        return Widths(tuple(said["hidden1"]), tuple(said["hidden2"]))
    return None


def widths_in(state: Mapping[str, Tensor], arch: str, told: Widths | None) -> Widths:
    """The widths that these weights have as a network of this size.

    A slimmed network says them by its shapes alone, so any file of its weights will do. Only an
    interaction that is not there must be `told` by the file: it might have been lost.
    """
    published = Widths.published(arch)
    narrowed = []
    gone = () if told is None else (told.hidden1, told.hidden2)
    for number, full in ((1, published.hidden1), (2, published.hidden2)):
        found = []
        for index, (place, most) in enumerate(zip(block_names(arch), full, strict=True)):
            name = f"{place}.inter_layer.inter{number}_"
            fc1 = state.get(f"{name}fc1.weight")
            if fc1 is not None and fc1.dim() == 4 and 1 <= fc1.shape[0] <= most:
                found.append(int(fc1.shape[0]))
            else:
                out = bool(gone) and gone[number - 1][index : index + 1] == (0,)
                found.append(0 if out and not any(key.startswith(name) for key in state) else most)
        narrowed.append(tuple(found))
    if not narrowed[1][-1]:  # no network of ours: say what is missing
        return published
    return Widths(*narrowed)


def kind_in(state: Mapping[str, Tensor]) -> type[Care]:
    """The kind of network that has these weights: another task's is known by its head."""
    return next((kind for kind in KINDS if kind.classes_in in state), Care)


def kind_of(task: str) -> type[Care]:
    """The kind of network that answers a task."""
    return next(kind for kind in KINDS if kind.task == task)


def block_names(arch: str) -> list[str]:
    """The blocks of a size, in network order."""
    depths = architecture(arch).depths
    return [f"stages.{i}.blocks.{j}" for i, depth in enumerate(depths) for j in range(depth)]


def _differences(state: Mapping[str, Tensor], arch: str, told: Widths | None) -> list[str]:
    """What keeps these weights from loading as `arch`, one phrase per tensor."""
    kind = kind_in(state)
    head = state.get(kind.classes_in)
    classes = int(head.shape[0]) if head is not None and head.dim() > 1 else 1
    expected = _shapes(kind.task, arch, max(1, classes), widths_in(state, arch, told))
    phrases = []
    for name, shape in expected.items():
        if name not in state:
            if not name.endswith("num_batches_tracked"):
                phrases.append(f"{name} is missing")
        elif state[name].shape != shape:
            phrases.append(f"{name} is {_size(state[name].shape)} instead of {_size(shape)}")
    phrases.extend(f"{name} is unknown" for name in state if name not in expected)
    return phrases


@functools.lru_cache(maxsize=64)
def _shapes(task: str, arch: str, classes: int, widths: Widths) -> dict[str, torch.Size]:
    """The shapes of a size's tensors, by name."""
    with torch.device("meta"):
        model = kind_of(task)(arch, classes, widths=widths)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _size(shape: torch.Size) -> str:
    return "x".join(str(n) for n in shape) or "a scalar"


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Hex digest of named tensors: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
