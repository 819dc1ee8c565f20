"""``care-compress doctor``: what this machine can export, build, run and measure, what it lacks.

`diagnose` decides from a description of the machine alone, so it can be asked about any machine;
`try_runtimes` tries what is installed.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal, get_args

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from care_compress.console import Terminal
from care_compress.device.processor import dot_product_limit, isa_limit
from care_compress.machine import LIBRARIES, Cpu, Machine, read_machine
from care_compress.recipe.target import Runtime, Target, all_targets
from care_compress.shipped import PIP, VERSION, install_command

Stage = Literal["export", "build", "run", "measure"]
STAGES: tuple[Stage, ...] = ("export", "build", "run", "measure")

# What this version of care-compress itself does. A stage that is written is added here.
IMPLEMENTED: frozenset[tuple[Runtime, Stage]] = frozenset(
    (runtime, stage) for runtime in get_args(Runtime) for stage in STAGES
)

# Every export starts as a Q/DQ ONNX file; OpenVINO's goes on to its own format.
EXPORT_PACKAGES = ("torch>=2.10", "torchao>=0.18", "onnx>=1.18", "onnxscript>=0.5")

_EXTRAS = ("openvino", "tensorrt", "tensorrt-rtx")  # named after the package they bring
_INSTALL_JETPACK = "sudo apt install nvidia-jetpack"
_BOARDS = {"jetson-orin": "Orin", "jetson-thor": "Thor"}

# Libraries with compiled parts, which can be installed and still not load.
_TRIED = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
_SECONDS = 60

_NO_LIMIT = ("DEFAULT", "ALL")

_RIGHT = "files of CPU targets are right here (weights of 7 bits)"

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


def int8_line(cpu: Cpu) -> str:
    """What to expect of INT8 on this processor.

    Factors are those of CARE-S0 at 224, one image, one thread (docs/PERFORMANCE.md); where none was
    measured the line says so.
    """
    has = {name for name, present in cpu.features.items() if present}
    if cpu.dot_products is None:
        return (
            "INT8: what this processor has for it cannot be read. Files of CPU targets are right "
            "on every processor; what they gain here, only compare can tell."
        )
    if "asimddp" in cpu.features:
        if "asimddp" not in has:
            return f"INT8: no integer dot products: expect little gain (not measured); {_RIGHT}."
        also = " and matrix products (I8MM)" if "i8mm" in has else ""
        return f"INT8: integer dot products (SDOT){also}: INT8 should pay (not measured)."
    if "amx_int8" in has:
        rival = (
            "BF16, which has tiles too, is what it must beat" if "amx_bf16" in has else "no BF16"
        )
        return (
            f"INT8: matrix tiles and dot products (AMX): INT8 should pay (not measured); {rival}."
        )
    if cpu.dot_products:
        gain = (
            "about 2x of FP32 and 1.3x of BF16 in OpenVINO, 1.4x of FP32 in ONNX Runtime"
            if "avx512_bf16" in has
            else "in OpenVINO more than in ONNX Runtime (not measured without BF16)"
        )
        return f"INT8: integer dot products (VNNI): INT8 pays most here, {gain}."
    if "avx2" in has:
        return (
            f"INT8: no integer dot products: {_RIGHT}; expect about 1.5 to 1.7x of FP32 in "
            "OpenVINO, 1.1 to 1.3x in ONNX Runtime; full-range files are refused."
        )
    return f"INT8: neither dot products nor AVX2: expect no gain (not measured); {_RIGHT}."


def isa_remarks(cpu: Cpu, environment: Mapping[str, str]) -> tuple[str, ...]:
    """What a variable of the environment keeps OpenVINO from using."""
    name = isa_limit(environment)
    # They name instructions of x86; nothing else reads them.
    if name is None or environment[name].upper() in _NO_LIMIT or "asimddp" in cpu.features:
        return ()
    limit = environment[name]
    if dot_product_limit(environment) and cpu.dot_products:
        hidden = "hides the integer dot products of this processor from OpenVINO"
    else:
        hidden = "limits what OpenVINO uses of this processor"
    return (f"{name}={limit} {hidden}: its times here are not the processor's. Unset it.",)


@dataclass(frozen=True)
class RuntimeState:
    """What the installed runtimes answered when tried."""

    # Library -> why it does not load.
    broken: Mapping[str, str] = field(default_factory=dict)
    # e.g. ("CPU", "GPU.0", "NPU")
    openvino_devices: tuple[str, ...] = ()


def try_runtimes(machine: Machine) -> RuntimeState:
    """Load every installed runtime and ask OpenVINO for its devices.

    Each in a process of its own, where even a crash becomes a reason.
    """
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
    return RuntimeState(broken, tuple(devices.split()))


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


@dataclass(frozen=True)
class Missing:
    """One thing a stage lacks; `command` is empty where no command can provide it."""

    reason: str
    command: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """For each target and stage what is missing here; nothing missing means it can be done."""

    machine: Machine
    targets: tuple[Target, ...]
    missing: Mapping[tuple[str, Stage], tuple[Missing, ...]]
    int8: str  # what to expect of it on this processor
    remarks: tuple[str, ...]


def diagnose(
    machine: Machine, targets: Sequence[Target], tried: RuntimeState, environment: Mapping[str, str]
) -> Diagnosis:
    """Decide for each target what `machine` can do; variables may hide a part of it."""
    missing = {
        (target.name, stage): _missing(target, stage, machine, tried)
        for target in targets
        for stage in STAGES
    }
    remarks = isa_remarks(machine.cpu, environment)
    return Diagnosis(machine, tuple(targets), missing, int8_line(machine.cpu), remarks)


def _missing(
    target: Target, stage: Stage, machine: Machine, tried: RuntimeState
) -> tuple[Missing, ...]:
    own_packages = target.needs.packages
    if stage == "export":
        wanted = EXPORT_PACKAGES + (own_packages if target.runtime == "openvino" else ())
        return _missing_packages(wanted, machine, tried)
    platform = f"{machine.system} {machine.arch}"
    if target.needs.platforms and platform not in target.needs.platforms:
        names = " or ".join(target.needs.platforms)
        return (Missing(f"It is for {names} only; this is {platform}."),)
    if target.device in _BOARDS:
        return _missing_on_jetson(target, machine)
    packages = _missing_packages(own_packages, machine, tried)
    if stage == "build" and target.builds_without_device:
        return packages
    if target.runtime == "openvino":
        name = target.device.upper()
        # Only OpenVINO itself can tell which devices it sees.
        if packages or name in {device.partition(".")[0] for device in tried.openvino_devices}:
            return packages
        seen = ", ".join(tried.openvino_devices) or "nothing"
        reason = f"OpenVINO sees no {name} here, only {seen}: it needs Intel's, with its driver."
        return (Missing(reason),)
    accepted = target.needs.compute_capabilities
    fitting = any(
        fnmatch(gpu.compute_capability or "", one) for gpu in machine.gpus for one in accepted
    )
    if fitting or not accepted:
        return packages
    # Installing a package helps nobody whose hardware is another.
    found = ", ".join(f"{gpu.name} ({gpu.compute_capability or 'unknown'})" for gpu in machine.gpus)
    return (
        Missing(
            f"Needs an NVIDIA GPU of compute capability {', '.join(accepted)}; "
            f"here is {found or 'none'}."
        ),
    )


def _missing_on_jetson(target: Target, machine: Machine) -> tuple[Missing, ...]:
    board, jetson = _BOARDS[target.device], machine.jetson
    if jetson is None or board not in jetson.model:
        return (
            Missing(
                f"This is no Jetson {board}. An engine for {board} is built, run and measured on "
                f"the {board} itself: ship the bundle there."
            ),
        )
    wanted = Requirement(target.needs.packages[0])
    # JetPack's own Python builds the engine; a pip package in .venv serves as well.
    installed = jetson.tensorrt or machine.libraries.get(wanted.name)
    if installed is None:
        return (Missing("JetPack's TensorRT is not installed.", _INSTALL_JETPACK),)
    if not wanted.specifier.contains(installed):
        supported = f"supported is {wanted.specifier}: it comes with JetPack"
        return (Missing(f"TensorRT is {installed}, {supported}."),)
    return ()


def _missing_packages(
    requirements: Sequence[str], machine: Machine, tried: RuntimeState
) -> tuple[Missing, ...]:
    found = []
    for wanted in map(Requirement, requirements):
        name, installed = wanted.name, machine.libraries.get(wanted.name)
        command = install_command(name if name in _EXTRAS else "")
        if installed is None:
            found.append(Missing(f"{name} is not installed.", command))
        elif not wanted.specifier.contains(installed, prereleases=True):
            reason = f"{name} is {installed}, supported is {wanted.specifier}."
            found.append(Missing(reason, command))
        elif name in tried.broken:
            again = f"{name}=={installed.partition('+')[0]}"
            reason = f"{name} {installed} does not load: {tried.broken[name]}"
            found.append(Missing(reason, f"{PIP} --force-reinstall {again}"))
    return tuple(found)


def diagnosis_as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain data."""
    targets = {
        target.name: {
            stage: {
                "machine_can": not diagnosis.missing[target.name, stage],
                "implemented": (target.runtime, stage) in IMPLEMENTED,
                "missing": [asdict(item) for item in diagnosis.missing[target.name, stage]],
            }
            for stage in STAGES
        }
        for target in diagnosis.targets
    }
    return {
        "care_compress": VERSION,
        "machine": asdict(diagnosis.machine),
        "targets": targets,
        "int8": diagnosis.int8,
        "remarks": list(diagnosis.remarks),
    }


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print the diagnosis for people, in sections of lines."""
    machine, cpu, jetson = diagnosis.machine, diagnosis.machine.cpu, diagnosis.machine.jetson
    _heading(console, "Versions")
    versions = {"python": machine.python, **machine.libraries}
    _paragraph(console, ", ".join(f"{name}\xa0{version}" for name, version in versions.items()))
    absent = [name for name in LIBRARIES if name not in machine.libraries]
    if absent:
        _paragraph(console, f"not installed: {', '.join(absent)}")
    _heading(console, "Processor")
    _paragraph(
        console,
        f"{cpu.name} ({machine.system} {machine.arch}), {cpu.physical_cores} physical and "
        f"{cpu.logical_cores} logical cores usable, "
        f"{machine.memory_bytes / 2**30:.1f}\xa0GiB memory",
    )
    for name, present in cpu.features.items():
        mark = ("present", "green") if present else ("absent ", "yellow")
        _row(console, f"  {name:11}  ", mark, f"  {_FEATURE_WORDS[name]}")
    for remark in (diagnosis.int8, *diagnosis.remarks):
        _paragraph(console, remark)
    _heading(console, "NVIDIA GPU")
    if jetson is not None:
        _paragraph(
            console,
            f"{jetson.model}: JetPack {jetson.jetpack or 'unknown'}, L4T "
            f"{jetson.l4t or 'unknown'}, TensorRT {jetson.tensorrt or 'not installed'}",
        )
    for gpu in machine.gpus:
        memory = f"{gpu.memory_mib / 1024:.0f} GiB, " if gpu.memory_mib else ""
        _paragraph(
            console,
            f"{gpu.name}: {memory}compute capability {gpu.compute_capability or 'unknown'}, "
            f"driver {gpu.driver or 'unknown'}",
        )
    if jetson is None and not machine.gpus:
        _paragraph(console, "none found")
    _heading(console, "What can be done here")
    _render_table(diagnosis, console)
    _render_missing(diagnosis, console)


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
            f"* This machine can, care-compress {VERSION} does not yet: a later version will.",
        )


def _render_missing(diagnosis: Diagnosis, console: Console) -> None:
    """Each missing thing once, with the stages it blocks; commands unbroken, ready to copy."""
    blocked: dict[Missing, dict[str, list[str]]] = {}
    for (target, stage), items in diagnosis.missing.items():
        for item in items:
            blocked.setdefault(item, {}).setdefault(target, []).append(stage)
    reasons: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for item, stages_of in blocked.items():
        targets_of: dict[str, list[str]] = {}
        for target, stages in stages_of.items():
            targets_of.setdefault(", ".join(stages), []).append(target)
        # ``target, target: stage, stage``, a line for each set of stages.
        who = tuple(
            f"{'every target' if len(of) == len(diagnosis.targets) else ', '.join(of)}: {stages}"
            for stages, of in targets_of.items()
        )
        reasons.setdefault((who, item.command), []).append(item.reason)
    if reasons:
        _heading(console, "What each no needs")
    for (who, command), texts in reasons.items():
        for line in who:
            _paragraph(console, line)
        _paragraph(console, " ".join(texts), indent=4)
        if command:
            _row(console, (f"      {command}", "bold"))


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


def run_doctor(as_json: bool) -> None:
    """Examine this machine and print the answer."""
    machine = read_machine()
    diagnosis = diagnose(machine, all_targets(), try_runtimes(machine), os.environ)
    if as_json:
        print(json.dumps(diagnosis_as_dict(diagnosis), indent=2))
    else:
        render(diagnosis, Terminal(highlight=False))
