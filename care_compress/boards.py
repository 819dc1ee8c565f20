"""What devices measured and `import-results` brought home, beside what was measured here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from care_compress.device.cpu_app import FLOAT
from care_compress.device.sensors import is_busy
from care_compress.errors import CareError
from care_compress.evaluate.verdicts import Verdict
from care_compress.export.device_results import (
    CpuResults,
    check_export,
    counted_threads,
    parse_results,
)
from care_compress.finished import as_written


def measured_on_boards(run: Path) -> list[dict[str, Any]]:
    """The newest engines of every target, and every machine's CPU files in every setting."""
    newest = {}
    every = []
    for path in sorted(run.glob("measured/*.json")):
        with as_written(path):
            # As it was checked when it was imported.
            results = parse_results(path.read_text(encoding="utf-8"))
        try:
            check_export(results, path, run)
        except CareError:
            continue  # the run was exported again since: these are figures of other files
        every.append((results, path.stem))
    for results, name in sorted(every, key=lambda one: one[0].measured_at):
        newest[name if isinstance(results, CpuResults) else results.target] = results
    return [results.model_dump(mode="json") for results in newest.values()]


def board_rows(name: str, precision: str, found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A row for each model on a device, with where it was measured; nothing is computed here."""
    board = found["board"]
    for model, one in found["models"].items():
        speed, accuracy = one["speed"], one["accuracy"]
        label = name if model == precision else f"{name} {model}"
        yield (
            # A CPU's files are measured here, too, and on any number of other machines.
            f"{label} on {_place(found)}" if _is_of_cpu(found) else label,
            {
                "available": True,
                "why": "",
                "top1": None if accuracy is None else accuracy["top1"],
                "latency_ms": None if speed is None else speed["latency_ms"],
                "throughput": None if speed is None else speed["throughput"],
                "int8_mac_share": None,
                "size_bytes": one["size_bytes"],
                "measured_on": {
                    "model": label,
                    "board": board["name"],
                    "library": f"{board['library']} {board['library_version']}",
                    "jetpack": board.get("jetpack"),
                    "power_mode": None if speed is None else speed["before"].get("power_mode"),
                    "batch": None if speed is None else speed["batch"],
                    "threads": None if speed is None else speed.get("threads"),
                    "verified": None if accuracy is None else accuracy["passed"],
                    "at": found["measured_at"],
                },
            },
        )


def board_verdict(name: str, precision: str, found: dict[str, Any]) -> Verdict | None:
    """What a device's own figures say; it measured both models in turns."""
    target, place = found["target"], _place(found)
    baseline, model = (FLOAT, "file") if _is_of_cpu(found) else ("fp16", "engine")
    speeds = {model: one["speed"] for model, one in found["models"].items()}
    accuracy = found["models"].get(precision, {}).get("accuracy")
    if accuracy is not None and not accuracy["passed"]:
        text = f"{name} does not pay: its {model} failed verify on {place}"
        return Verdict(target, name, False, text)
    if precision == baseline or speeds.get(precision) is None or speeds.get(baseline) is None:
        return None
    ratio = speeds[baseline]["latency_ms"]["p50"] / speeds[precision]["latency_ms"]["p50"]
    said = f"{ratio:.2f}x over {baseline.upper()} on {place}"
    load = speeds[precision]["before"].get("load_average")
    if is_busy(load, found["board"].get("cores", 1)):
        return Verdict(target, name, None, f"{name}: other programs were at work: {said}")
    verb = "pays" if ratio > 1 else "does not pay"
    return Verdict(target, name, ratio > 1, f"{name} {verb}: {said}")


def _is_of_cpu(found: dict[str, Any]) -> bool:
    return "gpu" not in found["board"]


def _place(found: dict[str, Any]) -> str:
    """The device, with the number of threads where a CPU's files were timed."""
    speeds = [one["speed"] for one in found["models"].values() if one["speed"] is not None]
    threads = speeds[0].get("threads") if speeds else None
    name = str(found["board"]["name"])
    return name if threads is None else f"{name}, {counted_threads(threads)}"
