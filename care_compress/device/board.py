"""What a board is, and how it is set: everything that a measured figure depends on."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_compress.device.cuda import Cuda
from care_compress.device.library import Library
from care_compress.device.sensors import (
    is_container,
    jetpack_of,
    parse_l4t,
    parse_package,
    parse_power_mode,
    read_board_name,
    read_clock_lock,
    system_text,
    tool_output,
)


def describe_board(root: Path, library: Library, cuda: Cuda) -> dict[str, Any]:
    """Everything about this machine that a measured figure depends on, and that does not move.

    The host's name, serial numbers and users are not read.
    """
    gpu = cuda.gpu()
    packages = system_text(root / "var/lib/dpkg/status")
    l4t = parse_l4t(system_text(root / "etc/nv_tegra_release"))
    installed = parse_package(packages, "nvidia-jetpack")
    by_table = None if l4t is None or installed is not None else jetpack_of(l4t)
    return {
        # A desktop is known by its GPU.
        "name": read_board_name(root) or gpu.name,
        "gpu": {"name": gpu.name, "compute_capability": gpu.compute_capability},
        "library": library.name,
        "library_version": library.text,
        "cuda": cuda.versions(),
        "l4t": l4t,
        "jetpack": installed or by_table,
        "jetpack_from": "package" if installed else "l4t" if by_table else None,
        "container": is_container(root),
        "python": platform.python_version(),
        "architecture": platform.machine(),
    }


@dataclass(frozen=True)
class BoardSetting:
    """How a board is set while it is measured."""

    power_mode: str | None
    power_mode_from: str | None  # "nvpmodel", or "hand": it was given with --power-mode
    clocks_locked: bool | None  # None: this system does not say
    container: bool

    @staticmethod
    def of(root: Path, told: str | None) -> "BoardSetting":
        """Read it; what the user tells counts before what nvpmodel says."""
        asked = None if told else parse_power_mode(tool_output("nvpmodel", "-q"))
        source = "hand" if told else "nvpmodel" if asked else None
        return BoardSetting(told or asked, source, read_clock_lock(root), is_container(root))

    def as_record(self) -> dict[str, Any]:
        """As it stands in results.json; the container stands with the board."""
        return {
            "power_mode": self.power_mode,
            "power_mode_from": self.power_mode_from,
            "clocks_locked": self.clocks_locked,
        }

    def warnings(self) -> list[str]:
        """Why figures that are measured so may be worth less than they look."""
        found = []
        if self.clocks_locked is False:
            found.append(
                "clocks are not locked: kernels were chosen and timed at clocks that move."
                " Fix: sudo jetson_clocks, then build and bench again"
            )
        if self.power_mode is None and self.container:
            found.append(
                "in a container nvpmodel cannot be asked for the power mode."
                " Fix: run 'nvpmodel -q' outside and give it with --power-mode"
            )
        return found
