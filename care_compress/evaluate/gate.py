"""``care-compress gate RUN --baseline FILE``: whether a run became worse than a stored comparison.

What `compare` left in the run is held against an earlier ``compare.json``, target by target, and a
regression is what is beyond doubt: the whole 95 % interval of a change lies beyond its limit. Times
of two runs say nothing of each other, so speed is how a file stands to the float file that took
turns with it; a machine that was slow for both changes nothing. This file opens no model and
measures nothing.
"""

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree  # nosec B405 # written here, never parsed

from rich.console import Console

from care_compress.console import listed, one_line, say, shortened
from care_compress.errors import CareError, RunError
from care_compress.evaluate.stored_comparison import ComparedModel, StoredImages, read_compared
from care_compress.files import read_json, write_text
from care_compress.run.finished import FinishedRun, as_written, find_run
from care_compress.tasks.intervals import Interval, drop_interval, negated, sum_interval

NOT_IN_XML = re.compile("[\ufffe\uffff]")  # the only ones that `one_line` lets through
SAME_FLOAT = 0.005  # points: two versions of a runtime round differently
UNKNOWN_WEIGHTS = "the baseline does not say of which float weights it is: store it anew"


@dataclass(frozen=True)
class GateOptions:
    """How much worse a run may be.

    A drop of 0.3 points is what the shipped INT8 recipes allow. How a file stands to the float file
    also depends on what else the machine does (LOG.md), which no interval of one run knows. Weights
    of one plan are equally large; names and metadata around them differ by 1 % between versions of
    a library.
    """

    max_drop: float = 0.3  # points of top-1, or of the metric of another task
    max_slowdown: float = 10.0  # percent of latency, beside the float model's
    max_size: float = 2.0  # percent of bytes

    def check(self) -> None:
        """Raise unless every limit is one: nothing is ever beyond NaN."""
        for name, limit in vars(self).items():
            if not (math.isfinite(limit) and limit >= 0):
                option = f"--{name.replace('_', '-')}"
                raise CareError(f"{option} {limit:g} is no limit.", f"give {option} 0 or more")


@dataclass(frozen=True)
class Checked:
    """One check of one target: what was found, and whether it is a regression beyond doubt."""

    target: str
    what: str  # the metric, speed, size, or measured
    text: str
    regressed: bool
    in_doubt: bool = False  # beyond the limit, but not by its whole interval
    seen_from: float = 0.0  # the least change that would have been a regression

    def __str__(self) -> str:
        return f"REGRESSION {self.target}: {self.text}"


def run_gate(
    runs: Path,
    name: str,
    baseline: Path,
    options: GateOptions,
    junit: Path | None,
    console: Console,
) -> int:
    """Hold a run against a stored comparison; one line for each regression, 0 if there is none."""
    options.check()
    run = find_run(runs, name)
    path = run.path / "compare.json"
    again = shlex.join(["care-compress", "compare", "fp32", name, "--runs", str(runs)])
    if not path.is_file():
        raise RunError(f"{name} was not compared yet: there is no {path}.", again)
    now = read_compared(path, name, again)
    if now.name != name:
        raise RunError(f"{path} is not of {name} but of {now.name}.", again)
    check_current(run, now, again)
    store = shlex.join(["cp", str(path), str(baseline)])
    before = read_compared(baseline, name, f"store one: {store}")
    check_comparable(before, now)
    checks = list(compared(before, now, options))
    if junit is not None:
        write_text(junit, as_junit(name, checks))
    regressions = [check for check in checks if check.regressed]
    for check in regressions:
        say(one_line(str(check)), console)
    if not regressions:
        say(one_line(summary(before, now, checks, options)), console)
    return 1 if regressions else 0


def check_current(run: FinishedRun, now: ComparedModel, again: str) -> None:
    """Raise unless the files that were compared are those that the run has now."""
    for target in now.targets:
        row, path = now.row(target), run.path / "exports" / target / "export.json"
        with as_written(path):
            known = {one["sha256"] for one in read_json(path)["models"].values()}
        if row is not None and row.sha256 not in known:
            raise RunError(
                f"{now.file} is of another file for {target} than {run.path.name} has now.", again
            )


