"""``care-compress compare fp32 int8``: side by side on every target, with a verdict.

What is measured stands in `care_compress.evaluate.file_measurements`, what was found in
`care_compress.evaluate.comparison`; here stand who is compared, what the measurements mean, and
what is printed.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from care_compress.console import say, show_checks, widened
from care_compress.device.cpu_app import FLOAT
from care_compress.device.manifest import precision_of
from care_compress.device.sensors import is_busy
from care_compress.errors import DataError, RunError, TargetError
from care_compress.evaluate.comparison import (
    Budget,
    CompareOptions,
    Comparison,
    Verdict,
    comparison_as_json,
)
from care_compress.evaluate.device_field import field_tables
from care_compress.evaluate.device_measurements import (
    counted_threads,
    fastest_of,
    is_of_cpu,
    place_of,
)
from care_compress.evaluate.differences import draw_differences
from care_compress.evaluate.file_measurements import (
    find_entries,
    profile_files,
    read_files_back,
    score,
    time_files,
)
from care_compress.evaluate.latency import show_machine
from care_compress.evaluate.layers import kind_table
from care_compress.evaluate.resolve import (
    MakeRun,
    NamedModel,
    float_recipe_of,
    named_models,
    same_images,
)
from care_compress.evaluate.slim_accuracy import slim_line
from care_compress.files import digest_of, json_text, size_of, write_text
from care_compress.recipe.sections import BudgetSection, DataSection
from care_compress.runtime.probe import probe
from care_compress.shipped import QUANTIZE, quantize_command
from care_compress.tasks.intervals import Interval
from care_compress.tasks.known import task_called, task_of
from care_compress.tasks.task import Drop, Task

WIDTH = 170  # of the tables: wider than the widest row, since rich cuts figures silently
ALIKE = 0.03  # medians of two measurements of one model on a device differ by about as much


def run_compare(
    names: list[str], runs: Path, options: CompareOptions, make_run: MakeRun, console: Console
) -> Comparison:
    """Compare, print, write ``compare.json``; `make_run` makes a float baseline that is missing."""
    models = [_settled(one, names, runs, make_run, console) for one in named_models(names, runs)]
    if len({one.name for one in models}) < len(models):
        raise RunError("two of the names mean the same model.", "name different runs")
    task = _common_task(models)
    data = _common_data(task, models, options)
    samples = task.samples(data, "val")
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
    collected = score(task, entries, models, samples, data, options, console)
    found = Comparison(task, data, samples, options, models, entries, missing, collected)
    read_files_back(found, console)
    time_files(found, console)
    profile_files(found, console)
    draw_differences(found, console)
    decide(found)
    _report(found, console)
    return found


def _settled(
    one: NamedModel | str, names: list[str], runs: Path, make_run: MakeRun, console: Console
) -> NamedModel:
    """Return the model that was named; a float baseline that has no run yet is made."""
    if isinstance(one, NamedModel):
        return one
    start = next(
        (c for c in named_models(names, runs) if isinstance(c, NamedModel) and c.run), None
    )
    if one != "fp32" or start is None:
        raise RunError(
            f"there is no run called {one}, of a recipe {one} or of that precision in {runs}.",
            f"{quantize_command(one)}, or name a run or a file",
        )
    name = f"{start.name}_fp32"
    console.print(f"no fp32 run of this model yet: making {escape(str(runs / name))}")
    make_run(float_recipe_of(start), runs, name, Console(quiet=True))
    (made,) = named_models([name], runs)
    assert isinstance(made, NamedModel)
    return made


def _common_data(task: Task, models: list[NamedModel], options: CompareOptions) -> DataSection:
    """Return the images all of them are scored on; different ones give no drop."""
    named = [(one.name, one.recipe.data) for one in models if one.recipe is not None]
    if not named and options.data is None:
        raise DataError(
            "bare files do not say which images they are for.", "add --data, --res and --crop"
        )
    wanted = options.data or named[0][1]
    for name, section in named:
        if not same_images(task.name, section, wanted):
            raise DataError(
                f"{name} looks at {section.source} at {section.resolution} pixels (crop "
                f"{section.crop_pct}), others do not: a drop between them means nothing.",
                "compare runs on the same data, resolution and crop",
            )
    return wanted


def _common_task(models: list[NamedModel]) -> Task:
    """Return what all of them were made for; a file says it of itself."""
    first, *others = {one.task: one.name for one in models}.items()
    if others:
        (task, name), (other, its) = first, others[0]
        raise DataError(
            f"{name} is for {task}, {its} for {other}: nothing of them can be compared.",
            "compare models of one task",
        )
    return task_called(first[0])


def _check_files(models: list[NamedModel], data: DataSection) -> None:
    """Raise unless files are those that were exported, or can be run, and prepare images alike."""
    for one in models:
        _ = one.checkpoint_sha256  # a damaged manifest is named now, not after minutes of work
        for path in one.files.values() if one.run is None else ():
            probe(path, data.resolution)
        for target, export in one.export_of.items() if one.run is not None else ():
            path = one.files[target]
            known = {entry["sha256"] for entry in export["models"].values()}
            if path.is_file() and digest_of(path) not in known:
                raise RunError(f"{path} is not the file that was exported.", f"{QUANTIZE} again")
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


def decide(found: Comparison) -> None:
    """Fill in a verdict for each target and candidate, and the budgets of the candidates."""
    options = found.options
    for candidate in found.models[1:]:
        name, files = candidate.name, candidate.files.values()
        budget = candidate.recipe.budget if candidate.recipe else BudgetSection()
        limit = budget.max_drop if options.max_drop is None else options.max_drop
        drops = {target: found.drop(target, name) for target in found.targets}
        for target, drop in drops.items():
            speedups, fault = found.speedups(target, name), found.fault(target, name)
            same = found.agreement(target, name)
            if drop is not None or fault:
                things = found.task.same.things
                said = judge(target, name, speedups, drop, same, limit, fault, things)
                found.verdicts.append(said)
            for board in found.device_results.get((target, name), ()):
                assert candidate.recipe is not None  # a run's
                on_device = device_verdict(name, candidate.recipe.precision, board)
                if on_device is not None:
                    found.verdicts.append(on_device)
            least = options.min_speedup or (budget.min_speedup or {}).get(target)
            if least is not None and found.entry(target, name):
                over = speedups.get(found.baseline.name)
                value = None if over is None else over[0]
                ok = value is not None and value >= least
                found.budgets.append(Budget(f"min_speedup on {target}", least, value, ok))
        if limit is not None:
            worst = max((drop.value for drop in drops.values() if drop is not None), default=None)
            ok = worst is not None and worst <= limit
            found.budgets.append(
                Budget(f"max_{found.task.metric.key}_drop of {name}", limit, worst, ok)
            )
        least = options.min_agreement or budget.min_agreement
        if least is not None:
            shares = (found.agreement(target, name) for target in found.targets)
            value = min((share for share in shares if share is not None), default=None)
            ok = value is not None and value >= least
            found.budgets.append(Budget(f"min_agreement of {name} (%)", least, value, ok))
        if budget.max_size is not None:
            size = max(map(size_of, files), default=0) / 1e6
            ok = size <= budget.max_size
            found.budgets.append(Budget(f"max_size of {name} (MB)", budget.max_size, size, ok))


def judge(
    target: str,
    candidate: str,
    speedups: dict[str, Interval],
    drop: Drop | None,
    agreement: float | None,
    max_drop: float | None,
    fault: str = "",
    things: str = "answers",
) -> Verdict:
    """Decide for one target by the ends of the intervals, alike in both directions.

    `speedups` are over what a user could run instead: FP32, and BF16 or FP16 where there is.
    `agreement` is the percent of answers as the baseline's, or of other `things`. `fault` says why
    the file is not the model it was made from: such a file never pays.
    """
    if fault:
        return Verdict(target, candidate, False, f"{candidate} does not pay, because {fault}")
    if not speedups or drop is None or agreement is None:
        return Verdict(target, candidate, None, "nothing to compare with was measured")
    parts = [f"{value:.2f}x over {name}" for name, (value, _, _) in speedups.items()]
    told = ", ".join([*parts, str(drop), f"{agreement:.2f} % of {things} the same"])
    name, (value, _, _) = min(speedups.items(), key=lambda item: item[1][0])
    low, high = (min(one[end] for one in speedups.values()) for end in (1, 2))
    between = f"{value:.2f} [{low:.2f}, {high:.2f}] times the speed of {name}"
    loses = f"it loses more than {max_drop:g} points" if max_drop is not None else ""
    if max_drop is not None and drop.low > max_drop:
        return Verdict(
            target, candidate, False, f"{candidate} does not pay, because {loses}: {told}"
        )
    if high < 1:
        text = f"{candidate} does not pay, because it runs at {between}: {told}"
        return Verdict(target, candidate, False, text)
    unknown = []
    if low <= 1:
        unknown.append(f"the difference in speed is within the noise ({between})")
    if max_drop is not None and drop.high > max_drop:
        unknown.append(f"these images are too few to say whether {loses}")
    elif max_drop is None and drop.low > 0:
        unknown.append("it loses accuracy, and no budget says how much it may (--max-drop)")
    if unknown:
        return Verdict(target, candidate, None, f"{candidate}: {'; '.join(unknown)}: {told}")
    return Verdict(target, candidate, True, f"{candidate} pays: {told}")


def device_verdict(name: str, precision: str, found: dict[str, Any]) -> Verdict | None:
    """Decide by what a device measured of both models in turns; None where it measured one."""
    target, place = found["target"], place_of(found)
    baseline, model = (FLOAT, "file") if is_of_cpu(found) else ("fp16", "engine")
    speeds = {model: one["speed"] for model, one in found["models"].items()}
    accuracies = [
        one["accuracy"] for name, one in found["models"].items() if precision_of(name) == precision
    ]
    known = [one["passed"] for one in accuracies if one is not None]
    if known and not any(known):
        text = f"{name} does not pay: its {model} failed verify on {place}"
        return Verdict(target, name, False, text)
    fastest, plain = fastest_of(found, precision), fastest_of(found, baseline)
    if precision == baseline or fastest is None or plain is None:
        return None
    ratio = speeds[plain]["latency_ms"]["p50"] / speeds[fastest]["latency_ms"]["p50"]
    said = f"{ratio:.2f}x over {baseline.upper()} on {place}"
    if fastest != precision:
        said = f"{fastest} runs {said}"
    if abs(ratio - 1) < ALIKE:
        return Verdict(target, name, None, f"{name}: both are equally fast: {said}")
    load = speeds[fastest].get("before", {}).get("load_average")
    if is_busy(load, found["board"].get("cores", 1)):
        return Verdict(target, name, None, f"{name}: other programs were at work: {said}")
    verb = "pays" if ratio > 1 else "does not pay"
    return Verdict(target, name, ratio > 1, f"{name} {verb}: {said}")


def _report(found: Comparison, console: Console) -> None:
    """Print tables; write ``compare.json`` in the last run and where the user wants it."""
    value = comparison_as_json(found)
    text = json_text(value)
    last = found.models[-1].run
    paths = [p for p in (found.options.json_file, last and last / "compare.json") if p]
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
    if found.device_results:
        wide.print(device_table(value))
    for field in value["devices"]:
        for table in field_tables(field):
            wide.print(table)
    for target, rows in value["targets"].items():
        if any(one.get("layers_ms") for one in rows.values()):
            wide.print(kind_table(f"Where the time goes on {target}, batch 1, 1 thread", rows))
        elif any(one.get("by_kind") for one in rows.values()):
            wide.print(kind_table(f"Layers of the engines for {target}, not timed here", rows))
    for target in found.targets:
        reasons = {
            why
            for (where, name), why in found.missing.items()
            if where == target and (where, name) not in found.device_results
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
    for one in found.models:
        if "slim" in one.results:
            say(f"{one.name}: {slim_line(one.results)}", console)
    for budget in found.budgets:
        say(str(budget), console)
    for path in paths:
        console.print(f"written to {escape(str(path))}", soft_wrap=True)


def accuracy_table(value: dict[str, Any]) -> Table:
    """Show every file's accuracy beside the baseline's on the same target."""
    task = task_of(value)
    table = Table(title=f"Accuracy of the files on {value['images']:,} images")
    table.title_justify = "left"
    table.add_column("target", no_wrap=True)
    table.add_column("model", no_wrap=True)
    beside = "drop [95 %]", *task.paired.values(), task.same.name, "SQNR"
    for column in (*task.shown.values(), *beside, "size", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    pairs = {(pair["target"], pair["candidate"]): pair for pair in value["pairs"]}
    for target, models in value["targets"].items():
        for name, found in models.items():
            known = found["available"] and found[task.metric.key] is not None
            if not known or "measured_on" in found:
                continue
            pair, memory = pairs.get((target, name)), found.get("peak_memory_bytes")
            cells = [""] * len(beside)
            if pair is not None:
                low, high = pair["drop_ci95"]
                cells = [
                    f"{pair['drop']:.2f} [{low:.2f}, {high:.2f}]",
                    *(f"{pair[key]:.2g}" for key in task.paired),
                    f"{pair['agreement']:.2f} %",
                    "exact" if pair["sqnr_db"] is None else f"{pair['sqnr_db']:.1f} dB",
                ]
            table.add_row(
                target,
                escape(name),
                *(f"{found[key]:.2f} %" for key in task.shown),
                *cells,
                f"{found['size_bytes'] / 1e6:.2f} MB",
                "" if memory is None else f"{memory / 1e6:.1f} MB",
            )
    return table


def latency_table(setting: dict[str, Any]) -> Table:
    """Show latency at one batch size and number of threads."""
    title = f"Batch {setting['batch']}, {counted_threads(setting['threads'])}"
    table = Table(title=title, title_justify="left")
    table.add_column("target", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for column in ("p50 ms", "p90 ms", "p99 ms", "images/s", "times as fast [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in setting["rows"]:
        times = row["latency_ms"]
        faster = ""
        if row["speedup"] is not None:
            low, high = row["speedup_ci95"]
            faster = f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]"
        noisy = " noisy" if row["noisy"] else ""
        table.add_row(
            row["target"],
            escape(row["name"]),
            *(f"{times[p]:.2f}" for p in ("p50", "p90", "p99")),
            f"{row['throughput']:.0f}",
            faster + noisy,
        )
    return table


def device_table(value: dict[str, Any]) -> Table:
    """Show what other devices measured by the script of a bundle, each on its own."""
    metric = task_of(value).metric
    table = Table(title="Measured on devices, by the script of a bundle", title_justify="left")
    for column in ("target", "model", "device", "with"):
        table.add_column(column, overflow="fold")
    percentiles = ("p50", "p90", "p99")
    times_in = [f"{p} ms" for p in percentiles]
    for column in ("batch", *times_in, "images/s", f"{metric.name} of samples", "verified"):
        table.add_column(column, justify="right", no_wrap=True)
    for target, models in value["targets"].items():
        for one in models.values():
            where = one.get("measured_on")
            if not where:
                continue
            times, threads = one["latency_ms"] or {}, where["threads"]
            counted = None if threads is None else counted_threads(threads)
            setting = filter(None, (where["library"], where["power_mode"], counted))
            table.add_row(
                target,
                escape(where["model"]),
                escape(where["board"]),
                escape(", ".join(setting)),
                str(where["batch"] or ""),
                *(f"{times[p]:.2f}" if times else "" for p in percentiles),
                "" if one["throughput"] is None else f"{one['throughput']:.0f}",
                "" if one.get(metric.key) is None else f"{one[metric.key]:.2f} %",
                {True: "passed", False: "FAILED", None: "no"}[where["verified"]],
            )
    return table
