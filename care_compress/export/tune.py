"""``care-compress tune openvino-cpu``: the placement that is fastest on this processor.

What runs faster in integers depends on the processor: a few placements that matter, listed in the
target's file, are exported, scored on the same images and timed in turns. The fastest that keeps
the accuracy budget replaces the run's export. Results are kept for each processor.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from care_compress import machine
from care_compress.console import step_line, widened
from care_compress.data.samples import Samples
from care_compress.errors import ExportError, RunError, TargetError
from care_compress.evaluate.agreement import HeldImages, drop_on_held, hold_images
from care_compress.evaluate.latency import LatencyPlan, measure_latency
from care_compress.export.result import WIDTH, Exported
from care_compress.export.stage import check_exports, exporter_for
from care_compress.export.variants import CPU, Variants
from care_compress.files import (
    digest_of,
    fingerprint,
    json_text,
    read_json,
    temporary_folder,
    write_text,
)
from care_compress.model.checkpoint import load_checkpoint, state_digest
from care_compress.model.rewrite import rewrite
from care_compress.quantize.selection import read_list
from care_compress.quantize.stages import CALIBRATION_FILE
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.target import AS_SHIPPED, Target, load_target
from care_compress.run.context import RunContext
from care_compress.run.directory import Run
from care_compress.run.finished import FinishedRun, find_run
from care_compress.run.processes import World
from care_compress.run.stages import code_digest
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_openvino import unasked_precision
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.runtime.runners import open_runner
from care_compress.shipped import COMPARE
from care_compress.tasks.intervals import Interval
from care_compress.tasks.known import labelled
from care_compress.tasks.task import Drop


@dataclass(frozen=True)
class TuneOptions:
    """What a user may ask for."""

    images: int = 512
    max_drop: float | None = None  # points; the recipe's budget if left out
    again: bool = False  # measure, whatever is known
    latency: LatencyPlan = LatencyPlan()


@dataclass(frozen=True)
class TriedPlacement:
    """One placement: what it loses against float, and how it compares with the shipped one."""

    name: str
    drop: Drop
    milliseconds: float
    speedup: Interval  # over the placement that an export takes here

    def fits(self, limit: float | None) -> bool:
        """Whether it is within the accuracy budget."""
        return limit is None or self.drop.value <= limit

    def as_json(self) -> dict[str, Any]:
        """As the tune file holds it."""
        return {**asdict(self), "drop": list(astuple(self.drop)), "speedup": list(self.speedup)}

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> "TriedPlacement":
        """What `as_json` wrote."""
        value, low, high = found["speedup"]
        return cls(found["name"], Drop(*found["drop"]), found["milliseconds"], (value, low, high))


def run_tune(
    runs: Path, name: str, target_name: str, options: TuneOptions, console: Console
) -> str:
    """Try the target's placements on a finished run and return the name of the one kept."""
    finished, run = find_run(runs, name), Run(runs, name)
    target = load_target(target_name)
    if not target.placements or target.device != "cpu":
        raise TargetError(
            f"{target.name} has no placements to try on this machine.",
            "tune openvino-cpu or onnxruntime-cpu; a board measures its own engines",
        )
    if finished.recipe.full_range:
        target = target.at_full_range()
    with run.reopen():
        bench = _open_bench(run, finished, target, options, console)
        tried = _tried(bench, options)
        budget = bench.recipe.budget.max_drop
        limit = budget if options.max_drop is None else options.max_drop
        best = choose(tried, limit, bench.usual)
        table = tune_table(tried, best, target, len(bench.judges.labels))
        widened(console, WIDTH).print(table)
        with step_line(console) as notify:
            done = bench.export(run, best.name, notify)
        results = read_json(run.path / "results.json")
        results["exports"][target.name] = done.as_json()
        run.write_json("results.json", results)
        record = {
            "key": bench.key,
            "target": target.name,
            "kept": best.name,
            "tried": [one.as_json() for one in tried],
            "machine": machine.describe(),
        }
        write_text(bench.record, json_text(record))
    where = run.path / "exports" / target.name
    console.print(f"kept: {best.name}; {escape(str(where))} holds it", soft_wrap=True)
    console.print(f"Compare: {COMPARE} fp32 {escape(name)}", soft_wrap=True)
    return best.name


def choose(
    tried: list[TriedPlacement], limit: float | None, usual: str = AS_SHIPPED
) -> TriedPlacement:
    """The fastest within the budget, if it is faster than the usual one beyond noise."""
    shipped = next(one for one in tried if one.name == usual)
    able = [one for one in tried if one.fits(limit) and one.speedup[1] > 1]
    return max(able, key=lambda one: one.speedup[0], default=shipped)


