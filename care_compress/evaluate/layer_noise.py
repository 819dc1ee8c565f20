"""What quantization does to each layer: distance of its output, and the values that enter it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from care_compress.evaluate.site_outputs import run_graph
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.placement import QuantizedCare
from care_compress.tasks.distance import Distance

BINS = 32
HARDEST = 6
BATCH = 8  # every layer's output of a batch is held, twice


@dataclass
class _Input:
    """The activation that one site quantizes first, and its values before and after rounding."""

    quantizer: IntQuantizer
    rounding: Distance = field(default_factory=Distance)
    low: float = math.inf
    high: float = -math.inf
    before: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.long))
    after: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.long))
    clipped: int = 0
    values: int = 0

    def see(self, before: Tensor, after: Tensor) -> None:
        self.rounding.add(before, after)
        self.low = min(self.low, float(before.min()))
        self.high = max(self.high, float(before.max()))

    def bins(self) -> tuple[float, float]:
        """Return the ends of the bins: over the observed values and the chosen range together."""
        low, high, _ = self.quantizer.bounds(4)
        return min(self.low, float(low.min())), max(self.high, float(high.max()))

    def count(self, before: Tensor, after: Tensor) -> None:
        """Fill the bins, in a second pass, once their ends are known."""
        self.clipped += self.quantizer.cut(before)
        self.values += before.numel()
        least, most = self.bins()
        for counts, values in ((self.before, before), (self.after, after)):
            counts += torch.histc(values.float().cpu(), BINS, least, most).long()

    def histogram(self) -> dict[str, Any]:
        low, high, half = self.quantizer.bounds(4)
        return {
            "site": self.quantizer.site,
            "operand": self.quantizer.operand,
            "spec": str(self.quantizer.spec),
            "input_db": self.rounding.shown_db,
            "observed": [self.low, self.high],
            "range": [float(low.min()), float(high.max())],
            "ranges": low.numel(),
            "steps": [2 * float(half.min()), 2 * float(half.max())],
            "bins": list(self.bins()),
            "before": self.before.tolist(),
            "after": self.after.tolist(),
            "clipped": self.clipped,
            "values": self.values,
        }


@torch.inference_mode()
def measure_layers(model: QuantizedCare, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Measure SQNR of every site, and histograms of inputs that lose most by their own rounding.

    The reference is the same graph with its quantizers off: rescaling moves numbers between
    layers, so the layers of the model before it are not comparable one by one.
    """
    held = [part for images in batches for part in torch.split(images, BATCH)]
    outputs = {decision.site.name: Distance() for decision in model.plan.decisions}
    inputs: dict[str, _Input] = {}

    def see(quantizer: IntQuantizer, before: Tensor, after: Tensor) -> None:
        found = inputs.setdefault(quantizer.site, _Input(quantizer))
        if found.quantizer is quantizer:  # an attention product has two inputs
            found.see(before, after)

    for images in held:
        model.enable(False)
        plain = run_graph(model, images)
        model.enable(True)
        rounded = run_graph(model, images, see)
        for site, distance in outputs.items():
            if site in plain.sites:
                distance.add(plain.sites[site], rounded.sites[site])
    hardest = sorted(inputs.values(), key=lambda one: one.rounding.shown_db)[:HARDEST]
    chosen = {id(one.quantizer): one for one in hardest}

    def count(quantizer: IntQuantizer, before: Tensor, after: Tensor) -> None:
        if id(quantizer) in chosen:
            chosen[id(quantizer)].count(before, after)

    for images in held:
        run_graph(model, images, count)
    return {
        "images": sum(len(images) for images in held),
        "sites": [
            {
                "site": site,
                "sqnr_db": distance.shown_db,
                "input_db": inputs[site].rounding.shown_db if site in inputs else None,
            }
            for site, distance in outputs.items()
        ],
        "histograms": [one.histogram() for one in hardest],
    }
