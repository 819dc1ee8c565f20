"""What this machine is: processor, memory, GPU and library versions, read without importing any.

A run's manifest stores it beside every figure, and `care_compress.runtime.doctor` decides from it
what can be done here. Parsers take text and return values; only `read_machine` looks at the real
machine.
"""

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from care_compress.device.processor import (
    DOT_FEATURES,
    architecture,
    core_name,
    cpuinfo_cores,
    dot_product_limit,
)
from care_compress.device.processor import usable_cores as usable_cores
from care_compress.device.sensors import (
    CPUS,
    parse_l4t,
    parse_package,
    read_board_name,
    scaling_governor,
    system_text,
    tool_output,
)
from care_compress.shipped import IN_CHECKOUT

X86_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
# Linux's names; asimddp is the NEON dot product.
ARM_FEATURES = ("asimddp", "i8mm", "bf16")
_MACOS_FEATURES = {"asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16"}

LIBRARIES = (
    "care-compress",
    "torch",
    "torchao",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx",
    "datasets",
    "webdataset",
    "safetensors",
)


@dataclass(frozen=True)
class Cpu:
    """The processor, as far as this process may use it."""

    name: str
    physical_cores: int
    logical_cores: int
    # Feature -> present, e.g. {"avx2": True, "avx512_vnni": False}; empty if it cannot be read.
    features: Mapping[str, bool]
    # How Linux sets their clocks: "performance", "powersave, schedutil"; None where nothing says.
    governor: str | None = None

    @property
    def kind(self) -> list[object]:
        """What results of one processor are known by, and not taken for another's.

        A name alone does not say what it executes: "AMD EPYC" is one with dot products, or one
        without.
        """
        return [self.name, dict(self.features)]

    @property
    def dot_products(self) -> bool | None:
        """Whether it adds products of 8-bit integers in 32 bits at once; None: nothing is known."""
        return any(map(self.features.get, DOT_FEATURES)) if self.features else None


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU; what its driver does not tell is None (a Jetson tells little)."""

    name: str
    memory_mib: int | None
    compute_capability: str | None
    driver: str | None


@dataclass(frozen=True)
class Jetson:
    """An NVIDIA Jetson and its system software."""

    model: str
    l4t: str | None
    jetpack: str | None
    # The TensorRT of JetPack's own Python, which a virtual environment does not see.
    tensorrt: str | None


@dataclass(frozen=True)
class Machine:
    """Everything about a machine that a figure or a decision depends on."""

    system: str
    os: str
    arch: str
    python: str
    cpu: Cpu
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    jetson: Jetson | None
    # Distribution -> version, installed ones only.
    libraries: Mapping[str, str]


def read_machine() -> Machine:
    """Look at the machine this process runs on."""
    own_group = system_text(Path("/proc/self/cgroup"))
    quota, memory_limit = cgroup_limits(Path("/sys/fs/cgroup"), own_group)
    memory = psutil.virtual_memory().total
    return Machine(
        system=platform.system(),
        os=platform.platform(),
        arch=architecture(),
        python=platform.python_version(),
        cpu=_read_cpu(quota),
        memory_bytes=memory if memory_limit is None else min(memory, memory_limit),
        gpus=parse_nvidia_smi(
            tool_output(
                "nvidia-smi",
                "--query-gpu=name,memory.total,compute_cap,driver_version",
                "--format=csv,noheader,nounits",
            )
        ),
        jetson=read_jetson(Path("/")),
        libraries=installed_versions(),
    )


def dot_products_in(runtime: str) -> bool | None:
    """Whether a CPU runtime has integer dot products here; None: nothing is known."""
    if runtime == "openvino" and dot_product_limit(os.environ) is not None:
        return False
    return _read_processor(usable_cores()).dot_products


def describe() -> dict[str, Any]:
    """The machine as plain data, for a manifest."""
    return asdict(read_machine())


def installed_versions(names: Collection[str] = LIBRARIES) -> dict[str, str]:
    """Versions of the installed ones of these libraries, from metadata; nothing is imported."""
    found = {}
    for name in names:
        # A damaged installation has a metadata folder and no version in it.
        with contextlib.suppress(metadata.PackageNotFoundError, KeyError):
            version: str | None = metadata.version(name)
            if version:
                found[name] = version
    return found


def parse_cpuinfo(text: str, usable: Collection[int]) -> Cpu:
    """The processor from Linux's /proc/cpuinfo, counting only the `usable` logical cores."""
    allowed = {str(core) for core in usable}
    cores = [core for core in cpuinfo_cores(text) if core.get("processor") in allowed]
    first = cores[0] if cores else {}
    # ARM numbers no physical cores, having one thread in each.
    physical = {(core.get("physical id"), core.get("core id", core["processor"])) for core in cores}
    named = {"flags": X86_FEATURES, "Features": ARM_FEATURES}
    return Cpu(
        name=core_name(first),
        physical_cores=len(physical) or len(usable),
        logical_cores=len(usable),
        features={
            name: name in first[key].split()
            for key, names in named.items()
            for name in names
            if key in first
        },
    )


