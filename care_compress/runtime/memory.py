"""Peak memory of one file, measured in a process of its own that holds nothing else.

    python -m care_compress.runtime.memory model.onnx '{"threads": 1}'

Imports stand where they are needed: the process must hold the runtime and numpy and not torch, and
what is counted is the rise from loading the file on, above the runtime's own.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from care_compress.errors import TargetError
from care_compress.runtime.probe import import_openvino, read_command, run_alone

RUNS = 3  # a runtime may take more memory in its second run than in its first
LONGEST = 600.0  # seconds

Run = Callable[[], object]


def peak_memory(
    path: Path,
    *,
    size: tuple[int, int],
    threads: int = 1,
    precision: str = "f32",
    device: str = "CPU",
) -> int:
    """Bytes that loading and running a file takes at its peak, for one image at a time.

    A file of a larger fixed batch is run at that batch.
    """
    settings = {"size": size, "threads": threads, "precision": precision, "device": device}
    done = run_alone("care_compress.runtime.memory", path, settings, LONGEST)
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        raise TargetError(
            f"the memory of {path} could not be measured: {reason.strip()[:200]}.",
            "check that care-compress accuracy runs the file",
        )
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


def main() -> None:
    """What the child process does."""
    path, settings = read_command()
    load = {".onnx": _onnxruntime, ".xml": _openvino}.get(path.suffix, _torch)(path, settings)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = int(psutil.Process().memory_info().rss)
    except OSError:
        before = _peak()
    run = load()
    for _ in range(RUNS):
        run()
    print(json.dumps({"peak_memory_bytes": _peak() - before}))


def _onnxruntime(path: Path, settings: dict[str, Any]) -> Callable[[], Run]:
    import numpy as np
    import onnxruntime

    def load() -> Run:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = settings["threads"]
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        wanted = session.get_inputs()[0]
        batch = wanted.shape[0] if isinstance(wanted.shape[0], int) else 1
        is_bytes = wanted.type == "tensor(uint8)"
        feed = {wanted.name: _no_images(np, batch, settings["size"], is_bytes)}
        return lambda: session.run(None, feed)

    return load


def _openvino(path: Path, settings: dict[str, Any]) -> Callable[[], Run]:
    import numpy as np

    openvino = import_openvino()

    def load() -> Run:
        core = openvino.Core()
        wanted = {
            "INFERENCE_PRECISION_HINT": settings["precision"],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if settings["device"] == "CPU":
            wanted["INFERENCE_NUM_THREADS"] = settings["threads"]
        compiled = core.compile_model(core.read_model(path), settings["device"], wanted)
        size = compiled.inputs[0].partial_shape[0]
        batch = 1 if size.is_dynamic else size.get_length()
        is_bytes = compiled.inputs[0].get_element_type().to_string() == "u8"
        images = _no_images(np, batch, settings["size"], is_bytes)
        return lambda: compiled([images])

    return load


def _no_images(numpy: Any, batch: int, size: Sequence[int], is_bytes: bool) -> Any:
    """Zeros of the shape and type that a file takes."""
    if is_bytes:
        return numpy.zeros((batch, *size, 3), numpy.uint8)
    return numpy.zeros((batch, 3, *size), numpy.float32)


def _torch(path: Path, settings: dict[str, Any]) -> Callable[[], Run]:
    import torch

    from care_compress.runtime.artifact import open_predictor

    torch.set_num_threads(settings["threads"])

    def load() -> Run:
        predict = open_predictor(str(path), torch.device("cpu"))
        images = torch.zeros(1, 3, *settings["size"])
        return lambda: predict(images)

    return load


def _peak() -> int:
    """Most bytes this process has held."""
    # Not ru_maxrss on Linux: it keeps the peak of the process that started this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


if __name__ == "__main__":
    main()
