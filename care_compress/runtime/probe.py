"""Somebody else's graph, opened and run once in a process that may die of it.

    python -m care_compress.runtime.probe model.onnx '{"side": 224}'

ONNX Runtime and OpenVINO parse, optimise and run a graph in C++. What a file holds decides how much
memory that takes, how long it lasts, and whether it ends in a crash; none of this can be caught in
the process it happens in. A file that comes through here is then opened where it is needed.

Imports stand where they are needed: such a process must not load torch. `memory` starts its own in
the same way.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from care_compress.console import one_line, shortened
from care_compress.errors import TargetError

LONGEST = 120.0  # seconds; the largest CARE compiles and runs in a tenth of it
MOST_SIDE = 4096  # of an image, twice the largest resolution of a recipe
MOST_BATCH = 4096
USUAL_SIDE = 224  # where a file takes images of any size
# Beyond what is free the machine would swap, and end some other process.
SHARE_OF_MEMORY = 0.8
LEAST_MEMORY = 4 << 30  # of addresses; the libraries alone map about one
RUNTIMES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}


def probe(path: Path, side: int | None = None, longest: float = LONGEST) -> None:
    """Raise `TargetError`, which says what it did, unless a runtime opens and runs the file."""
    if path.suffix not in RUNTIMES:
        return
    runtime = RUNTIMES[path.suffix]
    memory = max(LEAST_MEMORY, int(psutil.virtual_memory().available * SHARE_OF_MEMORY))
    settings = {"side": side or USUAL_SIDE, "memory": memory}
    try:
        done = run_alone("care_compress.runtime.probe", path, settings, longest)
    except subprocess.TimeoutExpired:
        raise TargetError(
            f"{path} keeps {runtime} busy for more than {longest:.0f} seconds with one image.",
            "use another file",
        ) from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise TargetError(
            f"{path} makes {runtime} crash ({name}); it was opened in a process of its own.",
            "do not use this file; export it again if it is yours",
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise TargetError(
            f"{path} is no classifier that {runtime} can run: {shortened(one_line(lines[-1]))}.",
            "give a file with one (B, 3, H, W) input and one logits output, or export it again",
        )


def run_alone(
    module: str, path: Path, settings: Mapping[str, Any], longest: float
) -> "subprocess.CompletedProcess[str]":
    """Run a module of ours on a file in a process of its own, where `read_command` reads these.

    A failure's reason is the last line of its stderr.
    """
    # PYTHONPATH is ours already; the folder of the package need not be the current one.
    return subprocess.run(
        [sys.executable, "-m", module, str(path), json.dumps(settings)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=longest,
    )


def read_command() -> tuple[Path, dict[str, Any]]:
    """The file and the settings that `run_alone` gave this process."""
    return Path(sys.argv[1]), json.loads(sys.argv[2])


def import_openvino() -> Any:
    """The module, for a process that ends soon."""
    # It sends usage to a statistics server from its import on, unasked; without this it cannot.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


def main() -> None:
    """What the child process does."""
    path, settings = read_command()
    if sys.platform == "linux":  # elsewhere the limit counts what is only reserved, or is ignored
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory"], most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        (_onnxruntime if path.suffix == ".onnx" else _openvino)(path, settings["side"])
    except Exception as error:  # each runtime has classes of its own
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(1)


def _onnxruntime(path: Path, side: int) -> None:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    (image,), (_,) = session.get_inputs(), session.get_outputs()
    is_bytes = image.type == "tensor(uint8)"
    shape = _shape([n if isinstance(n, int) else None for n in image.shape], side, is_bytes)
    session.run(None, {image.name: np.zeros(shape, np.uint8 if is_bytes else np.float32)})


def _openvino(path: Path, side: int) -> None:
    import numpy as np

    core = import_openvino().Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    (image,), (_,) = compiled.inputs, compiled.outputs
    sizes: list[Any] = list(image.partial_shape)
    is_bytes = image.get_element_type().to_string() == "u8"
    shape = _shape([None if n.is_dynamic else int(n.get_length()) for n in sizes], side, is_bytes)
    compiled([np.zeros(shape, np.uint8 if is_bytes else np.float32)])


def _shape(sizes: list[int | None], side: int, is_bytes: bool) -> tuple[int, ...]:
    """One image's shape for an input, where it is one of an image."""
    if len(sizes) != 4:
        raise ValueError(f"its input has {len(sizes)} dimensions, not 4")
    usual = (1, side, side, 3) if is_bytes else (1, 3, side, side)
    shape = tuple(u if size is None else size for size, u in zip(sizes, usual, strict=True))
    check_shape((shape[0], shape[3], *shape[1:3]) if is_bytes else shape)
    return shape


def check_shape(shape: tuple[int, ...]) -> None:
    """`ValueError` for images that no network takes and no memory holds."""
    batch, channels, *sides = shape
    if channels != 3 or not 1 <= batch <= MOST_BATCH or not all(1 <= n <= MOST_SIDE for n in sides):
        raise ValueError(f"its input is {'x'.join(map(str, shape))}, no batch of images")


if __name__ == "__main__":
    main()
