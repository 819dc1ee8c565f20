"""What the board is and how it is set: a figure without its power mode says nothing.

Parsers take text or a root directory. The host's name, serial numbers and users are not read.
"""

import platform
import re
from pathlib import Path
from typing import Any

from care_compress.device.cuda import Cuda
from care_compress.device.library import Library
from care_compress.device.sensors import (
    read_cpu_clock,
    read_hertz,
    read_temperatures,
    system_text,
    tool_output,
)


def describe_board(root: Path, library: Library, cuda: Cuda) -> dict[str, Any]:
    """Everything about this machine that a measured figure depends on, and that does not move."""
    gpu = cuda.gpu()
    model = system_text(root / "proc/device-tree/model").strip("\0\n ")
    packages = system_text(root / "var/lib/dpkg/status")
    return {
        # A desktop is known by its GPU.
        "name": model or gpu.name,
        "gpu": {"name": gpu.name, "compute_capability": gpu.compute_capability},
        "library": library.name,
        "library_version": library.text,
        "cuda": cuda.versions(),
        "l4t": parse_l4t(system_text(root / "etc/nv_tegra_release")),
        "jetpack": parse_package(packages, "nvidia-jetpack"),
        "python": platform.python_version(),
        "architecture": platform.machine(),
    }


def read_conditions(root: Path) -> dict[str, Any]:
    """Power mode, clocks and temperatures of this moment."""
    return {
        "power_mode": parse_power_mode(tool_output("nvpmodel", "-q")),
        "gpu_mhz": read_gpu_clock(root),
        "cpu_mhz": read_cpu_clock(root),
        "temperatures_c": read_temperatures(root),
    }


def parse_l4t(text: str) -> str | None:
    """36.4.3 of ``# R36 (release), REVISION: 4.3, GCID: ...``."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def parse_package(status: str, package: str) -> str | None:
    """Upstream version of an installed Debian package, from dpkg's status file."""
    for stanza in status.split("\n\n"):
        if stanza.lstrip("\n").startswith(f"Package: {package}\n") and " ok installed" in stanza:
            version = re.search(r"^Version: ([\d.]+)", stanza, re.MULTILINE)
            return version[1] if version else None
    return None


def parse_power_mode(text: str) -> str | None:
    """MAXN of ``nvpmodel -q``, which prints ``NV Power Mode: MAXN`` and its number below."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found[1] if found else None


def read_gpu_clock(root: Path) -> float | None:
    """The GPU's clock in MHz; boards call the same device gpu, ga10b, gv11b or gpc0."""
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        if re.search(r"(^|\.)(gpu|ga10b|gv11b|gp10b|gpc)|gpu-gpc", folder.name):
            return read_hertz(folder / "cur_freq", 1e6)
    return None
