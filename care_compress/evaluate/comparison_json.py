"""A comparison as ``compare.json``: an interface, stable; points in percent.

Keys beside those of the interface say more and may grow.
"""

from itertools import product
from typing import Any

import numpy as np

from care_compress import machine
from care_compress.data.samples import Samples
from care_compress.evaluate.comparison import BF16, Comparison, Entry
from care_compress.evaluate.device_measurements import device_rows
from care_compress.evaluate.latency import Latency
from care_compress.evaluate.pairs import NO_ANSWER, calibration_error, changes, mcnemar_p
from care_compress.evaluate.resolve import NamedModel
from care_compress.files import digest_of, size_of
from care_compress.recipe.sections import DataSection

LISTED_FLIPS = 100
# Where a model's own figures are taken, if it runs on several targets.
FIRST_TARGETS = ("openvino-cpu", "onnxruntime-cpu")


def comparison_as_json(found: Comparison, samples: Samples, data: DataSection) -> dict[str, Any]:
    """Everything that was found."""
    return {
        "images": len(found.collected.labels),
        "models": {one.name: _model(found, one) for one in found.models},
        "pairs": [
            pair
            for target, one in product(found.targets, found.models[1:])
            if (pair := _pair(found, target, one.name, samples)) is not None
        ],
        "targets": {target: _target(found, target) for target in found.targets},
        "checks": [check.as_json() for check in found.checks],
        "verdicts": [
            {"target": v.target, "candidate": v.candidate, "pays": v.pays, "text": v.text}
            for v in found.verdicts
        ],
        "budgets": [budget.as_json() for budget in found.budgets],
        "latency": [
            _setting(found, batch, threads, timed)
            for (batch, threads), timed in found.latency.items()
        ],
        "data": {**data.model_dump(mode="json"), "samples": samples.fingerprint()},
        "machine": {
            **machine.describe(),
            "load_average": found.load_average,
            "noisy": found.is_noisy,
        },
    }


def _first(found: Comparison, name: str) -> Entry | None:
    order = [*FIRST_TARGETS, *found.targets]
    return next((e for target in order if (e := found.entry(target, name)) is not None), None)


def _model(found: Comparison, one: NamedModel) -> dict[str, Any]:
    entry = _first(found, one.name)
    answers = None if entry is None else found.collected.answers[entry.key]
    return {
        "top1": None if answers is None else answers.top1,
        "top5": None if answers is None else answers.top5,
        "size_bytes": None if entry is None else size_of(entry.path),
        "params": one.parameters,
        "run": None if one.run is None else str(one.run),
        "measured_on": None if entry is None else entry.target,
    }


def _pair(found: Comparison, target: str, name: str, samples: Samples) -> dict[str, Any] | None:
    drop = found.drop(target, name)
    pair = (found.entry(target, found.baseline.name), found.entry(target, name))
    if drop is None or pair[0] is None or pair[1] is None:
        return None
    before, after = (found.collected.answers[entry.key] for entry in pair if entry)
    lost, gained = changes(before.right, after.right)
    same = (before.first == after.first) & (before.first != NO_ANSWER)
    labels, classes = found.collected.labels, samples.classes
    per_class = {}
    for place in np.unique(labels):
        of = labels == place
        gone = 100 * float(before.right[of].mean() - after.right[of].mean())
        per_class[classes[int(place)]] = gone
    flipped = np.flatnonzero(~same)[:LISTED_FLIPS]
    return {
        "target": target,
        "baseline": found.baseline.name,
        "candidate": name,
        "drop": drop.value,
        "drop_ci95": [drop.low, drop.high],
        "agreement": 100 * float(same.mean()),
        "mcnemar_p": mcnemar_p(lost, gained),
        "lost": lost,
        "gained": gained,
        "sqnr_db": after.sqnr_db,
        "ece": {
            found.baseline.name: calibration_error(before.confidence, before.right),
            name: calibration_error(after.confidence, after.right),
        },
        "drop_per_class": per_class,
        "flipped": [
            {
                "index": int(found.collected.indices[i]),
                "label": classes[int(labels[i])],
                "before": _answer(classes, int(before.first[i])),
                "after": _answer(classes, int(after.first[i])),
            }
            for i in flipped
        ],
        "flipped_in_all": int((~same).sum()),
    }


def _answer(classes: tuple[str, ...], first: int) -> str:
    return "no number" if first == NO_ANSWER else classes[first]


def _target(found: Comparison, target: str) -> dict[str, Any]:
    names = [one.name for one in found.models]
    if found.entry(target, found.baseline.name + BF16) is not None:
        names.insert(1, found.baseline.name + BF16)
    rows = {name: _on_target(found, target, name) for name in names}
    for one in found.models:
        for board in found.boards.get((target, one.name), ()):
            assert one.recipe is not None  # a run's
            rows.update(device_rows(one.name, one.recipe.precision, board))
    return rows


def _on_target(found: Comparison, target: str, name: str) -> dict[str, Any]:
    entry = found.entry(target, name)
    if entry is None:
        why = found.missing.get((target, name), "no such file")
        return {"available": False, "why": why, **_layers(found, f"{target}/{name}")}
    timed = found.latency.get((1, 1), {}).get(entry.key)
    answers = found.collected.answers[entry.key]
    read = found.read_backs.get(entry.key)
    return {
        "available": True,
        "why": "",
        "top1": answers.top1,
        "top5": answers.top5,
        "not_finite": answers.broken,
        "latency_ms": None if timed is None else timed.percentiles(),
        "throughput": None if timed is None else timed.throughput,
        "int8_mac_share": _share(found, entry),
        **({} if read is None else {"read_back": read.as_json()}),
        "floats_in": entry.precision,
        "sha256": digest_of(entry.path),
        "size_bytes": size_of(entry.path),
        "load_seconds": found.load_seconds.get(entry.key),
        **_layers(found, entry.key),
        "peak_memory_bytes": found.peak_memory.get(entry.key),
    }


def _layers(found: Comparison, key: str) -> dict[str, Any]:
    """What runs, layer by layer, and the sums by kind."""
    profile = found.layers.get(key)
    return {} if profile is None else profile.as_json()


def _share(found: Comparison, entry: Entry) -> float | None:
    macs = (
        found.model(entry.name)
        .results.get("exports", {})
        .get(entry.target, {})
        .get("integer_macs", {})
    )
    share = macs.get("share")
    return None if share is None else float(share)


def _setting(
    found: Comparison, batch: int, threads: int, timed: dict[str, Latency]
) -> dict[str, Any]:
    rows = []
    for entry in found.entries:
        one = timed.get(entry.key)
        if one is None:
            continue
        base = timed.get(f"{entry.target}/{found.baseline.name}")
        over = None if base is None else one.speedup_over(base)
        rows.append(
            {
                "target": entry.target,
                "name": entry.name,
                "latency_ms": one.percentiles(),
                "throughput": one.throughput,
                "speedup": None if over is None else over[0],
                "speedup_ci95": None if over is None else list(over[1:]),
                "runs": len(one.milliseconds),
                "noisy": one.is_noisy,
            }
        )
    return {"batch": batch, "threads": threads, "rows": rows}
