"""Machines are recognised from recorded texts; the real one is only read, never assumed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from care_compress import machine
from care_compress.machine import (
    Gpu,
    Jetson,
    cgroup_limits,
    parse_cpuinfo,
    parse_nvidia_smi,
    parse_sysctl,
    read_jetson,
)


def x86_core(processor: int, core: int, flags: str, model: str) -> str:
    return (
        f"processor\t: {processor}\nvendor_id\t: GenuineIntel\nmodel name\t: {model}\n"
        f"physical id\t: 0\nsiblings\t: 4\ncore id\t\t: {core}\ncpu cores\t: 2\n"
        f"flags\t\t: fpu vme sse2 {flags}\nbugs\t\t: spectre_v1\n"
    )


SERVER_FLAGS = "avx2 avx512f avx512_bf16 avx_vnni avx512_vnni amx_bf16 amx_tile amx_int8"
# Two cores with two threads each, numbered as Linux does: 0 and 2 share core 0.
SERVER = "\n".join(x86_core(p, p % 2, SERVER_FLAGS, "Intel(R) Xeon(R) 8480+") for p in range(4))
HASWELL = x86_core(0, 0, "avx avx2 fma bmi2", "Intel(R) Core(TM) i7-4770")

ORIN = """\
processor\t: 0
model name\t: ARMv8 Processor rev 1 (v8l)
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat
CPU implementer\t: 0x41
CPU part\t: 0xd42

