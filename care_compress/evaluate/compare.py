"""``care-compress compare fp32 int8``: side by side on every target, with a verdict.

What is measured stands in `care_compress.evaluate.comparison`; here stand who is compared, what the
measurements mean, and what is printed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from care_compress.console import say, show_checks, widened
from care_compress.data.samples import Samples
from care_compress.data.sources import open_samples
from care_compress.errors import DataError, RunError, TargetError
from care_compress.evaluate.comparison import (
    BF16,
    CompareOptions,
    Comparison,
    find_entries,
    profile_files,
    read_files_back,
    score,
    time_files,
)
from care_compress.evaluate.comparison_json import comparison_as_json
from care_compress.evaluate.device_measurements import device_verdict
from care_compress.evaluate.latency import show_machine
from care_compress.evaluate.layers import kind_table
from care_compress.evaluate.resolve import (
    MakeRun,
    NamedModel,
    float_recipe_of,
    named_models,
    same_images,
)
from care_compress.evaluate.tables import accuracy_table, device_table, latency_table
from care_compress.evaluate.verdicts import Budget, Verdict, judge
from care_compress.files import digest_of, json_text, size_of, write_text
from care_compress.recipe.sections import BudgetSection, DataSection
from care_compress.runtime.probe import probe

WIDTH = 150  # of the tables


def run_compare(
    names: list[str], runs: Path, options: CompareOptions, make_run: MakeRun, console: Console
) -> Comparison:
    """Compare, print, write ``compare.json``; `make_run` makes a float baseline that is missing."""
    models = [_settled(one, names, runs, make_run, console) for one in named_models(names, runs)]
    if len({one.name for one in models}) < len(models):
        raise RunError("two of the names mean the same model.", "name different runs")
    data = _common_data(models, options)
    samples = open_samples(data, "val")
    _check_files(models, data)
    entries, missing = find_entries(models, options)
    if not entries:
        reasons = "; ".join(sorted(set(missing.values()))) or "nothing was exported"
        raise TargetError(
            f"none of the files can be run here: {reasons}.",
            "compare on the machine that has the target",
        )
    for one in models[1:]:
        shared = {e.target for e in entries if e.name == models[0].name}
        shared &= {e.target for e in entries if e.name == one.name}
        if not shared and one.run is None:
            raise TargetError(
                f"no target runs both {models[0].name} and {one.name}.",
                "compare two files for one runtime, or two runs",
            )
    collected = score(entries, models, samples, data, options, console)
    found = Comparison(models, entries, missing, collected)
    read_files_back(found, data, samples, console)
    time_files(found, data, samples, options, console)
    profile_files(found, data, samples, options, console)
    decide(found, options)
    _report(found, samples, data, options, console)
    return found


def _settled(
    one: NamedModel | str, names: list[str], runs: Path, make_run: MakeRun, console: Console
) -> NamedModel:
    """A contender; a float baseline that has no run yet is made."""
    if isinstance(one, NamedModel):
        return one
    start = next(
        (c for c in named_models(names, runs) if isinstance(c, NamedModel) and c.run), None
    )
    if one != "fp32" or start is None:
        raise RunError(
            f"there is no run called {one}, of a recipe {one} or of that precision in {runs}.",
            f"make quantize RECIPE={one}, or name a run or a file",
        )
    name = f"{start.name}_fp32"
    console.print(f"no fp32 run of this model yet: making {escape(str(runs / name))}")
    make_run(float_recipe_of(start), runs, name, Console(quiet=True))
    (made,) = named_models([name], runs)
    assert isinstance(made, NamedModel)
    return made


def _common_data(models: list[NamedModel], options: CompareOptions) -> DataSection:
    """The images all of them are scored on; different ones give no drop."""
    named = [(one.name, one.recipe.data) for one in models if one.recipe is not None]
    if not named and options.data is None:
        raise DataError(
            "bare files do not say which images they are for.", "add --data, --res and --crop"
        )
    wanted = options.data or named[0][1]
    for name, section in named:
        if not same_images(section, wanted):
            raise DataError(
                f"{name} looks at {section.source} at {section.resolution} pixels (crop "
                f"{section.crop_pct}), others do not: a drop between them means nothing.",
                "compare runs on the same data, resolution and crop",
            )
    return wanted


def _check_files(models: list[NamedModel], data: DataSection) -> None:
    """The files are those that were exported, or can be run, and prepare images alike."""
    for one in models:
        for path in one.files.values() if one.run is None else ():
            probe(path, data.resolution)
        for target, export in one.export_of.items() if one.run is not None else ():
            path = one.files[target]
            known = {entry["sha256"] for entry in export["models"].values()}
            if path.is_file() and digest_of(path) not in known:
                raise RunError(f"{path} is not the file that was exported.", "make quantize again")
    said = {
        json.dumps([export["preprocessing"], export["classes"]], sort_keys=True)
        for one in models
        if one.run is not None
        for export in one.export_of.values()
    }
    if len(said) > 1:
        raise DataError(
            "the exported files differ in preprocessing or classes.", "export both runs again"
        )


def _report(
    found: Comparison,
    samples: Samples,
    data: DataSection,
    options: CompareOptions,
    console: Console,
) -> None:
    """Tables on the console, ``compare.json`` in the last run and where the user wants it."""
    value = comparison_as_json(found, samples, data)
    text = json_text(value)
    last = found.models[-1].run
    paths = [p for p in (options.json_file, last and last / "compare.json") if p]
    for path in paths:
        write_text(path, text)
    wide = widened(console, WIDTH)
    wide.print(accuracy_table(value))
    for key, answers in found.collected.answers.items():
        if answers.broken:
            text = f"{key}: {answers.broken:,} answers are NaN or infinite; they count as wrong"
            say(text, console)
    for setting in value["latency"]:
        if setting["rows"]:
            wide.print(latency_table(setting))
    if found.boards:
        wide.print(device_table(value))
    for target, rows in value["targets"].items():
        if any(one.get("layers_ms") for one in rows.values()):
            wide.print(kind_table(f"Where the time goes on {target}, batch 1, 1 thread", rows))
        elif any(one.get("by_kind") for one in rows.values()):
            wide.print(kind_table(f"Layers of the engines for {target}, not timed here", rows))
    for target in found.targets:
        reasons = {
            why
            for (where, name), why in found.missing.items()
            if where == target and (where, name) not in found.boards
        }
        for why in sorted(reasons):
            text = f"{target}: not measured here: {why}"
            say(text, console)
    show_machine(value["machine"], console)
    show_checks(found.checks, console)
    if found.is_noisy:
        console.print("[yellow]some figures are noisy: other programs had the cores, too[/]")
    for verdict in found.verdicts:
        colour = {True: "green", False: "red", None: "yellow"}[verdict.pays]
        console.print(
            f"[bold {colour}]{verdict.target}[/]: {escape(verdict.text)}",
            highlight=False,
            soft_wrap=True,
        )
    for budget in found.budgets:
        say(str(budget), console)
    for path in paths:
        console.print(f"written to {escape(str(path))}", soft_wrap=True)


def decide(found: Comparison, options: CompareOptions) -> None:
    """A verdict for each target and candidate, and the budgets of the candidates."""
    for candidate in found.models[1:]:
        budget = candidate.recipe.budget if candidate.recipe else BudgetSection()
        limit = budget.max_top1_drop if options.max_drop is None else options.max_drop
        for target in found.targets:
            found.verdicts += _verdicts(found, candidate, target, limit)
            least = options.min_speedup or (budget.min_speedup or {}).get(target)
            if least is not None and found.entry(target, candidate.name):
                over = dict(_speedups(found, target, candidate.name)).get(found.baseline.name)
                value = None if over is None else over[0]
                found.budgets.append(_at_least(f"min_speedup on {target}", least, value))
        if limit is not None:
            drops = [found.drop(target, candidate.name) for target in found.targets]
            worst = max((drop.value for drop in drops if drop is not None), default=None)
            found.budgets.append(_at_most(f"max_top1_drop of {candidate.name}", limit, worst))
        if budget.max_size is not None:
            size = max((size_of(p) for p in candidate.files.values()), default=0) / 1e6
            name = f"max_size of {candidate.name} (MB)"
            found.budgets.append(_at_most(name, budget.max_size, size))


def _at_most(name: str, limit: float, value: float | None) -> Budget:
    return Budget(name, limit, value, value is not None and value <= limit)


def _at_least(name: str, limit: float, value: float | None) -> Budget:
    return Budget(name, limit, value, value is not None and value >= limit)


def _verdicts(
    found: Comparison, candidate: NamedModel, target: str, limit: float | None
) -> Iterator[Verdict]:
    drop, fault = found.drop(target, candidate.name), found.fault(target, candidate.name)
    if drop is not None or fault:
        speedups = dict(_speedups(found, target, candidate.name))
        timed = found.latency.get((1, 1), {})
        noisy = any(one.is_noisy for key, one in timed.items() if key.startswith(f"{target}/"))
        yield judge(target, candidate.name, speedups, drop, limit, noisy, fault)
    for board in found.boards.get((target, candidate.name), ()):
        assert candidate.recipe is not None  # a run's
        said = device_verdict(candidate.name, candidate.recipe.precision, board)
        if said is not None:
            yield said


def _speedups(
    found: Comparison, target: str, name: str
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Over each of the baseline's settings, batch 1, one thread."""
    timed = found.latency.get((1, 1), {})
    candidate = timed.get(f"{target}/{name}")
    for other in (found.baseline.name, found.baseline.name + BF16):
        baseline = timed.get(f"{target}/{other}")
        if candidate is not None and baseline is not None:
            yield other, candidate.speedup_over(baseline)
