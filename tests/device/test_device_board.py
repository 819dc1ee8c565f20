from pathlib import Path

import pytest

from care_compress.device import sensors
from care_compress.device.watch import read_moment

NVPMODEL = "NV Power Mode: MODE_30W\n2\n"
TEGRA = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
DPKG = """\
Package: libnvinfer10
Status: install ok installed
Version: 10.3.0.30-1+cuda12.5

Package: nvidia-jetpack
Status: install ok installed
Architecture: arm64
Version: 6.2+b77

Package: python3-libnvinfer
Status: deinstall ok config-files
Version: 10.3.0.30-1+cuda12.5
"""


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """The files of an Orin that are read, as they were recorded."""
    files = {
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "etc/nv_tegra_release": TEGRA,
        "var/lib/dpkg/status": DPKG,
        "sys/class/devfreq/15340000.vic/cur_freq": "435200000\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2201600\n",
        "sys/devices/system/cpu/cpufreq/boost": "1\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48593\n",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "\n",
        "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_an_orin_is_read(orin: Path) -> None:
    now = read_moment(orin, ())
    assert (now.gpu_mhz, now.cpu_mhz, now.watts) == (1300.5, 2201.6, None)
    # The GPU's zone gives no answer while it sleeps, and the last one has no value at all.
    assert now.temperatures_c == {"cpu-thermal": 48.593}
    assert sensors.parse_l4t(TEGRA) == "36.4.3"
    assert sensors.parse_package(DPKG, "nvidia-jetpack") == "6.2"
    assert sensors.parse_package(DPKG, "python3-libnvinfer") is None
    assert sensors.parse_package(DPKG, "nvidia") is None
    assert sensors.parse_power_mode(NVPMODEL) == "MODE_30W"


@pytest.mark.parametrize("name", ["17000000.ga10b", "gpu-gpc-0", "17000000.gv11b"])
def test_the_gpus_other_names_are_known(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sys/class/devfreq" / name
    folder.mkdir(parents=True)
    (folder / "cur_freq").write_text("612000000\n")
    assert sensors.read_gpu_clock(tmp_path) == 612


def test_a_machine_that_is_no_jetson_has_no_such_facts(tmp_path: Path) -> None:
    assert sensors.read_gpu_clock(tmp_path) is None
    assert sensors.read_cpu_clock(tmp_path) is None
    assert sensors.read_temperatures(tmp_path) == {}
    assert sensors.parse_l4t("") is None
    assert sensors.parse_power_mode("nvpmodel: command not found") is None