def check_comparable(before: ComparedModel, now: ComparedModel) -> None:
    """Raise unless both are of one float model, one set of images and one kind of processor."""
    then, today, where = before.found, now.found, before.file
    if then.task != today.task:
        raise RunError(
            f"{where} is of {then.task}, {now.name} of {today.task}.",
            "store a baseline of this task",
        )
    for key in StoredImages.model_fields:
        old, new = getattr(then.data, key), getattr(today.data, key)
        if old != new:
            old, new = (shortened(str(one), 40) for one in (old, new))
            raise RunError(
                f"{where} is of other validation images or classes than {now.name}: {key} is {old} "
                f"in it, and {new} now.",
                "store a baseline of these images",
            )
    if then.images != today.images:
        raise RunError(
            f"{where} is of {then.images:,} images, {now.file} of {today.images:,}.",
            "compare on as many images as the baseline (--images)",
        )
    if not then.machine.is_kind_of(today.machine):
        raise RunError(
            f"{where} was measured on another kind of processor, {then.machine}; {now.name} on "
            f"{today.machine}.",
            "compare on that kind, or store a baseline for this one",
        )
    for old, new in (
        (before.made_from, now.made_from),
        (before.beside_made_from, now.beside_made_from),
    ):
        if len({old.checkpoint_sha256, new.checkpoint_sha256} - {None}) > 1:
            raise RunError(
                f"{where} is of another float model: other weights than {now.name} was made from.",
                "store a baseline of this model, or give quantize the checkpoint of that one",
            )
    kinds = {before.beside_made_from.precision, now.beside_made_from.precision} - {None}
    if len(kinds) > 1:
        raise RunError(
            f"{where} has its model beside {before.beside}, {now.file} beside {now.beside}, and "
            "these are of different precision.",
            "name the same kind of model first in both comparisons",
        )
    if not before.targets:
        raise RunError(
            f"{where} has no file of {before.name} that could be run.",
            "store a baseline of a machine that can run one",
        )


def compared(before: ComparedModel, now: ComparedModel, options: GateOptions) -> Iterator[Checked]:
    """Yield every check of every target of the baseline, and what is new here."""
    ways = (
        (now.task.metric.name, ComparedModel.drop, accuracy_check, options.max_drop),
        ("speed", ComparedModel.speedup, speed_check, options.max_slowdown),
        ("size", ComparedModel.size, size_check, options.max_size),
    )
    for target in before.targets:
        if now.row(target) is None:
            row = now.found.targets.get(target, {}).get(now.name)
            why = f": {row.why}" if row is not None and row.why else ""
            text = f"was measured in the baseline and is not measured now{why}"
            yield Checked(target, "measured", text, True)
            continue
        for what, known, check, limit in ways:
            if known(before, target) is None:  # engines are scored and not timed
                continue
            if known(now, target) is None:
                text = f"{what} was measured in the baseline and is not measured now"
                yield Checked(target, what, text, True)
            else:
                yield check(before, now, target, limit)
    for target in now.targets:
        if target not in before.targets:
            yield Checked(target, "measured", "is new: the baseline does not have it", False)


def accuracy_check(before: ComparedModel, now: ComparedModel, target: str, limit: float) -> Checked:
    """The metric of the baseline's file minus that of the present one, in points.

    Both were scored beside the float model on the same images, so most of what makes one metric
    uncertain cancels: the change is

        drop_now - drop_before + (float_before - float_now)

    joined by `sum_interval`. The last part is mostly nothing; it is what a fault costs that both
    files share, say in how images are prepared. Drops of two versions on the same images err to
    the same side, which makes the interval too wide rather than too narrow.
    """
    drops = before.drop(target), now.drop(target)
    floats = before.metric_beside(target), now.metric_beside(target)
    assert drops[0] and drops[1] and floats[0] is not None and floats[1] is not None
    shift, unheld = shift_of_float(before, now, target, floats[0], floats[1])
    change = sum_interval(drops[1], negated(drops[0]), shift)
    what = now.task.metric.name
    was, value = floats[0] - drops[0][0], floats[1] - drops[1][0]
    text = f"{what} fell by {spread(change, 2)} points, from {was:.2f} % to {value:.2f} %"
    return held(target, what, f"{text}; the limit is {limit:g}{unheld}", change, limit)


def shift_of_float(
    before: ComparedModel, now: ComparedModel, target: str, was: float, value: float
) -> tuple[Interval, str]:
    """What the float file itself lost between two comparisons, and what is to be said of it.

    A share of images is counted: the fewest answers that can have turned have an interval. Another
    metric has one only where both comparisons stored it, and then as if their images were not the
    same: it is wide, and finds what is gross.
    """
    images = now.found.images
    if now.task.interval(value, images) is not None:
        lost = round((was - value) * images / 100)
        return (100 * lost / images, *drop_interval(max(lost, 0), max(-lost, 0), images)), ""
    if abs(was - value) < SAME_FLOAT:
        return (0.0, 0.0, 0.0), ""
    stored = before.interval_beside(target), now.interval_beside(target)
    if stored[0] and stored[1]:
        return sum_interval(stored[0], negated(stored[1])), ""
    told = f"; {now.beside} itself went from {was:.2f} % to {value:.2f} %, which cannot be held"
    return (0.0, 0.0, 0.0), f"{told}: the baseline has no interval of it"


