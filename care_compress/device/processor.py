"""What the processor is, and whether it can run a file rightly.

Linux tells it in /proc/cpuinfo, macOS through sysctl. The host's name and serial numbers are not
read.
"""

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from care_compress.device.problems import ProcessorError
from care_compress.device.sensors import system_text, tool_output

ARCHITECTURES = ("x86_64", "aarch64")
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}
# What a file says it needs that is right only where four products are added without saturation.
DOT_PRODUCTS = "integer dot products"
# Any of them will do; asimddp is the NEON dot product.
DOT_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")
_OTHER_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "i8mm", "bf16")
# oneDNN inside OpenVINO takes no newer instructions than the first of these that is set names,
# whatever the processor has. ONNX Runtime reads neither.
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
LIMITS_WITHOUT_DOT_PRODUCTS = ("SSE41", "AVX", "AVX2", "AVX512_CORE")


def isa_limit(environment: "Mapping[str, str]") -> "str | None":
    """Return the variable that limits oneDNN: the first that is set."""
    return next((name for name in ISA_LIMITS if environment.get(name)), None)


def dot_product_limit(environment: "Mapping[str, str]") -> "str | None":
    """Return the variable that takes dot products away from OpenVINO, if one does."""
    name = isa_limit(environment)
    hidden = name is not None and environment[name].upper() in LIMITS_WITHOUT_DOT_PRODUCTS
    return name if hidden else None


# ARM cores name themselves by number only; these are the ones in the boards we speak of.
ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE",
    "0xd4f": "Neoverse-V2",
    "0xd83": "Neoverse-V3AE",
}


@dataclass(frozen=True)
class Processor:
    """The processor, as far as this process may use it."""

    name: str
    architecture: str
    cores: int
    features: "tuple[str, ...] | None"  # of those that matter; None: the system does not say

    @property
    def dot_products(self) -> bool | None:
        """Whether it adds products of bytes in 32 bits; None where the system does not say."""
        if self.features is None:
            return None
        return any(name in self.features for name in DOT_FEATURES)


def read_processor(root: Path) -> Processor:
    """Look at the machine this process runs on."""
    if sys.platform == "darwin":
        name = tool_output("sysctl", "-n", "machdep.cpu.brand_string").strip()
        name = name or "unknown processor"
        # An Intel Mac does not know the key.
        dots = tool_output("sysctl", "-n", "hw.optional.arm.FEAT_DotProd").strip()
        features = {"1": ("asimddp",), "0": ()}.get(dots)
    else:
        name, features = parse_cpuinfo(system_text(root / "proc/cpuinfo"))
    return Processor(name, architecture(), len(usable_cores()), features)


def architecture() -> str:
    """What Linux calls the kind of processor here."""
    machine = platform.machine().lower()
    return _ALIASES.get(machine, machine)


def usable_cores() -> set[int]:
    """The cores this process may run on; all of them where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpuinfo_cores(text: str) -> list[dict[str, str]]:
    """What /proc/cpuinfo says of each core."""
    return [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        for lines in (block.splitlines() for block in text.split("\n\n"))
    ]


def core_name(core: Mapping[str, str]) -> str:
    """The model; ARM cores have a number instead."""
    part = core.get("CPU part", "")
    return core.get("model name") or ARM_PARTS.get(part) or f"unknown processor {part}".strip()


def parse_cpuinfo(text: str) -> "tuple[str, tuple[str, ...] | None]":
    """Name and features of the first core of /proc/cpuinfo."""
    core = cpuinfo_cores(text)[0]
    listed = core.get("flags", core.get("Features"))
    if listed is None:
        return core_name(core), None
    present = listed.split()
    return core_name(core), tuple(f for f in (*DOT_FEATURES, *_OTHER_FEATURES) if f in present)


def check_processor(processor: Processor) -> None:
    """Raise `ProcessorError` unless the runtimes have 64-bit kernels for this architecture."""
    wide = sys.maxsize > 2**32
    if processor.architecture in ARCHITECTURES and wide:
        return
    here = processor.architecture if wide else f"a 32-bit Python on {processor.architecture}"
    raise ProcessorError(
        f"this bundle is for {' and '.join(ARCHITECTURES)}; here is {here}.",
        "use a 64-bit system with a 64-bit Python on such a processor",
    )
