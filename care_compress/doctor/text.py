"""The diagnosis as people read it: plain lines that fit 80 columns, commands never broken."""

import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from care_compress import __version__
from care_compress.doctor.diagnosis import IMPLEMENTED, STAGES, Diagnosis, Missing
from care_compress.machine import LIBRARIES, Machine

# Below this, wrapping helps nobody.
_NARROWEST = 40

_FEATURE_WORDS = {
    "avx2": "the least INT8 needs",
    "avx512f": "512-bit vectors",
    "avx512_vnni": "INT8 dot products, 512 bits: what makes INT8 fast",
    "avx_vnni": "INT8 dot products, 256 bits: what makes INT8 fast",
    "avx512_bf16": "BF16 dot products: INT8 must beat BF16 here",
    "amx_int8": "INT8 matrix tiles: the fastest INT8 on x86",
    "amx_bf16": "BF16 matrix tiles: INT8 must beat BF16 here",
    "asimddp": "NEON INT8 dot products: what makes INT8 fast",
    "i8mm": "INT8 matrix products, twice the dot products' rate",
    "bf16": "BF16 arithmetic: INT8 must beat BF16 here",
}


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print the diagnosis for people, in sections of lines."""
    machine = diagnosis.machine
    _heading(console, "Versions")
    versions = {"python": machine.python, **machine.libraries}
    _paragraph(console, ", ".join(f"{name}\xa0{version}" for name, version in versions.items()))
    absent = [name for name in LIBRARIES if name not in machine.libraries]
    if absent:
        _paragraph(console, f"not installed: {', '.join(absent)}")
    _heading(console, "Processor")
    _render_processor(machine, console)
    for remark in (diagnosis.int8, *diagnosis.remarks):
        _paragraph(console, remark)
    _heading(console, "NVIDIA GPU")
    for line in _gpu_lines(machine) or ["none found"]:
        _paragraph(console, line)
    _heading(console, "What can be done here")
    _render_table(diagnosis, console)
    _render_missing(diagnosis, console)


def _render_processor(machine: Machine, console: Console) -> None:
    cpu = machine.cpu
    memory = f"{machine.memory_bytes / 2**30:.1f}\xa0GiB"
    _paragraph(
        console,
        f"{cpu.name} ({machine.system} {machine.arch}), {cpu.physical_cores} physical and "
        f"{cpu.logical_cores} logical cores usable, {memory} memory",
    )
    for name, present in cpu.features.items():
        mark = ("present", "green") if present else ("absent ", "yellow")
        _row(console, f"  {name:11}  ", mark, f"  {_FEATURE_WORDS[name]}")


def _gpu_lines(machine: Machine) -> list[str]:
    lines = []
    if machine.jetson:
        jetson = machine.jetson
        lines.append(
            f"{jetson.model}: JetPack {jetson.jetpack or 'unknown'}, L4T "
            f"{jetson.l4t or 'unknown'}, TensorRT {jetson.tensorrt or 'not installed'}"
        )
    for gpu in machine.gpus:
        memory = f"{gpu.memory_mib / 1024:.0f} GiB, " if gpu.memory_mib else ""
        lines.append(
            f"{gpu.name}: {memory}compute capability {gpu.compute_capability or 'unknown'}, "
            f"driver {gpu.driver or 'unknown'}"
        )
    return lines


def _render_table(diagnosis: Diagnosis, console: Console) -> None:
    width = max(len(target.name) for target in diagnosis.targets)
    _row(console, f"  {'target':{width}}", *(f"  {stage:7}" for stage in STAGES))
    for target in diagnosis.targets:
        marks = []
        for stage in STAGES:
            can = not diagnosis.missing[target.name, stage]
            star = "" if (target.runtime, stage) in IMPLEMENTED else "*"
            mark = f"yes{star}" if can else "no"
            marks.append((f"  {mark:7}", "green" if can else "red"))
        _row(console, f"  {target.name:{width}}", *marks)
    if len(IMPLEMENTED) < len({target.runtime for target in diagnosis.targets}) * len(STAGES):
        _paragraph(
            console,
            f"* This machine can, care-compress {__version__} does not yet: a later version will.",
        )


def _render_missing(diagnosis: Diagnosis, console: Console) -> None:
    """Each missing thing once, with the stages it blocks; commands unbroken, ready to copy."""
    blocked: dict[Missing, dict[str, list[str]]] = {}
    for (target, stage), items in diagnosis.missing.items():
        for item in items:
            blocked.setdefault(item, {}).setdefault(target, []).append(stage)
    reasons: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for item, stages_of in blocked.items():
        who = _who(stages_of, len(diagnosis.targets))
        reasons.setdefault((who, item.command), []).append(item.reason)
    if reasons:
        _heading(console, "What each no needs")
    for (who, command), texts in reasons.items():
        for line in who:
            _paragraph(console, line)
        _paragraph(console, " ".join(texts), indent=4)
        if command:
            _row(console, (f"      {command}", "bold"))


def _who(stages_of: Mapping[str, Sequence[str]], everyone: int) -> tuple[str, ...]:
    """``target, target: stage, stage``, a line for each set of stages."""
    targets_of: dict[str, list[str]] = {}
    for target, stages in stages_of.items():
        targets_of.setdefault(", ".join(stages), []).append(target)
    return tuple(
        f"{'every target' if len(targets) == everyone else ', '.join(targets)}: {stages}"
        for stages, targets in targets_of.items()
    )


def _heading(console: Console, text: str) -> None:
    console.print()
    _row(console, (text, "bold"))


def _paragraph(console: Console, text: str, indent: int = 2) -> None:
    margin = " " * indent
    lines = textwrap.fill(
        text,
        max(console.width, _NARROWEST),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
    _row(console, lines.replace("\xa0", " "))


def _row(console: Console, *cells: str | tuple[str, str]) -> None:
    """Print one line as it is: never wrapped, cut, or read as markup (reasons hold brackets)."""
    line = Text.assemble(*cells)
    line.rstrip()
    console.print(line, soft_wrap=True)
