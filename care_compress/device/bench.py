"""Engines measured side by side: GPU, host and enqueue time, the board's state and its power."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from care_compress.device.board import BoardSetting
from care_compress.device.cuda import Cuda
from care_compress.device.manifest import FLOAT, Bundle, precision_of
from care_compress.device.power import NO_RAILS, Energy, find_rails
from care_compress.device.problems import NoGpuError
from care_compress.device.queued import queued_runs
from care_compress.device.samples import run_pixels
from care_compress.device.sensors import read_overcurrents
from care_compress.device.session import Session
from care_compress.device.timing import BenchPlan, Timed, Timing, measure
from care_compress.device.verbs import format_table
from care_compress.device.watch import IDLE, Moment, Watch, mean_watts, read_moment, summarize

# Of the time for each engine, so much more goes to runs that wait for one another.
_PART_FOR_HOST = 0.25
_IDLE_SECONDS = 2.0
_HEADER = "engine|batch|runs|GPU p50 ms|p90|p99|host p50|enqueue p50|images/s|mJ/image"
_OVERCURRENT = "over-current"


@dataclass(frozen=True)
class Benched:
    """What was measured of some engines."""

    timings: dict[str, Timing]  # kernels alone, one run queued ahead
    host: dict[str, Timing]  # from the copy in to the answer out, one after the other
    captured: dict[str, bool]  # whether it was a CUDA graph
    moments: dict[str, list[Moment]]
    setting: BoardSetting
    rails: tuple[str, ...]
    overcurrents: int

    def during(self, model: str) -> dict[str, Any]:
        """How the board was set and what it did in a model's turns."""
        found = summarize(self.moments[model])
        if self.overcurrents:  # counted over all turns: the board tells no moment
            found["throttled"] = sorted({*found["throttled"], _OVERCURRENT})
        return {**self.setting.as_record(), **found}

    def energy(self, model: str) -> Energy | None:
        """What a model's images cost; None where this board measures no power."""
        idle, watts = (mean_watts(self.moments.get(name, ())) for name in (IDLE, model))
        if idle is None or watts is None or watts <= 0:
            return None
        return Energy(self.rails, idle, watts, self.timings[model].throughput)

    def fastest(self, quantized: bool) -> str | None:
        """The model of the lowest latency, of the quantized ones or of the others."""
        found = [name for name in self.timings if (precision_of(name) != FLOAT) == quantized]
        return min(found, key=lambda name: self.timings[name].percentile(50), default=None)

    def as_records(self) -> dict[str, dict[str, Any]]:
        """The measurements as they stand in results.json."""
        records = {}
        for model, timing in self.timings.items():
            energy = self.energy(model)
            records[model] = {
                "batch": timing.batch,
                "cuda_graph": self.captured[model],
                "runs": len(timing.milliseconds),
                "seconds": round(timing.seconds, 3),
                "latency_ms": timing.percentiles(),
                "host_latency_ms": self.host[model].percentiles(),
                "enqueue_ms": timing.enqueue_percentiles(),
                "throughput": timing.throughput,
                "during": self.during(model),
                "energy": None if energy is None else energy.as_record(),
                "energy_missing": None if energy is not None else NO_RAILS,
            }
        return records

    def warnings(self) -> list[str]:
        """What makes these figures worth less."""
        found = self.setting.warnings()
        for model in self.timings:
            if throttled := self.during(model)["throttled"]:
                found.append(
                    f"the board throttled while {model} ran ({', '.join(throttled)})."
                    " Fix: cool it, give it a stronger supply, or choose a lower power mode"
                )
        return found


def capture_graphs(
    sessions: Mapping[str, Session], wanted: bool, say: Callable[[str], None]
) -> dict[str, bool]:
    """Make a CUDA graph of each engine; one that does not become a graph is run without."""
    captured = dict.fromkeys(sessions, False)
    for model, session in sessions.items() if wanted else ():
        try:
            session.capture()
            captured[model] = True
        except NoGpuError as error:
            say(f"{model}: {error.message} It is measured without one.")
    return captured


def bench_sessions(
    sessions: Mapping[str, Session],
    bundle: Bundle,
    cuda: Cuda,
    root: Path,
    setting: BoardSetting,
    captured: dict[str, bool],
    seconds: float,
    say: Callable[[str], None],
) -> Benched:
    """Time opened engines in turns, and read the board's sensors in each of these."""
    pixels_NCHW = bundle.array("pixels")
    for session in sessions.values():
        # What is timed are real images: on zeros less power is drawn.
        run_pixels(session, bundle, pixels_NCHW[: session.batch])
    rails, before = find_rails(root), read_overcurrents(root)
    with Watch(partial(read_moment, root, rails)) as watch:
        if rails:
            say("measuring the idle power")
            with watch.during(IDLE):
                time.sleep(min(_IDLE_SECONDS, seconds))
        with queued_runs(sessions, cuda) as queued:
            timings = measure(queued, BenchPlan(seconds), say, watch.during)
    alone = {name: Timed(one.batch, one.timed_run) for name, one in sessions.items()}
    host = measure(alone, BenchPlan(_PART_FOR_HOST * seconds), say)
    return Benched(
        timings=timings,
        host=host,
        captured=captured,
        moments=watch.moments,
        setting=setting,
        rails=tuple(rail.name for rail in rails),
        overcurrents=read_overcurrents(root) - before,
    )


def show_benched(benched: Benched) -> None:
    """Print what was measured, and how the board was meanwhile."""
    rows = [_HEADER.split("|")]
    for model, timing in benched.timings.items():
        energy = benched.energy(model)
        rows.append(
            [
                model,
                str(timing.batch),
                str(len(timing.milliseconds)),
                *(f"{value:.3f}" for value in timing.percentiles().values()),
                f"{benched.host[model].percentile(50):.3f}",
                f"{timing.enqueue_percentiles()['p50']:.3f}",
                f"{timing.throughput:.0f}",
                "?" if energy is None else f"{1000 * energy.watts / energy.images_per_second:.2f}",
            ]
        )
    print(format_table(rows))
    print("GPU: kernels alone, one run queued ahead; host: from the copy in to the answer out.")
    graphs = ", ".join(name for name, is_graph in benched.captured.items() if is_graph)
    mode = benched.setting.power_mode or "unknown"
    print(f"CUDA graph: {graphs or 'none'}; power mode: {mode}")
    for model in benched.timings:
        about = benched.during(model)
        clock, hottest = about["gpu_mhz"], max(about["temperatures_c"].values(), default=None)
        told = "?" if clock is None else f"{clock['least']:.0f} to {clock['most']:.0f}"
        heat = "?" if hottest is None else f"{hottest:.0f}"
        print(f"while {model} ran: GPU at {told} MHz, {heat} °C at most")
        energy = benched.energy(model)
        if energy is not None:
            print(f"  {energy.watts:.2f} W, {energy.idle_watts:.2f} W of them idle")
