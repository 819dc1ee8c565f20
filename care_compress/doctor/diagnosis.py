"""Decide, for each target and stage, whether a machine can do it and what it lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any, Literal, get_args

from packaging.requirements import Requirement

from care_compress import __version__
from care_compress.doctor.processor import int8_line, isa_remarks
from care_compress.doctor.runtimes import Tried
from care_compress.machine import Machine
from care_compress.target import Runtime, Target

Stage = Literal["export", "build", "run", "measure"]
STAGES: tuple[Stage, ...] = ("export", "build", "run", "measure")

# What this version of care-compress itself does. A stage that is written is added here.
IMPLEMENTED: frozenset[tuple[Runtime, Stage]] = frozenset(
    (runtime, stage) for runtime in get_args(Runtime) for stage in STAGES
)

# Every export starts as a Q/DQ ONNX file; OpenVINO's goes on to its own format.
EXPORT_PACKAGES = ("torch>=2.10", "torchao>=0.18", "onnx>=1.18", "onnxscript>=0.5")

_PIP = ".venv/bin/python -m pip install"
_INSTALL = {
    "openvino": f"{_PIP} -c constraints.txt -e '.[openvino]'",
    "tensorrt": f"{_PIP} -c constraints.txt -e '.[tensorrt]'",
    "tensorrt-rtx": f"{_PIP} -c constraints.txt -e '.[tensorrt-rtx]'",
    "torchao": f"{_PIP} -c constraints.txt 'torchao>=0.18'",
}
_INSTALL_BASE = f"{_PIP} -c constraints.txt -e ."
_INSTALL_JETPACK = "sudo apt install nvidia-jetpack"
_BOARDS = {"jetson-orin": "Orin", "jetson-thor": "Thor"}


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
    machine: Machine, targets: Sequence[Target], tried: Tried, environment: Mapping[str, str]
) -> Diagnosis:
    """Decide for each target what `machine` can do; variables may hide a part of it."""
    missing = {
        (target.name, stage): _missing(target, stage, machine, tried)
        for target in targets
        for stage in STAGES
    }
    remarks = isa_remarks(machine.cpu, environment)
    return Diagnosis(machine, tuple(targets), missing, int8_line(machine.cpu), remarks)


def _missing(target: Target, stage: Stage, machine: Machine, tried: Tried) -> tuple[Missing, ...]:
    own_packages = target.needs.packages
    if stage == "export":
        wanted = EXPORT_PACKAGES + (own_packages if target.runtime == "openvino" else ())
        return _missing_packages(wanted, machine, tried)
    platform = f"{machine.system} {machine.arch}"
    if target.needs.platforms and platform not in target.needs.platforms:
        names = " or ".join(target.needs.platforms)
        return (Missing(f"Its runtime exists for {names} only; this is {platform}."),)
    if target.device in _BOARDS:
        return _missing_on_jetson(target, machine)
    if stage == "build" and target.builds_without_device:
        return _missing_packages(own_packages, machine, tried)
    if target.runtime == "openvino":
        # Only OpenVINO itself can tell which devices it sees.
        return _missing_packages(own_packages, machine, tried) or _missing_openvino_device(
            target, tried
        )
    # Installing a package helps nobody whose hardware is another, so hardware comes first.
    return _missing_gpu(target, machine) or _missing_packages(own_packages, machine, tried)


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


def _missing_openvino_device(target: Target, tried: Tried) -> tuple[Missing, ...]:
    wanted = target.device.upper()
    if wanted in {device.partition(".")[0] for device in tried.openvino_devices}:
        return ()
    seen = ", ".join(tried.openvino_devices) or "nothing"
    return (
        Missing(f"OpenVINO sees no {wanted} here, only {seen}: it needs Intel's, with its driver."),
    )


def _missing_gpu(target: Target, machine: Machine) -> tuple[Missing, ...]:
    accepted = target.needs.compute_capabilities
    if not accepted:
        return ()
    for gpu in machine.gpus:
        if any(fnmatch(gpu.compute_capability or "", pattern) for pattern in accepted):
            return ()
    found = ", ".join(f"{gpu.name} ({gpu.compute_capability or 'unknown'})" for gpu in machine.gpus)
    return (
        Missing(
            f"Needs an NVIDIA GPU of compute capability {', '.join(accepted)}; "
            f"here is {found or 'none'}."
        ),
    )


def _missing_packages(
    requirements: Sequence[str], machine: Machine, tried: Tried
) -> tuple[Missing, ...]:
    found = (_missing_package(Requirement(text), machine, tried) for text in requirements)
    return tuple(missing for missing in found if missing is not None)


def _missing_package(wanted: Requirement, machine: Machine, tried: Tried) -> Missing | None:
    name = wanted.name
    installed = machine.libraries.get(name)
    command = _INSTALL.get(name, _INSTALL_BASE)
    if installed is None:
        return Missing(f"{name} is not installed.", command)
    if not wanted.specifier.contains(installed, prereleases=True):
        return Missing(f"{name} is {installed}, supported is {wanted.specifier}.", command)
    if name in tried.broken:
        release = installed.partition("+")[0]
        return Missing(
            f"{name} {installed} does not load: {tried.broken[name]}",
            f"{_PIP} --force-reinstall -c constraints.txt {name}=={release}",
        )
    return None


def diagnosis_as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain data."""
    targets: dict[str, Any] = {}
    for target in diagnosis.targets:
        targets[target.name] = {
            stage: {
                "machine_can": not diagnosis.missing[target.name, stage],
                "implemented": (target.runtime, stage) in IMPLEMENTED,
                "missing": [asdict(item) for item in diagnosis.missing[target.name, stage]],
            }
            for stage in STAGES
        }
    return {
        "care_compress": __version__,
        "machine": asdict(diagnosis.machine),
        "targets": targets,
        "int8": diagnosis.int8,
        "remarks": list(diagnosis.remarks),
    }
