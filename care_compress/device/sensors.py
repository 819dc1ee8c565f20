"""How warm and how fast a machine is at this moment, as Linux tells it below /sys and /proc.

Every reader takes the root directory, and gives nothing where a system does not say.
"""

import re
import subprocess
from pathlib import Path

_CPUS = "sys/devices/system/cpu"


def read_cpu_clock(root: Path) -> float | None:
    """The fastest core's clock in MHz; the kernel gives kHz."""
    folders = (root / _CPUS).glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = [clock for path in folders if (clock := read_hertz(path, 1e3)) is not None]
    if not clocks:  # a virtual machine may tell it nowhere else
        told = re.findall(r"(?m)^cpu MHz\s*:\s*([\d.]+)$", system_text(root / "proc/cpuinfo"))
        clocks = [round(float(text), 1) for text in told]
    return max(clocks, default=None)


def read_governor(root: Path) -> str | None:
    """How Linux sets the clocks of the cores: ``performance``, or ``powersave, schedutil``."""
    files = (root / _CPUS).glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({system_text(path).strip() for path in files} - {""})) or None


def read_load(root: Path) -> float | None:
    """How many programs wanted a core in the last minute, on average."""
    first = system_text(root / "proc/loadavg").partition(" ")[0]
    return float(first) if re.fullmatch(r"\d+(\.\d+)?", first) else None


def is_busy(load: float | None, cores: int) -> bool:
    """Whether other programs had so much of a machine that its timings say little."""
    return load is not None and load > cores / 2


def read_temperatures(root: Path) -> dict[str, float]:
    """Degrees Celsius of every thermal zone that answers; a switched-off block does not."""
    found = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = system_text(zone / "temp").strip()
        name = system_text(zone / "type").strip()
        if name and re.fullmatch(r"-?\d+", value):
            found[name] = int(value) / 1000
    return found


def read_hertz(path: Path, unit: float) -> float | None:
    """A clock's file, whose number is in hertz or kilohertz, in MHz."""
    text = system_text(path).strip()
    return round(int(text) / unit, 1) if text.isdigit() else None


def system_text(path: Path) -> str:
    """A system file's text; nothing where this system has none, or a sensor refuses."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def tool_output(*command: str) -> str:
    """What a tool of the system prints; nothing where there is no such tool."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
