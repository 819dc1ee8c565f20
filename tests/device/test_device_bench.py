"""What bench measures on the stand-in: kernels alone, the board meanwhile, and its power."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakeboard import PROFILE, FakeGpu, fake_host, fake_library
from qdq import SIDE, make_content, write_classifier

from care_compress.device.app import main
from care_compress.device.bench import Benched
from care_compress.device.board import BoardSetting, describe_board
from care_compress.device.build import BuildOptions, build_engine
from care_compress.device.cuda import Cuda
from care_compress.device.power import Energy, find_rails, read_watts
from care_compress.device.problems import NoGpuError
from care_compress.device.queued import queued_runs
from care_compress.device.sensors import jetpack_of, read_clock_lock, read_overcurrents
from care_compress.device.session import Session
from care_compress.device.timing import Timing
from care_compress.device.watch import IDLE, Moment, Watch, mean_watts, summarize
from care_compress.evaluate.device_measurements import import_results
from care_compress.export.bundle import BundleContent, unpack_bundle, write_bundle


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def quiet(*told: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> BundleContent:
    return make_content(tmp_path_factory.mktemp("content"))


@pytest.fixture
def bundle(content: BundleContent, tmp_path: Path) -> Path:
    return unpack_bundle(write_bundle(content, tmp_path / "bundle.tar.gz"), tmp_path)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = FakeGpu()
    yield gpu
    assert gpu.alive == {}


@pytest.fixture
def board(bundle: Path, tmp_path: Path, gpu: FakeGpu) -> Callable[..., int]:
    def run(verb: str, *options: str) -> int:
        return main(
            [verb, "--bundle", str(bundle), *options], fake_host(tmp_path / "root", gpu=gpu)
        )

    return run


def speed(bundle: Path, model: str = "int8") -> Any:
    return json.loads((bundle / "results.json").read_text())["models"][model]["speed"]


def built(folder: Path, gpu: FakeGpu) -> Session:
    library = fake_library("10.16.1.11", gpu)
    onnx = write_classifier(folder / "m.onnx", int8=True)
    plan = build_engine(library, onnx, BuildOptions("int8"), quiet).plan
    return Session(library, Cuda(gpu), plan)


class Clock:
    """Time that passes only where somebody waits: the same on a busy machine."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("care_compress.device.queued", "care_compress.device.session", "fakeboard"):
        monkeypatch.setattr(f"{module}.time", clock)
    return clock


def test_what_the_host_needs_to_launch_is_no_time_of_the_gpu(
    tmp_path: Path, gpu: FakeGpu, clock: Clock
) -> None:
    with built(tmp_path, gpu) as session:
        gpu.kernels, gpu.launch = 0.02, 0.008
        with queued_runs({"int8": session}, Cuda(gpu)) as queued:
            timing = Timing(1)
            queued["int8"].turn(0.29, timing)
            assert clock.now >= gpu.busy_until, "nothing is left running"
        alone = session.timed_run()
    # Each start event lies behind the kernels of the run before: exactly the kernels are counted.
    assert timing.milliseconds == pytest.approx([20.0] * 15)
    assert timing.enqueue_ms == pytest.approx([8.0] * 15)
    # The device is never idle, so runs end 20 ms apart, not 28.
    assert timing.throughput == pytest.approx(50)
    assert alone == pytest.approx(28), "a run that waits for the one before has both"


def test_a_host_that_launches_slowly_is_seen_in_the_throughput(
    tmp_path: Path, gpu: FakeGpu, clock: Clock
) -> None:
    with built(tmp_path, gpu) as session:
        gpu.kernels, gpu.launch = 0.01, 0.04
        with queued_runs({"int8": session}, Cuda(gpu)) as queued:
            timing = Timing(1)
            queued["int8"].turn(0.39, timing)
    assert timing.throughput == pytest.approx(25), "the launch is longer than the kernels"
    assert timing.enqueue_percentiles()["p50"] == pytest.approx(40)


