"""What runs on a node: one trial, or the timing of one trial's files. All else is the driver's.

A task answers with a plain row and never with an exception of ours: what fails in one trial is that
trial's business. Where a node or a process is lost, Ray gives the task to another one, and the run
directory goes on from its last checkpoint.
"""

import contextlib
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from care_compress import machine
from care_compress.console import Terminal, one_line, shortened
from care_compress.errors import BusyRunError, CareError, RunError
from care_compress.evaluate.comparison import BF16, CompareOptions
from care_compress.evaluate.file_measurements import find_entries
from care_compress.evaluate.latency import LatencyPlan, measure_latency
from care_compress.evaluate.readback import what_failed
from care_compress.evaluate.resolve import NamedModel, named_models
from care_compress.evaluate.slim_accuracy import SLIM
from care_compress.files import digest_of, fingerprint, json_text, read_json, write_text
from care_compress.libraries import load_ray
from care_compress.recipe.recipe import Recipe
from care_compress.run.context import Watch
from care_compress.run.stages import EVERYTHING, code_digest
from care_compress.runtime.artifact import input_size
from care_compress.runtime.runners import open_runner
from care_compress.sweep.sections import TimingSection
from care_compress.sweep.stopping import StoppedEarly
from care_compress.sweep.trials import Row
from care_compress.tasks.known import task_of

RECORDS = ".trials"  # in the sweep's folder: what is known of each trial, and where
TIMINGS = ".timings"
LOGS = "logs"
MARK = ".mark"  # tells a node whether it sees the folder that the driver sees
PATIENCE = 60.0  # seconds that a process of a lost node may take to let go of its run
WIDTH = 112  # letters of a line in a log
# A recipe, its folder of runs, its name, a console, whether to repair, who is told of validations;
# ``results.json`` comes back.
Work = Callable[[Recipe, Path, str, Console, bool, Watch | None], Mapping[str, Any]]


@cache
def pipeline_digest() -> str:
    """Digest of all the code that a run goes through, as this process has it."""
    return code_digest("care_compress.pipeline")


def check_code(code: str) -> None:
    """Raise unless this node has the driver's code."""
    if pipeline_digest() != code:
        raise RunError(
            f"{platform.node()} has another care-compress than the machine that hands out work.",
            "install the same version on every node",
        )


@dataclass(frozen=True)
class Place:
    """Where a sweep works; every node must see it under the same path."""

    runs: Path  # the sweep's own folder
    cwd: Path  # what relative paths in recipes start from
    mark: str
    code: str  # digest of the driver's pipeline

    def enter(self) -> None:
        """Raise unless this node sees the sweep's folder and has the driver's code."""
        node = platform.node()
        try:
            seen = (self.runs / MARK).read_text(encoding="utf-8")
            os.chdir(self.cwd)
        except OSError as error:
            seen = f"{error.strerror}"
        if seen != self.mark:
            raise RunError(
                f"{node} does not see {self.runs}.",
                "put --runs on storage that every node mounts under the same path",
            )
        check_code(self.code)


@dataclass(frozen=True)
class Job:
    """One trial, as it travels to a node."""

    name: str
    recipe: Recipe
    place: Place
    about: Mapping[str, Any]  # kept beside its row: what the row depends on, and where it belongs
    threads: int
    processes: int = 1  # above one, torchrun starts them
    repair: bool = False


