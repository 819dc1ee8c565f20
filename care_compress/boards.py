"""What boards measured and `import-results` brought home, beside what was measured here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from care_compress.evaluate.verdicts import Verdict
from care_compress.export.device_results import DeviceResults
from care_compress.finished import as_written

BASELINE = "fp16"


def measured_on_boards(run: Path) -> dict[str, dict[str, Any]]:
    """The newest results of every target, by target."""
    every = []
    for path in sorted(run.glob("measured/*.json")):
        with as_written(path):
            # As it was checked when it was imported.
            every.append(DeviceResults.model_validate_json(path.read_text(encoding="utf-8")))
    every.sort(key=lambda found: found.measured_at)
    return {found.target: found.model_dump(mode="json") for found in every}


def board_rows(name: str, precision: str, found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A row for each engine of a board, with where it was measured; nothing is computed here."""
    for model, engine in found["models"].items():
        speed, accuracy = engine["speed"], engine["accuracy"]
        yield (
            name if model == precision else f"{name} {model}",
            {
                "available": True,
                "why": "",
                "top1": None if accuracy is None else accuracy["top1"],
                "latency_ms": None if speed is None else speed["latency_ms"],
                "throughput": None if speed is None else speed["throughput"],
                "int8_mac_share": None,
                "size_bytes": engine["size_bytes"],
                "measured_on": {
                    "board": found["board"]["name"],
                    "library": f"{found['board']['library']} {found['board']['library_version']}",
                    "jetpack": found["board"]["jetpack"],
                    "power_mode": None if speed is None else speed["before"]["power_mode"],
                    "at": found["measured_at"],
                },
            },
        )


def board_verdict(name: str, precision: str, found: dict[str, Any]) -> Verdict | None:
    """What a board's own figures say; it measured both engines in turns."""
    target, board = found["target"], found["board"]["name"]
    speeds = {model: engine["speed"] for model, engine in found["models"].items()}
    accuracy = found["models"].get(precision, {}).get("accuracy")
    if accuracy is not None and not accuracy["passed"]:
        text = f"{name} does not pay: its engine failed verify on {board}"
        return Verdict(target, name, False, text)
    if speeds.get(precision) is None or speeds.get(BASELINE) is None:
        return None
    ratio = speeds[BASELINE]["latency_ms"]["p50"] / speeds[precision]["latency_ms"]["p50"]
    verb = "pays" if ratio > 1 else "does not pay"
    return Verdict(target, name, ratio > 1, f"{name} {verb}: {ratio:.2f}x over FP16 on {board}")
