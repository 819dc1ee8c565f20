"""What a sweep found: rows, budgets, the best within them, and the fronts, as ``sweep.json``.

Latency is compared only where the same processor measured it. Accuracy is that of the run's
``results.json``; `compare` scores the files themselves.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from care_compress.recipe.sections import DROPS
from care_compress.sweep.sections import METRICS, ObjectiveSection, Sweep
from care_compress.sweep.trials import Row
from care_compress.tasks.task import Task

Value = Callable[[Row], float | None]


def size_of_row(row: Row, target: str | None = None) -> float | None:
    """Bytes of the file for a target; of the largest one without."""
    sizes: Mapping[str, int] = row.get("size_bytes") or {}
    if target is not None:
        return sizes.get(target)
    return max(sizes.values(), default=None)


def milliseconds(row: Row, target: str) -> float | None:
    """The median latency on a target, where it was measured."""
    timed = (row.get("latency") or {}).get(target, {})
    return None if "ms" not in timed else float(timed["ms"]["p50"])


def metric(objective: ObjectiveSection, row: Row) -> float | None:
    """The number that a trial is judged by; None where there is none."""
    if row["status"] != "finished":
        return None
    match objective.metric:
        case "size":
            value: float | None = size_of_row(row, objective.target)
        case "energy":
            value = row["energy_mj"]
        case "latency":
            value = milliseconds(row, str(objective.target))
        case accuracy:
            value = row[accuracy]
    return value


def judged(sweep: Sweep, row: Row) -> Row:
    """The row with its objective, and by how much it is over each budget (within: at most 0)."""
    budget, over = sweep.budget, dict[str, float | None]()
    if row["status"] == "finished":

        def hold(name: str, value: float | None, limit: float, sign: float = 1.0) -> None:
            over[name] = None if value is None else sign * (value - limit)

        for name in DROPS.values():  # of the sweep's own task; the others are not set
            limit = getattr(budget, name)
            if limit is not None:
                hold(name, row["drop"], limit)
        if budget.max_size is not None:
            size = size_of_row(row)
            hold("max_size", None if size is None else size / 1e6, budget.max_size)
        if budget.max_energy is not None:
            hold("max_energy", row["energy_mj"], budget.max_energy)
        for target, limit in budget.max_latency.items():
            hold(f"max_latency {target}", milliseconds(row, target), limit)
        for target, limit in budget.min_speedup.items():
            faster = (row.get("latency") or {}).get(target, {}).get("speedup")
            hold(f"min_speedup {target}", faster, limit, -1.0)
    known = [value for value in over.values() if value is not None]
    whole = row["status"] == "finished" and len(known) == len(over)
    # What could not be measured holds no budget, and says nothing to a search.
    objective = metric(sweep.objective, row) if whole else None
    within = whole and all(value <= 0 for value in known)
    return {**row, "objective": objective, "over": over, "within": within}


def best_of(sweep: Sweep, rows: Sequence[Row]) -> Row | None:
    """The best trial within every budget; of equals the one that lost least, then the smallest."""
    able = [row for row in rows if row["within"] and row["objective"] is not None]
    more = METRICS[sweep.objective.metric][1]
    return min(
        able,
        key=lambda row: (
            -row["objective"] if more else row["objective"],
            row["drop"],
            size_of_row(row) or 0,
            row["name"],
        ),
        default=None,
    )


def front(rows: Sequence[Row], cost: Value, accuracy: str) -> list[Row]:
    """Trials that no other beats: none costs as little and answers as well (Pareto), by cost.

    `accuracy` is the key of the task's metric.
    """
    priced = [(cost(row), row) for row in rows if row["status"] == "finished"]
    known = [(price, row) for price, row in priced if price is not None]
    found: list[Row] = []
    for _, row in sorted(known, key=lambda pair: (pair[0], -pair[1][accuracy], pair[1]["name"])):
        if not found or row[accuracy] > found[-1][accuracy]:
            found.append(row)
    return found


def same_processor(rows: Sequence[Row], target: str) -> dict[str, list[Row]]:
    """Rows that were timed on a target, by the processor that did it."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if milliseconds(row, target) is not None:
            found.setdefault(row["latency"][target]["processor_kind"], []).append(row)
    return found


def sweep_as_json(
    sweep: Sweep,
    task: Task,
    rows: Sequence[Row],
    baselines: Sequence[Row],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """As ``sweep.json`` holds it."""
    best, accuracy = best_of(sweep, rows), task.metric.key
    fronts: list[dict[str, Any]] = [
        {"cost": "size", "trials": [row["name"] for row in front(rows, size_of_row, accuracy)]}
    ]
    for target in () if sweep.timing is None else sweep.timing.targets:
        for alike in same_processor(rows, target).values():
            chosen = front(alike, partial(milliseconds, target=target), accuracy)
            fronts.append(
                {
                    "cost": "latency",
                    "target": target,
                    "processor": alike[0]["latency"][target]["processor"],
                    "trials": [row["name"] for row in chosen],
                }
            )
    return {
        "sweep": sweep.name,
        "task": task.name,
        "asked": sweep.model_dump(mode="json"),
        "trials": list(rows),
        "baselines": list(baselines),
        "best": None if best is None else best["name"],
        "fronts": fronts,
        **about,
    }


def compare_command(runs: str, baseline: str, name: str) -> str:
    """What to type to score and time a trial's files beside its float model."""
    return shlex.join(["care-compress", "compare", baseline, name, "--runs", runs])