def do_trial(job: Job, work: Work, before: Row | None = None, rungs: Any = None) -> Row:
    """Make one run and return its row; `before` is the row of the run it takes a part from.

    `rungs` is the actor of `care_compress.sweep.stopping` where trainings may be stopped.
    """
    began = time.monotonic()
    row: Row = {"status": "failed", "reason": "", "node": platform.node()}
    log = job.place.runs / LOGS / f"{job.name}.txt"
    try:
        if before is not None and before["status"] != "finished":
            raise RunError(f"its float model was not made: {before['reason']}")
        job.place.enter()
        torch.set_num_threads(job.threads)
        log.parent.mkdir(exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            console = Terminal(file=file, width=WIDTH)
            try:
                row |= figures(patiently(lambda: _worked(job, work, console, rungs)))
            except Exception:
                traceback.print_exc(file=file)
                raise
        row["status"] = "finished"
    except StoppedEarly as stopped:
        row |= {"status": "stopped", "reason": stopped.message}
    except CareError as error:
        row["reason"] = shortened(one_line(str(error)), 500)
    except Exception as error:  # whatever a library raised, the other trials go on
        row["reason"] = shortened(one_line(f"{type(error).__name__}: {error}"), 500)
    row["seconds"] = round(time.monotonic() - began, 2)
    with contextlib.suppress(CareError, OSError):  # the driver has the row, too
        write_text(record_file(job.place.runs, job.name), json_text({**job.about, "row": row}))
    return row


def record_file(runs: Path, name: str) -> Path:
    """Where the row of a trial is kept."""
    return runs / RECORDS / f"{name}.json"


def _worked(job: Job, work: Work, console: Console, rungs: Any) -> Mapping[str, Any]:
    if job.processes > 1:
        return by_torchrun(job, console)
    watch = None if rungs is None else watching(job, rungs)
    return work(job.recipe, job.place.runs, job.name, console, job.repair, watch)


def watching(job: Job, rungs: Any) -> Watch:
    """Return what is told of each validation of a trial, and ends it where it cannot win."""
    ray = load_ray()
    images = job.recipe.data.model_dump_json()  # accuracies on others say nothing

    def watch(training: str, validations: int, reached: float) -> None:
        group = f"{training} {images}"
        if not ray.get(rungs.goes_on.remote(group, job.name, validations, reached)):
            raise StoppedEarly(
                f"{training} was stopped after {validations} validations: {reached:.2f} % was not "
                "among the best so far"
            )

    return watch


def by_torchrun(job: Job, console: Console) -> Mapping[str, Any]:
    """Make the run with several processes, one for each of the trial's GPUs."""
    recipe = job.place.runs / RECORDS / f"{job.name}.yaml"
    write_text(recipe, yaml.safe_dump(job.recipe.model_dump(mode="json"), sort_keys=False))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={job.processes}", "-m", "care_compress"]
    command += ["quantize", str(recipe), "--runs", str(job.place.runs), "--name", job.name]
    command += ["--repair"] if job.repair else []
    done = subprocess.run(command, stdout=console.file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RunError(f"torchrun ended with exit code {done.returncode}.", "see the trial's log")
    found: Mapping[str, Any] = read_json(job.place.runs / job.name / "results.json")
    return found


def patiently(make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Wait for a run whose process is still ending: its node was lost a moment ago."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return make()
        except BusyRunError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def figures(results: Mapping[str, Any]) -> Row:
    """What a table of trials shows of ``results.json``."""
    precision, exports = results["precision"], results["exports"]
    drop: dict[str, Any] = {"drop": 0.0, "drop_ci95": [0.0, 0.0]}  # a float model is its own
    if "slim" in results:
        drop = results["slim"]["models"][results.get("kept", SLIM)]
    elif "candidates" in results:
        drop = results["candidates"][results["kept"]]
    failed = {
        target: "; ".join(why.values())
        for target, export in exports.items()
        if (why := what_failed(export, precision))
    }
    return {
        "precision": precision,
        "images": results["accuracy"]["images"],
        **{key: results["accuracy"][key] for key in task_of(results).shown},
        "drop": drop["drop"],
        "drop_ci95": drop["drop_ci95"],
        "kept": results.get("kept"),
        "size_bytes": {
            target: export["models"][precision]["size_bytes"]
            for target, export in exports.items()
            if precision in export.get("models", {})
        },
        "failed_exports": failed,
        "energy_mj": (results.get("plan") or {}).get("energy_mj"),
    }


def processor() -> dict[str, Any]:
    """The processor of the node that is asked: its name, and what it is known by."""
    cpu = machine.read_machine().cpu
    return {"name": cpu.name, "kind": fingerprint(cpu.kind), "node": platform.node()}


def do_timing(place: Place, baseline: str, name: str, section: TimingSection) -> dict[str, Any]:
    """Time a trial's files in turns with those of its float model; by target, or why not."""
    try:
        place.enter()
        found: dict[str, Any] = _timed(place.runs, baseline, name, section)
    except CareError as error:
        found = {target: {"missing": one_line(str(error))} for target in section.targets}
    except Exception as error:  # a runtime's own
        why = shortened(one_line(f"{type(error).__name__}: {error}"), 500)
        found = {target: {"missing": why} for target in section.targets}
    return found


def _timed(runs: Path, baseline: str, name: str, section: TimingSection) -> dict[str, Any]:
    models = [one for one in named_models([baseline, name], runs) if isinstance(one, NamedModel)]
    plan = LatencyPlan(seconds=section.seconds)
    entries, missing = find_entries(models, CompareOptions(targets=section.targets))
    entries = [one for one in entries if one.is_timed and not one.name.endswith(BF16)]
    here = processor()
    key = fingerprint(
        {
            "files": {entry.key: [digest_of(entry.path), entry.precision] for entry in entries},
            "section": section.model_dump(mode="json"),
            "processor": here["kind"],
            "packages": machine.installed_versions(EVERYTHING),
        }
    )
    record = runs / TIMINGS / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        known = read_json(record)
        if known["key"] == key:
            return dict(known["targets"])
    found: dict[str, Any] = {}
    for target in section.targets:
        both = [entry for entry in entries if entry.target == target]
        if len(both) < 2:
            absent = [why for (where, _), why in missing.items() if where == target]
            found[target] = {"missing": "; ".join(absent) or f"no file for {target}"}
            continue
        size = input_size(both[0].path, None)
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(section.batch, 3, *size, generator=noise)
        runners = {
            entry.name: open_runner(
                entry.path, images, section.threads, entry.precision, entry.device
            )
            for entry in both
        }
        load = machine.load_average()
        timed = measure_latency({k: one.run for k, one in runners.items()}, section.batch, plan)
        value, low, high = timed[name].speedup_over(timed[baseline])
        found[target] = {
            "ms": timed[name].percentiles(),
            "float_ms": timed[baseline].percentiles(),
            "speedup": value,
            "speedup_ci95": [low, high],
            "noisy": timed[name].is_noisy or timed[baseline].is_noisy,
            "batch": section.batch,
            "threads": section.threads,
            "floats_in": next(entry.precision for entry in both if entry.name == name),
            "processor": here["name"],
            "processor_kind": here["kind"],
            "node": here["node"],
            "load_average": load,
        }
    write_text(record, json_text({"key": key, "targets": found}))
    return found