def test_layers_are_timed_in_a_context_of_their_own(tmp_path: Path, gpu: FakeGpu) -> None:
    with built(tmp_path, gpu) as session:
        session.capture()
        assert session.layer_milliseconds(4) == pytest.approx(PROFILE)
        images = np.zeros((1, 3, SIDE, SIDE), np.float32)
        assert session.run(images).shape[0] == 1, "and the graph still runs"


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaGraphInstantiateWithFlags"])
def test_without_a_graph_the_measurement_goes_on_and_says_so(
    board: Callable[..., int],
    bundle: Path,
    gpu: FakeGpu,
    call: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert board("build", "--int8-only") == 0
    gpu.failing[call] = 2
    assert board("bench", "--seconds", "0.02") == 0
    printed = capsys.readouterr()
    assert f"int8: the engine does not become a CUDA graph: CUDA: made-up error 2 ({call}" in (
        printed.err
    )
    assert "measured without one" in printed.err and "CUDA graph: none" in printed.out
    assert speed(bundle)["cuda_graph"] is False


def moment(mhz: float, watts: float | None = None, throttles: tuple[str, ...] = ()) -> Moment:
    return Moment(mhz, None, {"gpu": mhz / 20}, throttles, watts)


def test_a_watch_tells_models_apart_and_reads_nothing_between_their_turns() -> None:
    load = {"mhz": 100.0}
    with Watch(lambda: moment(load["mhz"]), every=0.002) as watch:
        for _ in range(3):
            for name, mhz in (("int8", 600.0), ("fp16", 900.0)):
                load["mhz"] = mhz
                with watch.during(name):
                    time.sleep(0.02)
                load["mhz"] = 100.0
                time.sleep(0.01)
    for name, mhz in (("int8", 600.0), ("fp16", 900.0)):
        assert len(watch.moments[name]) >= 3
        assert {one.gpu_mhz for one in watch.moments[name]} == {mhz}


def test_what_a_watch_reads_while_a_turn_ends_counts_for_none() -> None:
    reading, ended, calls = threading.Event(), threading.Event(), []

    def read() -> Moment:
        calls.append(threading.current_thread())
        if len(calls) == 1:
            reading.set()
            ended.wait(10)
            return moment(100.0)
        return moment(600.0)

    with Watch(read, every=0.001) as watch:
        with watch.during("int8"):
            assert reading.wait(10)
        ended.set()
    assert [one.gpu_mhz for one in watch.moments["int8"]] == [600.0]


def test_a_turn_too_short_for_the_thread_has_one_moment() -> None:
    with Watch(lambda: moment(600.0), every=60) as watch:
        with watch.during("int8"):
            time.sleep(0.01)
        with watch.during("fp16"):
            pass
    assert len(watch.moments["fp16"]) == 1


def test_moments_are_summed_up_by_range_and_highest() -> None:
    found = summarize([moment(300), moment(900, throttles=("gpu-throttle-alert",)), moment(600)])
    assert found["gpu_mhz"] == {"least": 300, "median": 600, "most": 900}
    assert found["temperatures_c"] == {"gpu": 45} and found["cpu_mhz"] is None
    assert found["throttled"] == ["gpu-throttle-alert"] and found["moments"] == 3
    assert mean_watts([moment(1, 4.0), moment(1), moment(1, 6.0)]) == 5.0
    assert mean_watts([moment(1)]) is None


MONITOR = "sys/bus/i2c/devices/1-0040/hwmon/hwmon3"


def rail(channel: int, label: str, millivolts: int, milliamperes: int, of: str = MONITOR) -> Any:
    return {
        f"{of}/in{channel}_label": f"{label}\n",
        f"{of}/in{channel}_input": f"{millivolts}\n",
        f"{of}/curr{channel}_input": f"{milliamperes}\n",
    }


def test_the_input_of_a_board_is_its_power(tmp_path: Path) -> None:
    put(tmp_path, rail(1, "VDD_IN", 5000, 1200) | rail(2, "VDD_CPU_GPU_CV", 4990, 800))
    rails = find_rails(tmp_path)
    assert [one.name for one in rails] == ["VDD_IN"]
    assert read_watts(rails) == pytest.approx(6.0)


def test_where_the_input_is_not_measured_the_rails_are_added(tmp_path: Path) -> None:
    other = "sys/bus/i2c/devices/1-0041/hwmon/hwmon4"
    put(tmp_path, rail(1, "VDD_GPU_SOC", 19000, 400) | rail(2, "VDD_CPU_CV", 19000, 100))
    put(tmp_path, rail(1, "VDDQ_VDD2_1V8AO", 5000, 300, other) | rail(2, "NC", 5000, 900, other))
    # Sums of all channels, which would count everything twice.
    put(tmp_path, rail(7, "sum of shunt voltages", 9000, 9000))
    rails = find_rails(tmp_path)
    assert {one.name for one in rails} == {"VDD_CPU_CV", "VDD_GPU_SOC", "VDDQ_VDD2_1V8AO"}
    assert read_watts(rails) == pytest.approx(7.6 + 1.9 + 1.5)
    (tmp_path / MONITOR / "curr1_input").write_text("")
    assert read_watts(rails) is None, "a part of the board is not the board"


def test_energy_is_power_over_throughput_with_idle_and_without() -> None:
    record = Energy(("VDD_IN",), idle_watts=4.0, watts=10.0, images_per_second=500.0).as_record()
    assert record["millijoules_per_image"] == pytest.approx(20.0)
    assert record["millijoules_above_idle"] == pytest.approx(12.0)
    assert record["images_per_second_per_watt"] == pytest.approx(50.0)
    assert (record["idle_watts"], record["watts"]) == (4.0, 10.0)


def test_bench_tells_what_an_image_costs_and_it_comes_home(
    board: Callable[..., int], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "root", rail(1, "VDD_IN", 5000, 1200))
    assert board("build") == 0
    assert board("bench", "--seconds", "0.05") == 0
    assert "6.00 W, 6.00 W of them idle" in capsys.readouterr().out
    energy = import_results(bundle / "results.json", tmp_path / "mine")["models"]["int8"]["speed"]
    assert energy["energy"]["rails"] == ["VDD_IN"] and energy["energy_missing"] is None
    each = energy["energy"]["millijoules_per_image"]
    assert each == pytest.approx(6000 / energy["throughput"])
    assert energy["energy"]["millijoules_above_idle"] == pytest.approx(0.0)


def test_a_board_without_a_monitor_says_why_it_tells_no_energy(
    board: Callable[..., int], bundle: Path
) -> None:
    assert board("build", "--int8-only") == board("bench", "--seconds", "0.02") == 0
    assert speed(bundle)["energy"] is None and "INA3221" in speed(bundle)["energy_missing"]


def gpu_clock(least: int, most: int) -> dict[str, str]:
    folder = "sys/class/devfreq/17000000.gpu"
    ends = {f"{folder}/min_freq": str(least), f"{folder}/max_freq": str(most)}
    return ends | {f"{folder}/cur_freq": str(most)}


@pytest.mark.parametrize(("least", "locked"), [(306000000, False), (918000000, True)])
def test_clocks_that_move_are_a_warning(
    board: Callable[..., int],
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    least: int,
    locked: bool,
) -> None:
    put(tmp_path / "root", gpu_clock(least, 918000000))
    assert read_clock_lock(tmp_path / "root") is locked
    assert board("build", "--int8-only") == 0
    assert ("clocks are not locked" in capsys.readouterr().err) is not locked, "kernels are timed"
    assert board("bench", "--seconds", "0.02") == 0
    assert ("sudo jetson_clocks" in capsys.readouterr().err) is not locked
    assert speed(bundle)["during"]["clocks_locked"] is locked
    assert speed(bundle)["during"]["gpu_mhz"]["most"] == 918


def test_a_throttle_while_a_model_runs_is_a_warning(
    board: Callable[..., int], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = "sys/class/thermal/cooling_device4"
    fan = "sys/class/thermal/cooling_device5"
    put(tmp_path / "root", {f"{device}/type": "gpu-throttle-alert\n", f"{device}/cur_state": "1\n"})
    put(tmp_path / "root", {f"{fan}/type": "pwm-fan\n", f"{fan}/cur_state": "3\n"})
    assert board("build", "--int8-only") == board("bench", "--seconds", "0.02") == 0
    assert "throttled while int8 ran (gpu-throttle-alert)" in capsys.readouterr().err
    assert speed(bundle)["during"]["throttled"] == ["gpu-throttle-alert"]


def test_overcurrents_are_counted_from_the_start_of_the_measurement(
    board: Callable[..., int],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = "sys/class/hwmon/hwmon5/oc3_event_cnt"
    put(tmp_path, {counter: "7\n", "sys/class/hwmon/hwmon5/oc1_event_cnt": "1\n"})
    assert read_overcurrents(tmp_path) == 8 and read_overcurrents(tmp_path / "none") == 0
    counts = iter([8, 8, 8, 9])
    monkeypatch.setattr("care_compress.device.bench.read_overcurrents", lambda root: next(counts))
    assert board("build", "--int8-only") == board("bench", "--seconds", "0.02") == 0
    assert speed(bundle)["during"]["throttled"] == [], "those of before are not ours"
    assert board("bench", "--seconds", "0.02") == 0
    assert speed(bundle)["during"]["throttled"] == ["over-current"]


def test_in_a_container_the_power_mode_is_told_by_hand(
    board: Callable[..., int], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "root", {".dockerenv": ""})
    assert board("build", "--int8-only") == board("bench", "--seconds", "0.02") == 0
    assert "in a container nvpmodel cannot be asked" in capsys.readouterr().err
    assert speed(bundle)["during"]["power_mode"] is None
    assert board("bench", "--seconds", "0.02", "--power-mode", "MAXN_SUPER") == 0
    printed = capsys.readouterr()
    assert "container" not in printed.err and "power mode: MAXN_SUPER" in printed.out
    during = speed(bundle)["during"]
    assert (during["power_mode"], during["power_mode_from"]) == ("MAXN_SUPER", "hand")


def test_outside_nvpmodel_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NV Power Mode: MODE_30W\n2\n"
    monkeypatch.setattr("care_compress.device.board.tool_output", lambda *command: said)
    setting = BoardSetting.of(tmp_path, None)
    assert (setting.power_mode, setting.power_mode_from) == ("MODE_30W", "nvpmodel")
    assert setting.clocks_locked is None and setting.warnings() == []


L4T = "# R36 (release), REVISION: {}, GCID: 38968081, BOARD: generic, EABI: aarch64\n"


@pytest.mark.parametrize(
    ("revision", "jetpack"),
    [("3.0", "6.0"), ("4.0", "6.1"), ("4.3", "6.2"), ("4.4", "6.2.1"), ("9.9", None)],
)
def test_without_packages_the_release_tells_the_jetpack(
    tmp_path: Path, gpu: FakeGpu, revision: str, jetpack: str | None
) -> None:
    put(tmp_path, {"etc/nv_tegra_release": L4T.format(revision), "run/.containerenv": ""})
    found = describe_board(tmp_path, fake_library("10.3.0.30", gpu), Cuda(gpu))
    assert found["jetpack"] == jetpack and found["container"] is True
    assert found["jetpack_from"] == (None if jetpack is None else "l4t")
    assert jetpack_of("38.4.0") == "7.1" and jetpack_of("38.2.1") == "7.0"


def test_the_package_counts_before_the_table(tmp_path: Path, gpu: FakeGpu) -> None:
    package = "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2.2+b1\n"
    put(tmp_path, {"etc/nv_tegra_release": L4T.format("4.3"), "var/lib/dpkg/status": package})
    found = describe_board(tmp_path, fake_library("10.3.0.30", gpu), Cuda(gpu))
    assert (found["jetpack"], found["jetpack_from"]) == ("6.2.2", "package")
    assert found["container"] is False and found["name"] == found["gpu"]["name"]
    put(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0"})
    found = describe_board(tmp_path, fake_library("10.3.0.30", gpu), Cuda(gpu))
    assert found["name"] == "NVIDIA Jetson AGX Orin Developer Kit", "a board is not its GPU"


def test_layers_that_cannot_be_timed_cost_no_measurement(
    board: Callable[..., int],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(session: Session, runs: int) -> dict[str, float]:
        raise NoGpuError("no memory to profile the engine.", "close other programs")

    monkeypatch.setattr(Session, "layer_milliseconds", full)
    assert board("build") == board("bench", "--seconds", "0.02") == 0
    assert "the layers are not timed: no memory" in capsys.readouterr().err
    assert "layer_times" not in json.loads((bundle / "results.json").read_text())["models"]["int8"]
    assert speed(bundle)["runs"] >= 50


def made_up(name: str, milliseconds: float, host: float) -> Benched:
    """One engine that draws 10 W, on a board that draws 4 W when idle."""
    timing = Timing(2, [milliseconds] * 10, 0.04, [0.01] * 10)
    return Benched(
        timings={name: timing},
        host={name: Timing(2, [host] * 10, 1.0)},
        captured={name: True},
        moments={IDLE: [moment(300, 4.0)], name: [moment(900, 9.0), moment(900, 11.0)]},
        setting=BoardSetting(None, None, True, False),
        rails=("VDD_IN",),
        overcurrents=0,
    )


def test_a_record_has_the_engines_own_power_and_both_its_times() -> None:
    record = made_up("int8", 0.3, 0.8).as_records()["int8"]
    assert record["latency_ms"]["p50"] == pytest.approx(0.3)
    assert record["host_latency_ms"]["p50"] == pytest.approx(0.8), "with the copies"
    assert record["throughput"] == pytest.approx(500)
    energy = record["energy"]
    assert (energy["idle_watts"], energy["watts"]) == (4.0, 10.0)
    assert energy["millijoules_per_image"] == pytest.approx(20.0)


def test_the_fastest_is_that_of_the_lowest_median_among_its_like() -> None:
    found = made_up("int8", 0.3, 0.8)
    for name, times in (("int8-late", [0.1, 0.5, 0.5]), ("fp16", [0.2] * 3)):
        found.timings[name] = Timing(1, times, 1.0)
    assert (found.fastest(True), found.fastest(False)) == ("int8", "fp16")
    del found.timings["fp16"]
    assert found.fastest(False) is None