def parse_sysctl(text: str, logical_cores: int) -> Cpu:
    """The processor from macOS's ``sysctl machdep.cpu.brand_string hw``."""
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    flags = {
        name: values.get(f"hw.optional.arm.{apple}") for name, apple in _MACOS_FEATURES.items()
    }
    return Cpu(
        name=values.get("machdep.cpu.brand_string", "unknown processor"),
        physical_cores=int(values.get("hw.physicalcpu", logical_cores)),
        logical_cores=logical_cores,
        # An Intel Mac has no ARM keys at all: nothing known, rather than nothing present.
        features={name: flag == "1" for name, flag in flags.items()} if any(flags.values()) else {},
    )


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """GPUs from ``nvidia-smi --query-gpu=name,memory.total,compute_cap,driver_version``."""
    # Its error messages go to the same stream; they do not have four fields.
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    return tuple(
        Gpu(
            name=name,
            memory_mib=int(memory) if memory.isdigit() else None,
            compute_capability=capability if re.fullmatch(r"\d+\.\d+", capability) else None,
            driver=driver if re.match(r"\d", driver) else None,
        )
        for name, memory, capability, driver in (row for row in rows if len(row) == 4)
    )


def read_jetson(root: Path) -> Jetson | None:
    """The Jetson whose file system is at `root`, or None if it is none."""
    model = read_board_name(root)
    if "NVIDIA" not in model:
        return None
    packages = system_text(root / "var/lib/dpkg/status")
    return Jetson(
        model=model,
        l4t=parse_l4t(system_text(root / "etc/nv_tegra_release")),
        jetpack=parse_package(packages, "nvidia-jetpack"),
        tensorrt=parse_package(packages, "python3-libnvinfer"),
    )


def cgroup_limits(root: Path, own: str) -> tuple[float | None, int | None]:
    """Cores and bytes that control groups leave to this process; None where nothing limits it.

    `own` is /proc/self/cgroup: ``0::/a/b`` (version 2) or a line for each controller (version 1).
    A limit may be set on any group from `root` down to ours, so the smallest counts.
    """
    folders: list[Path] = []
    for line in own.splitlines():
        _, controllers, group = line.split(":", 2)
        parts = Path(group).parts[1:]
        above = [parts[:depth] for depth in range(len(parts) + 1)]
        folders += [root.joinpath(tree, *at) for tree in controllers.split(",") for at in above]
    cores: list[float] = []
    memory: list[int] = []
    for folder in folders:
        quota, _, period = system_text(folder / "cpu.max").strip().partition(" ")
        if not quota:  # version 1
            quota = system_text(folder / "cpu.cfs_quota_us").strip()
            period = system_text(folder / "cpu.cfs_period_us").strip()
        # No limit reads "max" in version 2, -1 in version 1.
        if quota.isdigit() and period.isdigit():
            cores.append(int(quota) / int(period))
        limits = (system_text(folder / name) for name in ("memory.max", "memory.limit_in_bytes"))
        memory += [int(limit) for limit in limits if limit.strip().isdigit()]
    return min(cores, default=None), min(memory, default=None)


def load_average() -> float:
    """Processes that wanted a core in the last minute, ours too, on the whole machine."""
    return psutil.getloadavg()[0]


def _read_cpu(quota: float | None) -> Cpu:
    usable = usable_cores()
    governor = scaling_governor(Path("/") / CPUS, usable)
    cpu = replace(_read_processor(usable), governor=governor)
    if quota is None:
        return cpu
    allowed = max(1, int(quota))
    return replace(
        cpu,
        physical_cores=min(cpu.physical_cores, allowed),
        logical_cores=min(cpu.logical_cores, allowed),
    )


def _read_processor(usable: set[int]) -> Cpu:
    match platform.system():
        case "Linux":
            return parse_cpuinfo(system_text(Path("/proc/cpuinfo")), usable)
        case "Darwin":
            text = tool_output("sysctl", "machdep.cpu.brand_string", "hw")
            return parse_sysctl(text, len(usable))
        case _:
            physical = psutil.cpu_count(logical=False) or len(usable)
            return Cpu(platform.processor(), physical, len(usable), {})


def git_revision() -> str | None:
    """The checkout's commit, with ``+changes`` if the tree differs from it; None outside git."""
    if not IN_CHECKOUT:  # the package may lie in an environment in somebody else's repository
        return None
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head, changes = (
            subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")
