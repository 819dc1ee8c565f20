"""The doctor on machines nobody here has, and its output on narrow paper."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from care_compress.machine import ARM_FEATURES, X86_FEATURES, Cpu, Gpu, Jetson, Machine
from care_compress.recipe.target import all_targets
from care_compress.runtime import doctor as diagnosis_module
from care_compress.runtime import doctor as runtimes
from care_compress.runtime import doctor as text_module
from care_compress.runtime.doctor import (
    STAGES,
    Diagnosis,
    RuntimeState,
    diagnose,
    diagnosis_as_dict,
    render,
    run_doctor,
    try_runtimes,
)

BASE = {
    "care-compress": "0.1.0",
    "torch": "2.13.0+cpu",
    "torchao": "0.18.0",
    "onnx": "1.23.2",
    "onnxscript": "0.7.2",
    "onnxruntime": "1.31.1",
}
WITH_OPENVINO = BASE | {"openvino": "2026.4.1"}


def x86(*features: str, libraries: dict[str, str] = WITH_OPENVINO, gpus: tuple[Gpu, ...] = ()):
    return Machine(
        system="Linux",
        os="Linux-6.8-x86_64",
        arch="x86_64",
        python="3.11.9",
        cpu=Cpu("Some x86", 4, 8, {name: name in features for name in X86_FEATURES}),
        memory_bytes=16 * 2**30,
        gpus=gpus,
        jetson=None,
        libraries=libraries,
    )


def arm(system: str, jetson: Jetson | None = None, libraries: dict[str, str] | None = None):
    cpu = Cpu("Some ARM", 8, 8, {name: name == "asimddp" for name in ARM_FEATURES})
    return Machine(system, system, "aarch64", "3.12.3", cpu, 8 * 2**30, (), jetson, libraries or {})


VNNI = x86("avx2", "avx512f", "avx512_vnni")
ORIN = Jetson(
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "36.4.3", "6.2", "10.3.0"
)
CPU_ONLY = RuntimeState(openvino_devices=("CPU",))


def examine(machine: Machine, tried: RuntimeState = CPU_ONLY) -> Diagnosis:
    return diagnose(machine, all_targets(), tried, {})


def able(diagnosis: Diagnosis, target: str) -> str:
    """Initials of the stages that can be done: "ebrm" for all four."""
    return "".join(stage[0] for stage in STAGES if not diagnosis.missing[target, stage])


def shown(diagnosis: Diagnosis, width: int = 80) -> str:
    paper = io.StringIO()
    render(diagnosis, Console(file=paper, width=width, highlight=False))
    return paper.getvalue()


def test_x86_without_vnni_can_measure():
    diagnosis = examine(x86("avx2"))
    assert able(diagnosis, "onnxruntime-cpu") == able(diagnosis, "openvino-cpu") == "ebrm"
    assert able(diagnosis, "openvino-gpu") == able(diagnosis, "tensorrt-gpu") == "e"
    assert able(diagnosis, "tensorrt-jetson-orin") == "e"
    assert diagnosis.remarks == ()


def test_one_line_says_what_a_processor_means_for_int8():
    plain = examine(x86("avx2")).int8
    assert "no integer dot products" in plain and "1.5 to 1.7x" in plain
    assert "right here (weights of 7 bits)" in plain and "full-range files are refused" in plain
    assert examine(x86("avx2", "avx512f")).int8 == plain, "AVX-512 before Cascade Lake"
    fast = examine(VNNI).int8
    assert (
        "(VNNI): INT8 pays most here" in fast and "not measured" in fast and "refused" not in fast
    )
    assert examine(x86("avx2", "avx_vnni")).int8 == fast
    both = examine(x86("avx2", "avx512f", "avx512_vnni", "avx512_bf16")).int8
    assert "(VNNI): INT8 pays most here, about 2x of FP32 and 1.3x of BF16" in both
    tiles = examine(x86("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")).int8
    assert "(AMX)" in tiles and "BF16, which has tiles too" in tiles and "not measured" in tiles
    assert "neither dot products nor AVX2" in examine(x86()).int8
    mac = arm("Darwin")
    assert "(SDOT): INT8 should pay" in examine(mac).int8 and "AVX" not in examine(mac).int8
    old = replace(mac, cpu=replace(mac.cpu, features=dict.fromkeys(ARM_FEATURES, False)))
    assert "no integer dot products: expect little" in examine(old).int8
    strong = replace(mac, cpu=replace(mac.cpu, features=dict.fromkeys(ARM_FEATURES, True)))
    assert "(I8MM)" in examine(strong).int8
    unknown = examine(replace(mac, cpu=replace(mac.cpu, features={})))
    assert "cannot be read" in unknown.int8 and "dot products" not in unknown.int8
    for machine in (x86("avx2"), VNNI, mac, old):
        diagnosis = examine(machine)
        assert diagnosis.int8 in " ".join(shown(diagnosis).split())
        assert diagnosis_as_dict(diagnosis)["int8"] == diagnosis.int8


@pytest.mark.parametrize(
    ("environment", "machine", "words"),
    [
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, VNNI, "ONEDNN_MAX_CPU_ISA=AVX2 hides the integer dot"),
        ({"DNNL_MAX_CPU_ISA": "avx512_core"}, VNNI, "DNNL_MAX_CPU_ISA=avx512_core hides"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "ALL"}, VNNI, "ONEDNN_MAX_CPU_ISA="),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, VNNI, "limits what OpenVINO uses"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, x86("avx2"), "limits what OpenVINO uses"),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, VNNI, None),
        ({"ONEDNN_MAX_CPU_ISA": ""}, VNNI, None),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, arm("Linux"), None),
    ],
)
def test_a_variable_that_hides_instructions_from_openvino_is_told(
    environment: dict[str, str], machine: Machine, words: str | None
):
    diagnosis = diagnose(machine, all_targets(), CPU_ONLY, environment)
    assert len(diagnosis.remarks) == (words is not None)
    if words is not None:
        assert diagnosis.remarks[0].startswith(words) or words in diagnosis.remarks[0]
        assert diagnosis.remarks[0] in " ".join(shown(diagnosis).split())


def test_x86_with_the_rtx_wheel_builds_without_a_gpu():
    machine = x86("avx2", libraries=WITH_OPENVINO | {"tensorrt-rtx": "1.7.1.116"})
    diagnosis = examine(machine)
    assert able(diagnosis, "tensorrt-rtx") == "eb"
    assert "NVIDIA GPU" in diagnosis.missing["tensorrt-rtx", "run"][0].reason
    gpu = Gpu("NVIDIA RTX 5090", 32607, "12.0", "580.65")
    assert able(examine(replace(machine, gpus=(gpu,))), "tensorrt-rtx") == "ebrm"
    mac = replace(machine, system="Darwin", arch="aarch64")
    assert able(examine(mac), "tensorrt-rtx") == "e"


def test_an_rtx_gpu_without_the_wheel_gets_its_command():
    diagnosis = examine(x86("avx2", gpus=(Gpu("NVIDIA RTX 4090", 24564, "8.9", "550"),)))
    [missing] = diagnosis.missing["tensorrt-rtx", "run"]
    assert missing.command == (
        ".venv/bin/python -m pip install -c constraints.txt -e '.[tensorrt-rtx]'"
    )
    [missing] = diagnosis.missing["tensorrt-gpu", "build"]
    assert missing.command == (
        ".venv/bin/python -m pip install -c constraints.txt -e '.[tensorrt]'"
    )


def test_an_orin_with_jetpack_builds_and_measures_for_itself_only():
    diagnosis = examine(arm("Linux", ORIN))
    assert able(diagnosis, "tensorrt-jetson-orin") == "brm"
    assert able(diagnosis, "tensorrt-jetson-thor") == ""
    assert able(diagnosis, "tensorrt-gpu") == ""
    assert diagnosis.remarks == ()


@pytest.mark.parametrize(
    ("version", "reason", "command"),
    [
        (None, "not installed", "sudo apt install nvidia-jetpack"),
        ("8.5.2", "TensorRT is 8.5.2", ""),
    ],
)
def test_an_orin_without_a_fitting_tensorrt(version: str | None, reason: str, command: str):
    diagnosis = examine(arm("Linux", replace(ORIN, tensorrt=version)))
    [missing] = diagnosis.missing["tensorrt-jetson-orin", "build"]
    assert reason in missing.reason
    assert missing.command == command


def test_a_mac_runs_the_cpu_targets_and_ships_the_rest():
    diagnosis = examine(arm("Darwin", libraries=WITH_OPENVINO))
    assert able(diagnosis, "onnxruntime-cpu") == able(diagnosis, "openvino-cpu") == "ebrm"
    assert able(diagnosis, "tensorrt-jetson-orin") == "e"
    assert "ship the bundle" in diagnosis.missing["tensorrt-jetson-orin", "build"][0].reason


def test_openvino_devices_count_only_if_its_plugin_sees_them():
    tried = RuntimeState(openvino_devices=("CPU", "GPU.0", "GPU.1"))
    diagnosis = examine(VNNI, tried)
    assert able(diagnosis, "openvino-gpu") == "ebrm"
    assert able(diagnosis, "openvino-npu") == "e"
    assert "CPU, GPU.0, GPU.1" in diagnosis.missing["openvino-npu", "run"][0].reason


def test_missing_packages_name_the_command():
    diagnosis = examine(x86("avx2", libraries={"onnxruntime": "1.20.0"}))
    [missing] = diagnosis.missing["openvino-cpu", "run"]
    assert missing.command.endswith("-c constraints.txt -e '.[openvino]'")
    [missing] = diagnosis.missing["onnxruntime-cpu", "run"]
    assert "1.20.0, supported is >=1.23" in missing.reason
    reasons = [missing.reason for missing in diagnosis.missing["onnxruntime-cpu", "export"]]
    assert reasons[0] == "torch is not installed."
    assert len(reasons) == 4


def test_a_broken_library_is_a_reason_not_a_crash():
    message = "ImportError: libcudart.so.13: [Errno 2] no such file"
    diagnosis = examine(VNNI, RuntimeState({"torch": message}, ("CPU",)))
    assert able(diagnosis, "openvino-cpu") == "brm"
    [missing] = diagnosis.missing["openvino-cpu", "export"]
    assert message in missing.reason
    assert missing.command.endswith("-c constraints.txt --force-reinstall torch==2.13.0")
    assert "[Errno 2]" in shown(diagnosis), "brackets must not be taken for markup"


def test_trying_reports_failure_noise_and_death(monkeypatch: pytest.MonkeyPatch):
    programs = {
        "torch": "raise ImportError('no libfoo')",
        "onnx": "import os; os.abort()",
        "openvino": "print('banner'); print('CPU NPU')",
    }
    children = iter(programs.values())
    popen = subprocess.Popen
    monkeypatch.setattr(
        runtimes.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, "-c", next(children)], **options),
    )
    tried = try_runtimes(x86(libraries=dict.fromkeys(programs, "1.0")))
    assert tried.broken == {"torch": "ImportError: no libfoo", "onnx": "killed by signal 6"}
    assert tried.openvino_devices == ("CPU", "NPU")


def test_trying_gives_up_on_a_hang(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtimes, "_SECONDS", 0.1)
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "no answer" in runtimes._answer(child)[1]
    assert child.returncode is not None


FAKES = {
    "x86": VNNI,
    "bare": x86("avx2", libraries={}),
    "orin": arm("Linux", ORIN),
    "mac": arm("Darwin", libraries=WITH_OPENVINO),
    "gpu": x86("avx2", gpus=(Gpu("NVIDIA H200", 143771, "9.0", "570.86"),)),
}


@pytest.mark.parametrize("machine", FAKES.values(), ids=FAKES.keys())
@pytest.mark.parametrize("width", [30, 80, 200])
def test_commands_are_whole_and_80_columns_suffice(machine: Machine, width: int):
    diagnosis = examine(machine)
    lines = shown(diagnosis, width).splitlines()
    for items in diagnosis.missing.values():
        for item in items:
            assert not item.command or f"      {item.command}" in lines
    if width == 80:
        assert [line for line in lines if len(line) > 80] == []
    assert [line for line in lines if line != line.rstrip()] == []
    assert "\x1b" not in "".join(lines)


def test_what_the_machine_can_is_told_from_what_the_product_does(
    monkeypatch: pytest.MonkeyPatch,
):
    def row() -> list[str]:
        lines = shown(examine(VNNI)).splitlines()
        return next(line.split() for line in lines if line.startswith("  openvino-cpu "))

    monkeypatch.setattr(text_module, "IMPLEMENTED", frozenset())
    assert row() == ["openvino-cpu", "yes*", "yes*", "yes*", "yes*"]
    assert "does not yet" in shown(examine(VNNI))
    monkeypatch.setattr(text_module, "IMPLEMENTED", frozenset({("openvino", "export")}))
    assert row() == ["openvino-cpu", "yes", "yes*", "yes*", "yes*"]
    everything = frozenset((target.runtime, stage) for target in all_targets() for stage in STAGES)
    monkeypatch.setattr(text_module, "IMPLEMENTED", everything)
    assert "*" not in row() and "does not yet" not in shown(examine(VNNI))


def test_json_says_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis_module, "IMPLEMENTED", frozenset({("openvino", "run")}))
    plain = json.loads(json.dumps(diagnosis_as_dict(examine(VNNI))))
    assert plain["machine"]["cpu"]["features"]["avx512_vnni"] is True
    target = plain["targets"]["openvino-cpu"]
    assert target["run"] == {"machine_can": True, "implemented": True, "missing": []}
    assert target["export"]["implemented"] is False
    assert plain["targets"]["tensorrt-gpu"]["run"]["missing"][0]["command"] == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_the_doctor_works_here_without_loading_anything(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("care_compress.runtime.doctor.try_runtimes", lambda machine: CPU_ONLY)
    run_doctor(as_json)
    printed = capsys.readouterr().out
    assert "onnxruntime-cpu" in printed
    if as_json:
        json.loads(printed)


def test_importing_the_doctor_loads_no_heavy_library():
    code = (
        "import sys, care_compress.runtime.doctor\n"
        "print([m for m in ('torch', 'numpy', 'onnx', 'openvino') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
