"""Try the installed runtimes, each in its own process, where even a crash becomes a reason."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from care_compress.machine import Machine

# Libraries with compiled parts, which can be installed and still not load.
_TRIED = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
_SECONDS = 60


@dataclass(frozen=True)
class Tried:
    """What the installed runtimes answered when tried."""

    # Library -> why it does not load.
    broken: Mapping[str, str] = field(default_factory=dict)
    # e.g. ("CPU", "GPU.0", "NPU")
    openvino_devices: tuple[str, ...] = ()


def try_runtimes(machine: Machine) -> Tried:
    """Load every installed runtime and ask OpenVINO for its devices."""
    children = {}
    for library in _TRIED:
        if library not in machine.libraries:
            continue
        code = f"import {library.replace('-', '_')}"
        if library == "openvino":
            code += "; print(*openvino.Core().available_devices)"
        # -P: a file of the current directory must not be taken for the library.
        children[library] = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    broken, devices = {}, ""
    for library, child in children.items():
        output, reason = _answer(child)
        if reason:
            broken[library] = reason
        elif library == "openvino":
            # Whatever else the import prints comes before.
            devices = output.strip().rpartition("\n")[2]
    return Tried(broken, tuple(devices.split()))


def _answer(child: "subprocess.Popen[str]") -> tuple[str, str]:
    """A child's output, and why it failed (nothing if it did not)."""
    try:
        output, errors = child.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return "", f"no answer within {_SECONDS} seconds"
    if child.returncode == 0:
        return output, ""
    last = (errors.strip().splitlines() or ["it says nothing"])[-1]
    return output, f"killed by signal {-child.returncode}" if child.returncode < 0 else last