def speed_check(before: ComparedModel, now: ComparedModel, target: str, limit: float) -> Checked:
    """Latency in units of the float file's in the same run, now over before, in percent.

    Ratios multiply, so their logarithms are joined by `sum_interval`.
    """
    ratios = before.speedup(target), now.speedup(target)
    assert ratios[0] and ratios[1]
    was, speed = ((math.log(a), math.log(b), math.log(c)) for a, b, c in (ratios[0], ratios[1]))
    value, low, high = (100 * math.expm1(end) for end in sum_interval(was, negated(speed)))
    text = (
        f"latency grew by {spread((value, low, high), 1)} % beside that of {now.beside}, from "
        f"{ratios[0][0]:.2f} to {ratios[1][0]:.2f} times its speed; the limit is {limit:g} %"
    )
    return held(target, "speed", text, (value, low, high), limit)


def size_check(before: ComparedModel, now: ComparedModel, target: str, limit: float) -> Checked:
    """Bytes of the file, now over before, in percent; counted, so there is nothing to doubt."""
    was, size = before.size(target), now.size(target)
    assert was is not None and size is not None
    growth = 100 * (size / was - 1)
    text = f"size grew by {growth:.1f} %, from {was:,} to {size:,} bytes; the limit is {limit:g} %"
    return held(target, "size", text, (growth, growth, growth), limit)


def held(target: str, what: str, text: str, change: Interval, limit: float) -> Checked:
    """Hold a change against its limit, by the end of its interval that speaks for the run."""
    value, low, _ = change
    return Checked(target, what, text, low > limit, low <= limit < value, limit + value - low)


def spread(change: Interval, digits: int) -> str:
    """Write a change and the ends of its interval."""
    value, low, high = (f"{end:.{digits}f}" for end in change)
    return f"{value} [{low}, {high}]"


def summary(
    before: ComparedModel, now: ComparedModel, checks: list[Checked], options: GateOptions
) -> str:
    """Say in one line what was compared, and what a reader should know of it."""
    new = [check.target for check in checks if check.what == "measured"]
    limits = []
    for what, limit, unit in (
        (now.task.metric.name, options.max_drop, "points"),
        ("speed", options.max_slowdown, "%"),
        ("size", options.max_size, "%"),
    ):
        # On the target that tells least: a gate that passes says what it could have missed.
        seen = max((check.seen_from for check in checks if check.what == what), default=None)
        if seen is not None:
            limits.append(f"{what} {limit:g} {unit}, seen from {seen:.2g}")
    parts = [
        f"{now.name} is not worse than {before.name} of {before.file}: {len(checks) - len(new)} "
        f"checks on {listed(before.targets)} (limits: {'; '.join(limits)})"
    ]
    if new:
        parts.append(f"new, with nothing to hold it against: {listed(new)}")
    parts += [f"not beyond doubt: {one.target}: {one.text}" for one in checks if one.in_doubt]
    if before.made_from.checkpoint_sha256 is None and now.made_from.checkpoint_sha256 is not None:
        parts.append(UNKNOWN_WEIGHTS)
    return "; ".join(parts)


def as_junit(run: str, checks: list[Checked]) -> str:
    """Write the checks as JUnit XML: one case for each target and check."""
    failures = str(sum(check.regressed for check in checks))
    about = {"tests": str(len(checks)), "failures": failures, "errors": "0", "skipped": "0"}
    suites = ElementTree.Element("testsuites", about)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "care-compress gate", **about})
    for check in checks:
        names = {"classname": in_xml(f"{run}.{check.target}"), "name": check.what}
        case = ElementTree.SubElement(suite, "testcase", names)
        if check.regressed:
            line = in_xml(str(check))
            ElementTree.SubElement(case, "failure", {"message": line}).text = line
        else:
            ElementTree.SubElement(case, "system-out").text = in_xml(check.text)
    ElementTree.indent(suites)
    body = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def in_xml(text: str) -> str:
    """Replace what no XML file may hold, however it is escaped."""
    return NOT_IN_XML.sub("?", one_line(text))
