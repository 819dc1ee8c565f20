"""The layers that a runtime executes, each with its origin, its precision and its time.

Profiling costs time itself, so the sum stands a little above the latency.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

INTEGER, FLOAT, CONVERT = "integer products", "float products", "reorder and convert"
ELEMENTWISE, OTHER = "element-wise", "other"
GROUPS = (INTEGER, FLOAT, CONVERT, ELEMENTWISE, OTHER)


@dataclass(frozen=True)
class LayerTime:
    """One executed layer."""

    name: str  # as the runtime calls it
    kind: str  # Convolution, QLinearConv, Reorder
    sites: tuple[str, ...]  # the modules, or nodes, of the file that were fused into it
    precision: str  # u8, i8, bf16, f16, f32: of what enters
    group: str  # one of GROUPS
    ms: float | None  # None where nothing was timed


@dataclass(frozen=True)
class Profile:
    """All layers of one file, in the order they run."""

    layers: tuple[LayerTime, ...]
    whole_ms: float | None  # of one run, with the profiler on
    traffic: dict[str, int] | None = None  # of an engine: kernels, and bytes that they move

    @property
    def total_ms(self) -> float:
        """Of all layers."""
        return sum(layer.ms or 0.0 for layer in self.layers)

    @property
    def is_timed(self) -> bool:
        """Whether any layer has a time."""
        return any(layer.ms is not None for layer in self.layers)

    def share(self, layer: LayerTime) -> float | None:
        """Of the sum of all layers."""
        return None if layer.ms is None or not self.total_ms else layer.ms / self.total_ms

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """Layers, milliseconds and share of each group."""
        sums: dict[str, dict[str, Any]] = {}
        for group in GROUPS:
            found = [layer for layer in self.layers if layer.group == group]
            sums[group] = {"layers": len(found), "ms": None, "share": None}
            if self.is_timed:
                ms = sum(layer.ms or 0.0 for layer in found)
                sums[group] |= {"ms": ms, "share": ms / self.total_ms}
        return sums

    def as_json(self) -> dict[str, Any]:
        """As ``compare.json`` holds it under a target's model."""
        return {
            "layers": [{**asdict(layer), "share": self.share(layer)} for layer in self.layers],
            "by_kind": self.by_kind(),
            "layers_ms": self.total_ms if self.is_timed else None,
            "profiled_ms": self.whole_ms,  # of a run with the profiler on, overhead included
            "traffic": self.traffic,
        }


def modules_of(names: Iterable[str]) -> tuple[str, ...]:
    """The modules that operations belong to, each once.

    Ours are called ``module`` or ``module/Gelu``; other exporters write ``/layer/Conv`` for a node,
    which stays as it is.
    """
    found = [name if name.startswith("/") else name.partition("/")[0] for name in names]
    return tuple(dict.fromkeys(name for name in found if name))