def tune_table(
    tried: list[TriedPlacement], best: TriedPlacement, target: Target, images: int
) -> Table:
    """Every placement, fastest first."""
    table = Table(title=f"Placements for {target.name}, {images:,} images, one thread")
    table.title_justify = "left"
    table.add_column("placement", no_wrap=True)
    for column in ("ms", "times as fast [95 %]", "drop [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in sorted(tried, key=lambda one: -one.speedup[0]):
        value, low, high = one.speedup
        drop = f"{one.drop.value:.2f} [{one.drop.low:.2f}, {one.drop.high:.2f}]"
        kept = " (kept)" if one is best else ""
        table.add_row(
            one.name + kept, f"{one.milliseconds:.2f}", f"{value:.2f} [{low:.2f}, {high:.2f}]", drop
        )
    return table


@dataclass(frozen=True)
class _Bench:
    """What the placements are tried on."""

    context: RunContext
    recipe: Recipe
    target: Target
    variants: Variants
    images: HeldImages  # that files are compared on with their model
    judges: HeldImages  # training images that calibrate nothing: a placement is chosen by these
    validation: Samples

    @property
    def usual(self) -> str:
        """The placement that an export takes on this processor."""
        return self.target.placement_for(machine.dot_products_in(self.target.runtime))

    def export(self, run: Run, name: str, notify: Callable[[str], None]) -> Exported:
        """The run's model with one placement, into a run directory."""
        context = RunContext(run, World(), Console(quiet=True), repair=True)
        images = len(self.images.labels)
        exporter = exporter_for(
            context, self.recipe, self.variants, self.validation, images, notify
        )
        done = exporter.to(self.target.placed(name))
        if done.skipped:
            raise ExportError(f"{self.target.name}: {done.skipped}")
        check_exports([done])
        return done

    @property
    def record(self) -> Path:
        """Where this processor's results are kept."""
        cpu = re.sub(r"[^a-z0-9]+", "-", machine.read_machine().cpu.name.lower()).strip("-")
        return self.context.run.path / "tune" / f"{self.target.name}-{cpu}.json"

    @property
    def key(self) -> str:
        """Equal only where measuring again would find the same."""
        assert self.variants.kept is not None
        return fingerprint(
            {
                "model": digest_of(self.variants.kept),
                "float model": state_digest(self.variants.model.state_dict()),
                "target": self.target.model_dump(mode="json"),
                "images": state_digest(
                    {"pixels": self.judges.pixels_BCHW, "labels": self.judges.labels}
                ),
                "data": self.recipe.data.model_dump(mode="json"),
                "libraries": dict(machine.installed_versions()),
                "processor": machine.read_machine().cpu.kind,
                "care-compress": code_digest(__name__),
            }
        )


def _open_bench(
    run: Run, finished: FinishedRun, target: Target, options: TuneOptions, console: Console
) -> _Bench:
    recipe, kept = finished.recipe, finished.kept
    if kept is None:
        raise RunError(f"{run.name} quantized nothing.", "name a quantized run with --run")
    if kept.suffix != ".safetensors":
        raise RunError(f"{run.name} is NNCF's model.", "its placement is NNCF's own; tune another")
    # A placement is a target's rules: here they count, whatever the recipe said.
    export = recipe.export.model_copy(update={"target_rules": True})
    recipe = recipe.model_copy(update={"export": export})
    context = RunContext(run, World(), console)
    validation = labelled(recipe, "val")
    model = load_checkpoint(finished.checked_checkpoint(), recipe.model.arch)
    images = hold_images(validation, recipe.data, recipe.export.images, context.bad)
    chosen = read_list(run.path / CALIBRATION_FILE, labelled(recipe, "train"))
    judges = hold_images(
        chosen.samples, recipe.data, None, context.bad, chosen.held_back(options.images)
    )
    network = rewrite(model, recipe.rewrite)
    variants = Variants(model, network, kept, lambda: images, recipe.data, export)
    return _Bench(context, recipe, target, variants, images, judges, validation)


def _tried(bench: _Bench, options: TuneOptions) -> list[TriedPlacement]:
    """Export, score and time every placement; or take what this processor measured before."""
    if not options.again and bench.record.is_file():
        found = read_json(bench.record)
        if found["key"] == bench.key and found["tried"]:
            bench.context.console.print("measured before on this processor; --again measures again")
            return [TriedPlacement.of_json(one) for one in found["tried"]]
    names = (AS_SHIPPED, *bench.target.placements)
    precision = unasked_precision()
    with temporary_folder(bench.record) as folder, step_line(bench.context.console) as notify:
        drops, runners = {}, {}
        example = next(bench.images.batches(1))
        network = bench.variants.compact
        as_float = TorchPredictor(network, bench.variants.model.num_classes, CPU)
        before = bench.judges.logits(as_float)
        for name in names:
            notify(f"exporting: {name}")
            with Run(folder, name).open(bench.recipe, {}) as run:
                done = bench.export(run, name, notify)
            path = done.files[bench.recipe.precision].path
            # Scored in the setting in which it is timed.
            predict = open_predictor(str(path), CPU, precision=precision)
            after = bench.judges.logits(predict)
            drops[name] = drop_on_held(bench.variants.task, before, after, bench.judges)
            runners[name] = open_runner(path, example, 1, precision, "CPU").run
        notify("timing")
        timed = measure_latency(runners, 1, options.latency)
    return [
        TriedPlacement(
            name,
            drops[name],
            timed[name].percentiles()["p50"],
            timed[name].speedup_over(timed[bench.usual]),
        )
        for name in names
    ]
