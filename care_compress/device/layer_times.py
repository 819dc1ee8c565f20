"""How long each layer of an engine takes, by TensorRT's own profiler.

Layers are timed one after the other, without a CUDA graph, so their sum is more than the latency of
a run; what counts is which of them are expensive, and in which precision.
"""

from collections.abc import Callable, Mapping
from typing import Any

from care_compress.device.bench import Benched
from care_compress.device.problems import DeployError
from care_compress.device.session import Session

_RUNS = 20


def time_layers(session: Session, description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer, the most expensive first: its mean time, and what it is.

    `description` is the engine's own, whose layers have the names that the profiler reports.
    """
    known = {str(layer["name"]): layer for layer in description.get("layers", ())}
    rows = []
    for name, milliseconds in session.layer_milliseconds(_RUNS).items():
        about = known.get(name, {})
        rows.append(
            {
                "name": name,
                "type": str(about.get("type", "unknown")),
                "precision": str(about.get("precision", "unknown")),
                "origin": list(about.get("origin", ())),
                "ms": milliseconds,
            }
        )
    return sorted(rows, key=lambda row: -float(str(row["ms"])))


def explain(
    sessions: Mapping[str, Session],
    engines: Mapping[str, Mapping[str, Any]],
    benched: Benched,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Layers of the fastest engine and of the fastest in float: why one beats the other."""
    chosen = (benched.fastest(quantized=True), benched.fastest(quantized=False))
    found = {}
    for model in filter(None, chosen):
        say(f"timing the layers of {model}")
        try:
            found[model] = {"layers": time_layers(sessions[model], engines[model])}
        except DeployError as error:  # the measurements before it stand
            say(f"{model}: the layers are not timed: {error.message}")
    return found