processor\t: 1
model name\t: ARMv8 Processor rev 1 (v8l)
Features\t: fp asimd evtstrm aes atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat
CPU part\t: 0xd42
"""
GRAVITON3 = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimddp sve i8mm bf16 dgh rng
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
APPLE = """\
machdep.cpu.brand_string: Apple M2
hw.physicalcpu: 8
hw.logicalcpu: 8
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_BF16: 0
"""


def test_a_server_processor_counts_cores_once_and_lists_what_is_absent_too():
    cpu = parse_cpuinfo(SERVER, usable={0, 1, 2, 3})
    assert cpu.name == "Intel(R) Xeon(R) 8480+"
    assert (cpu.physical_cores, cpu.logical_cores) == (2, 4)
    assert set(cpu.features) == set(machine.X86_FEATURES)
    assert all(cpu.features.values())


def test_only_the_usable_cores_count():
    cpu = parse_cpuinfo(SERVER, usable={0, 2})
    assert (cpu.physical_cores, cpu.logical_cores) == (1, 2)


def test_features_are_whole_words():
    features = parse_cpuinfo(HASWELL, usable={0}).features
    assert features["avx2"]
    # "avx" is there, "avx_vnni" and "avx512f" are not.
    assert [name for name, present in features.items() if present] == ["avx2"]


def test_arm_processors():
    orin = parse_cpuinfo(ORIN, usable={0, 1})
    assert orin.features == {"asimddp": True, "i8mm": False, "bf16": False}
    assert (orin.physical_cores, orin.logical_cores) == (2, 2)
    graviton = parse_cpuinfo(GRAVITON3, usable={0})
    assert graviton.name == "Neoverse-V1"
    assert all(graviton.features.values())


def test_an_unreadable_processor_claims_nothing():
    cpu = parse_cpuinfo("", usable={0, 1})
    assert cpu.features == {}
    assert (cpu.physical_cores, cpu.logical_cores) == (2, 2)


def test_apple_and_intel_macs():
    apple = parse_sysctl(APPLE, logical_cores=8)
    assert (apple.name, apple.physical_cores) == ("Apple M2", 8)
    assert apple.features == {"asimddp": True, "i8mm": True, "bf16": False}
    assert parse_sysctl("machdep.cpu.brand_string: Intel(R) Core(TM) i7\n", 4).features == {}


def test_nvidia_smi_rows_and_refusals():
    text = "NVIDIA H200, 143771, 9.0, 570.86.15\nOrin (nvgpu), [N/A], [N/A], 540.4.0\n"
    assert parse_nvidia_smi(text) == (
        Gpu("NVIDIA H200", 143771, "9.0", "570.86.15"),
        Gpu("Orin (nvgpu)", None, None, "540.4.0"),
    )
    assert parse_nvidia_smi("") == ()
    assert parse_nvidia_smi("No devices were found\n") == ()


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_a_jetson_is_read_from_its_file_system(tmp_path: Path):
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    release = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    write(tmp_path, "etc/nv_tegra_release", release)
    packages = (
        "Package: nvidia-jetpack-dev\nStatus: install ok installed\nVersion: 6.9\n\n"
        "Package: nvidia-jetpack\nStatus: install ok installed\nArch: arm64\nVersion: 6.2+b77\n\n"
        "Package: python3-libnvinfer\nStatus: install ok installed\n"
        "Version: 10.3.0.30-1+cuda12.5\n"
    )
    write(tmp_path, "var/lib/dpkg/status", packages)
    model = "NVIDIA Jetson AGX Orin Developer Kit"
    assert read_jetson(tmp_path) == Jetson(model, "36.4.3", "6.2", "10.3.0.30")


def test_a_removed_package_is_not_installed(tmp_path: Path):
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson AGX Thor Developer Kit\0")
    removed = "Package: python3-libnvinfer\nStatus: deinstall ok config-files\nVersion: 10.13.3\n"
    write(tmp_path, "var/lib/dpkg/status", removed)
    jetson = Jetson("NVIDIA Jetson AGX Thor Developer Kit", None, None, None)
    assert read_jetson(tmp_path) == jetson


def test_other_boards_are_no_jetson(tmp_path: Path):
    assert read_jetson(tmp_path) is None
    write(tmp_path, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    assert read_jetson(tmp_path) is None


def test_the_smallest_group_limit_counts_version_2(tmp_path: Path):
    write(tmp_path, "a/cpu.max", "400000 100000\n")
    write(tmp_path, "a/b/cpu.max", "max 100000\n")
    write(tmp_path, "a/memory.max", "max\n")
    write(tmp_path, "a/b/memory.max", "2147483648\n")
    assert cgroup_limits(tmp_path, "0::/a/b\n") == (4.0, 2147483648)
    assert cgroup_limits(tmp_path, "0::/other\n") == (None, None)


def test_of_two_groups_that_are_limited_the_smaller_limit_counts(tmp_path: Path):
    for group, cores, memory in (("a", 400000, 1 << 30), ("a/b", 200000, 3 << 30)):
        write(tmp_path, f"{group}/cpu.max", f"{cores} 100000\n")
        write(tmp_path, f"{group}/memory.max", f"{memory}\n")
    assert cgroup_limits(tmp_path, "0::/a/b\n") == (2.0, 1 << 30)


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (2.5, 2), (3.0, 3), (99.0, 8)])
def test_a_part_of_a_core_is_none(quota: float, cores: int, monkeypatch: pytest.MonkeyPatch):
    whole = machine.Cpu("a processor", 8, 8, {})
    monkeypatch.setattr(machine, "_read_processor", lambda usable: whole)
    found = machine._read_cpu(quota)
    assert (found.physical_cores, found.logical_cores) == (cores, cores)


def test_group_limits_version_1(tmp_path: Path):
    write(tmp_path, "cpu/cpu.cfs_quota_us", "150000\n")
    write(tmp_path, "cpu/cpu.cfs_period_us", "100000\n")
    write(tmp_path, "cpu/job/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, "cpu/job/cpu.cfs_period_us", "100000\n")
    write(tmp_path, "memory/job/memory.limit_in_bytes", "1073741824\n")
    own = "9:name=systemd:/x\n4:memory:/job\n1:cpu,cpuacct:/job\n"
    assert cgroup_limits(tmp_path, own) == (1.5, 1073741824)


def test_a_quota_caps_the_cores(monkeypatch: pytest.MonkeyPatch):
    whole = machine._read_cpu(None)
    half = machine._read_cpu(0.5)
    assert (half.physical_cores, half.logical_cores) == (1, 1)
    assert half.features == whole.features


def test_this_machine_is_plain_data():
    described = machine.describe()
    assert json.loads(json.dumps(described))["cpu"] == described["cpu"]
    assert described["memory_bytes"] > 2**28
    assert described["cpu"]["logical_cores"] >= described["cpu"]["physical_cores"] >= 1
    assert described["libraries"]["care-compress"]


def test_a_damaged_installation_has_no_version(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str | None:
        if name == "torch":
            return None
        if name == "onnx":
            raise KeyError("Version")
        return "1.0"

    monkeypatch.setattr(machine.metadata, "version", version)
    found = machine.installed_versions()
    assert "torch" not in found and "onnx" not in found
    assert found["openvino"] == "1.0"


def test_memory_is_what_the_group_leaves_of_it(monkeypatch: pytest.MonkeyPatch):
    for limit, memory in ((None, 4 << 30), (1 << 30, 1 << 30), (8 << 30, 4 << 30)):
        monkeypatch.setattr(machine, "cgroup_limits", lambda root, own, limit=limit: (None, limit))
        whole = SimpleNamespace(total=4 << 30)
        monkeypatch.setattr(machine.psutil, "virtual_memory", lambda whole=whole: whole)
        assert machine.read_machine().memory_bytes == memory
