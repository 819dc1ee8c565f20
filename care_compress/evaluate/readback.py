"""A file read back on this processor: whether it still answers as the model it was made from.

An export reads its own files back, but on the processor that made them. Where another one rounds,
adds or saturates in its own way, only a file read there can tell.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict
from torch import Tensor

from care_compress.console import CheckResult
from care_compress.evaluate.agreement import Agreement, HeldImages, held_to
from care_compress.tasks.intervals import unpaired_interval
from care_compress.tasks.task import Metric, Task, value_of

CHECK = "files beside their models"
LARGEST_HALF = 65504.0
HEADROOM = 0.5  # of it: other images reach further than the ones that were looked at


@dataclass(frozen=True)
class Peak:
    """The largest magnitude among the float16 values of a graph."""

    # An overflow is infinite, and JSON has no number for that.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="strings")

    value: float
    layer: str

    @property
    def fits(self) -> bool:
        """Whether float16 holds it, with room for other images."""
        return self.value <= HEADROOM * LARGEST_HALF

    def __str__(self) -> str:
        reach = f"{self.value:.3g}" if math.isfinite(self.value) else "infinity"
        return f"its float16 values reach {reach} at {self.layer}, and float16 ends at 65504"

    def as_json(self) -> dict[str, Any]:
        """As ``export.json`` holds it; no value where float16 overflowed."""
        return {"value": self.value if math.isfinite(self.value) else None, "layer": self.layer}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> "Peak":
        """What `as_json` gave."""
        return cls(math.inf if found["value"] is None else found["value"], found["layer"])


@dataclass(frozen=True)
class ReadBack:
    """The metric of a file here and of its model, in percent, and what tells them apart."""

    metric: Metric
    value: float
    images: int
    model_value: float
    # Where the model's answers to these very images are known, these decide.
    near: Agreement | None = None
    # 95 %, of model minus file in points; where only the model's top-1 is known, this decides.
    interval: tuple[float, float] | None = None

    @property
    def holds(self) -> bool:
        """Whether it is as near as the export promised, or below the model only by chance.

        A file above its model holds: a target's own rules may leave layers in float.
        """
        if self.near is not None:
            return self.near.holds
        return self.interval is None or self.interval[0] <= 0

    def __str__(self) -> str:
        """Both numbers, and how near the answers are."""
        both = f"{self.metric.name} {self.value:.2f} % where its model has {self.model_value:.2f} %"
        if self.near is None:
            assert self.interval is not None
            low, high = self.interval
            return f"{both}, a difference of [{low:.2f}, {high:.2f}] points"
        where = f"{both}, on the same {self.images:,} images"
        if not self.near.comparable:
            return f"{where}: it answers NaN or infinity"
        return (
            f"{where}: {self.near.percent:.1f} % of answers are the same, {self.near} of at least "
            f"{self.near.least_db:.1f}"
        )

    def as_json(self) -> dict[str, Any]:
        """As ``compare.json`` holds it."""
        return {
            "holds": self.holds,
            "images": self.images,
            self.metric.key: self.value,
            f"model_{self.metric.key}": self.model_value,
            **({} if self.near is None else self.near.as_json()),
            **({} if self.interval is None else {"model_minus_file_ci95": list(self.interval)}),
        }


def read_back(
    task: Task, model: Tensor, file: Tensor, held: HeldImages, least_db: float
) -> ReadBack:
    """Judge a file whose model's answers to the same images are known."""
    near = held_to(least_db, task.rows(model), task.rows(file), len(held))
    scores = (task.count(answers, held.as_batch()) for answers in (file, model))
    here, known = (value_of(score, task.metric) for score in scores)
    return ReadBack(task.metric, here, len(held), known, near=near)


def counted_only(
    metric: Metric, value: float, images: int, model_value: float, model_images: int
) -> ReadBack:
    """Judge a file whose model is known by its share of right answers alone."""
    interval = unpaired_interval(model_value, model_images, value, images)
    return ReadBack(metric, value, images, model_value, interval=interval)


def read_back_checks(
    read: Mapping[str, ReadBack], failed: Mapping[str, str], unread: Mapping[str, str]
) -> list[CheckResult]:
    """Check by file how near each came, why its export failed, or why it was not read back."""
    wrong = {key: str(one) for key, one in read.items() if not one.holds}
    # An export that failed is told beside what the file does here, which may be right.
    items = [f"{key}: {why}" for key, why in (*wrong.items(), *failed.items())]
    checks = []
    if items:
        files = len(wrong.keys() | failed.keys())
        text = (
            f"{files} of {len(read.keys() | failed.keys())} files are not the model they were made "
            "from; their accuracy and speed are not the model's"
        )
        checks.append(CheckResult(CHECK, "warning", text, tuple(items)))
    elif read:
        text = f"every file, of {len(read)}, answers on this processor as its model does"
        checks.append(CheckResult(CHECK, "fine", text))
    if unread:
        reasons = tuple(f"{key}: {why}" for key, why in unread.items())
        checks.append(CheckResult(CHECK, "not measured", "some could not be read back", reasons))
    return checks


def what_failed(export: Mapping[str, Any], precision: str | None = None) -> dict[str, str]:
    """Say by file why an export, as ``results.json`` holds it, is no model to use.

    The target itself stands for a file that was not written. `precision` asks for one file only.
    """
    if "failed" in export:
        return {str(export["target"]): f"the export failed: {export['failed']}"}
    models = export.get("models", {})
    chosen = models.values() if precision is None else [models.get(precision, {"holds": True})]
    found = {}
    for model in chosen:
        if model["holds"]:
            continue
        peak = model.get("float16_peak")
        said = "it answers NaN or infinity"
        if peak is not None and not Peak.of_json(peak).fits:
            said = str(Peak.of_json(peak))
        elif model["sqnr_db"] is not None:
            said = (
                f"{model['agreement']:.1f} % of answers as its model's, {model['sqnr_db']:.1f} dB "
                f"of at least {model['least_sqnr_db']:.1f}"
            )
        where = model.get("parts_at")
        found[model["file"]] = f"{said}; it parts at {where}" if where else said
    return found


def exports_check(exports: Mapping[str, Mapping[str, Any]]) -> CheckResult:
    """Check that every file is there and computes what its model does; from results.json.

    A target that cannot execute the model is no failure, and counts for nothing here.
    """
    files = sum(len(export.get("models", {})) for export in exports.values())
    failed = [
        f"{target}: {why}" if file == target else f"{target}, {file}: {why}"
        for target, export in exports.items()
        for file, why in what_failed(export).items()
    ]
    if failed:
        missing = sum("failed" in export for export in exports.values())
        text = (
            f"{len(failed)} of {files + missing} files could not be made, or do not compute what "
            "their model does; the accuracy of the run is not theirs"
        )
        return CheckResult("exports", "warning", text, tuple(failed))
    if not files:
        return CheckResult("exports", "not measured", "this run has no exported file to read back")
    text = f"every file, of {files}, was read back and computes what its model does"
    return CheckResult("exports", "fine", text)


def answers_beside(path: Path, name: str) -> Path:
    """Return the file of the logits that a file's model gives; `name` is its precision."""
    return path.with_name(f"expected_{name}.npy")
