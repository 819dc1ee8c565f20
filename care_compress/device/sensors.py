"""What a machine is and how warm and fast it is at this moment, as Linux tells it in its files.

Readers take the root directory and parsers take text; they give None where a system does not say.
"""

import re
import subprocess
from collections.abc import Collection
from pathlib import Path

CPUS = "sys/devices/system/cpu"
# From NVIDIA's archive of JetPack releases.
_JETPACK_OF_L4T = {
    "36.3": "6.0",
    "36.4": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "38.2": "7.0",
    "38.2.1": "7.0",
    "38.4": "7.1",
}


def read_cpu_clock(root: Path) -> float | None:
    """The fastest core's clock in MHz; the kernel gives kHz."""
    folders = (root / CPUS).glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = [clock for path in folders if (clock := read_hertz(path, 1e3)) is not None]
    if not clocks:  # a virtual machine may tell it nowhere else
        told = re.findall(r"(?m)^cpu MHz\s*:\s*([\d.]+)$", system_text(root / "proc/cpuinfo"))
        clocks = [round(float(text), 1) for text in told]
    return max(clocks, default=None)


def read_gpu_clock(root: Path) -> float | None:
    """The GPU's clock in MHz."""
    folder = _gpu_folder(root)
    return None if folder is None else read_hertz(folder / "cur_freq", 1e6)


def read_clock_lock(root: Path) -> bool | None:
    """Whether the GPU's clock stands still, as jetson_clocks leaves it: the least is the most."""
    folder = _gpu_folder(root)
    if folder is None:
        return None
    least, most = (read_hertz(folder / f"{end}_freq", 1e6) for end in ("min", "max"))
    return None if least is None or most is None else least == most


def _gpu_folder(root: Path) -> Path | None:
    """Where the GPU's clock is told; boards call the same device gpu, ga10b, gv11b or gpc0."""
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        if re.search(r"(^|\.)(gpu|ga10b|gv11b|gp10b|gpc)|gpu-gpc", folder.name):
            return folder
    return None


def scaling_governor(folder: Path, cores: Collection[int] | None = None) -> str | None:
    """How Linux sets the clocks of these or all cores: ``performance``, ``powersave, schedutil``.

    `folder` is `CPUS`; a virtual machine has no governor.
    """
    numbers: Collection[object] = ("[0-9]*",) if cores is None else cores
    files = [f for n in numbers for f in folder.glob(f"cpu{n}/cpufreq/scaling_governor")]
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


def read_throttles(root: Path) -> tuple[str, ...]:
    """Which of the kernel's throttles hold clocks down at this moment."""
    return tuple(
        sorted(
            name
            for device in (root / "sys/class/thermal").glob("cooling_device*")
            if "throttle" in (name := system_text(device / "type").strip())
            and system_text(device / "cur_state").strip() not in ("", "0")
        )
    )


def read_overcurrents(root: Path) -> int:
    """How often since its start a board was slowed down because it drew too much current."""
    files = root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt")
    texts = [system_text(path).strip() for path in files]
    return sum(int(text) for text in texts if text.isdigit())


def is_container(root: Path) -> bool:
    """Whether this is a container: nvpmodel and the board's packages are outside of it."""
    return (root / ".dockerenv").exists() or (root / "run/.containerenv").exists()


def jetpack_of(l4t: str) -> str | None:
    """The JetPack that brought a release of L4T, where no package tells; None for one unknown."""
    return _JETPACK_OF_L4T.get(l4t.removesuffix(".0"))


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


def read_board_name(root: Path) -> str:
    """What the maker of a board calls it; nothing on a desktop."""
    return system_text(root / "proc/device-tree/model").strip("\0\n ")


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
