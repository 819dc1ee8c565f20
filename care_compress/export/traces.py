"""Traced networks: what torch's exporter makes of one structure serves every network like it.

Tracing takes seconds and sees nothing but the structure. So a trace is kept without its numbers, in
this process and in the user's cache, for the next run, the next trial of a sweep, another process.
"""

import contextlib
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import onnx

from care_compress.files import cache_folder, fingerprint, replacing
from care_compress.machine import installed_versions
from care_compress.model.structure import Latest, Structure
from care_compress.run.stages import code_digest

MADE_BY = ("torch", "onnx", "onnxscript", "onnx-ir")
HELD = 16  # in memory: a recipe and its targets take up to five
KEPT = 64  # on disk, the latest; each is about a hundred kilobytes
DIGEST_BYTES = 32

_latest: Latest[onnx.ModelProto] = Latest(HELD)


def traced(structure: Structure, trace: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    """Return the graph of this structure; its initializers have types and shapes, no numbers."""
    return _latest.of(structure, lambda: _from_disk(structure, trace))


def _from_disk(structure: Structure, trace: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    """Take what an earlier process traced, or trace; a cache that fails costs time and no more."""
    said = repr(structure)
    parts = [part for part in structure if isinstance(part, tuple)]
    modules = {kind.__module__ for part in parts for kind in part if isinstance(kind, type)}
    ours = {name for name in modules if name.startswith("care_compress.")}
    others = {name for name in modules - ours if not name.startswith("torch.")}
    # Code that nobody watches may change; an object without a text is another in each process.
    if others or " at 0x" in said:
        return _bare(trace())
    code = code_digest("care_compress.export.to_onnx", *sorted(ours))
    made_by = [installed_versions(MADE_BY), code]
    path = cache_folder() / "traces" / f"{fingerprint([said, made_by])}.onnx"
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        digest, packed = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(packed).digest() == digest:
            with contextlib.suppress(OSError):  # a cache that others fill can still be read
                path.touch()
            return onnx.ModelProto.FromString(zlib.decompress(packed))
    made = _bare(trace())
    with contextlib.suppress(OSError):
        _keep(zlib.compress(made.SerializeToString()), path)
    return made


def _bare(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Leave the numbers out: whoever asks for the graph has others."""
    for tensor in graph.graph.initializer:
        tensor.ClearField("raw_data")
    return graph


def _keep(packed: bytes, path: Path) -> None:
    """Write a trace, and forget those that nobody has asked for the longest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(hashlib.sha256(packed).digest() + packed)
    kept = sorted(path.parent.glob("*.onnx"), key=_last_used, reverse=True)
    for old in kept[KEPT:]:
        old.unlink(missing_ok=True)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process forgot it first
        return 0.0
