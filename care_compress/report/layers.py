"""What quantization does to each layer: distance of its output, and the values that enter it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.placement import PRODUCTS, QuantizedCare, site_of

BINS = 32
HARDEST = 6
BATCH = 8  # every layer's output of a batch is held, twice
OUT_OF_REACH_DB = 200.0  # stands for no difference at all, which JSON has no number for
ANY_SHAPE = torch.Size((1, 1, 1, 1))
# Called with a quantizer, what enters it and what leaves it.
Seen = Callable[[IntQuantizer, Tensor, Tensor], None]


@dataclass
class _Distance:
    """Signal and noise, summed over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        self.signal += float(expected.double().square().sum())
        self.noise += float((expected.double() - found.double()).square().sum())

    @property
    def sqnr_db(self) -> float:
        if self.noise == 0 or self.signal == 0:
            return OUT_OF_REACH_DB
        return min(OUT_OF_REACH_DB, 10 * math.log10(self.signal / self.noise))


@dataclass
class _Input:
    """The activation that one site quantizes first."""

    quantizer: IntQuantizer
    rounding: _Distance = field(default_factory=_Distance)
    low: float = math.inf
    high: float = -math.inf

    def see(self, before: Tensor, after: Tensor) -> None:
        self.rounding.add(before, after)
        self.low = min(self.low, float(before.min()))
        self.high = max(self.high, float(before.max()))


class _Tap(Interpreter):
    """Runs the graph; keeps what each site computes, shows what each quantizer changes."""

    def __init__(self, model: QuantizedCare, seen: Seen | None = None) -> None:
        super().__init__(model.graph)
        self.seen = seen
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        inputs, _ = self.fetch_args_kwargs_from_env(n)
        out = super().run_node(n)
        if n.target in PRODUCTS and isinstance(out, Tensor):
            self.kept.setdefault(site_of(n), out)
        if self.seen is not None and n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            if isinstance(module, IntQuantizer) and module.operand != "weight":
                self.seen(module, inputs[0], out)
        return out


@torch.inference_mode()
def measure_layers(model: QuantizedCare, batches: Iterable[Tensor]) -> dict[str, Any]:
    """SQNR of every site, and histograms of the inputs that lose most by their own rounding.

    The reference is the same graph with its quantizers off: rescaling moves numbers between
    layers, so the layers of the model before it are not comparable one by one.
    """
    held = [part for images in batches for part in torch.split(images, BATCH)]
    outputs = {decision.site.name: _Distance() for decision in model.plan.decisions}
    inputs: dict[str, _Input] = {}

    def see(quantizer: IntQuantizer, before: Tensor, after: Tensor) -> None:
        found = inputs.setdefault(quantizer.site, _Input(quantizer))
        if found.quantizer is quantizer:  # an attention product has two inputs
            found.see(before, after)

    for images in held:
        model.enable(False)
        plain = _Tap(model)
        plain.run(images)
        model.enable(True)
        rounded = _Tap(model, see)
        rounded.run(images)
        for site, distance in outputs.items():
            if site in plain.kept:
                distance.add(plain.kept[site], rounded.kept[site])
    hardest = sorted(inputs, key=lambda site: inputs[site].rounding.sqnr_db)[:HARDEST]
    return {
        "images": sum(len(images) for images in held),
        "sites": [
            {
                "site": site,
                "sqnr_db": distance.sqnr_db,
                "input_db": inputs[site].rounding.sqnr_db if site in inputs else None,
            }
            for site, distance in outputs.items()
        ],
        "histograms": _histograms(model, held, [inputs[site] for site in hardest]),
    }


@dataclass
class _Histogram:
    """Counts over the observed values and the chosen range together."""

    source: _Input
    before: Tensor
    after: Tensor
    clipped: int = 0
    values: int = 0

    def chosen(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest and largest value that the integers stand for, and half a step, along its axis.

        A value up to half a step outside rounds to the end of the range; it is not cut.
        """
        quantizer = self.source.quantizer
        scale, zero_point = quantizer.calculate_qparams()
        if quantizer.per_channel:
            along = [1] * len(shape)
            along[quantizer.ch_axis] = -1
            scale, zero_point = scale.reshape(along), zero_point.reshape(along)
        low = scale * (quantizer.quant_min - zero_point)
        return low, scale * (quantizer.quant_max - zero_point), scale / 2

    def bounds(self) -> tuple[float, float]:
        low, high, _ = self.chosen(ANY_SHAPE)
        return min(self.source.low, float(low.min())), max(self.source.high, float(high.max()))

    def count(self, before: Tensor, after: Tensor) -> None:
        low, high, half = self.chosen(before.shape)
        self.clipped += int(((before < low - half) | (before > high + half)).sum())
        self.values += before.numel()
        least, most = self.bounds()
        for counts, values in ((self.before, before), (self.after, after)):
            counts += torch.histc(values.float().cpu(), BINS, least, most).long()

    def as_json(self) -> dict[str, Any]:
        quantizer = self.source.quantizer
        low, high, half = self.chosen(ANY_SHAPE)
        least, most = self.bounds()
        return {
            "site": quantizer.site,
            "operand": quantizer.operand,
            "spec": str(quantizer.spec),
            "input_db": self.source.rounding.sqnr_db,
            "observed": [self.source.low, self.source.high],
            "range": [float(low.min()), float(high.max())],
            "ranges": low.numel(),
            "steps": [2 * float(half.min()), 2 * float(half.max())],
            "bins": [least, most],
            "before": self.before.tolist(),
            "after": self.after.tolist(),
            "clipped": self.clipped,
            "values": self.values,
        }


def _histograms(
    model: QuantizedCare, batches: list[Tensor], chosen: list[_Input]
) -> list[dict[str, Any]]:
    """Values of these inputs before and after rounding; a second pass, once the ends are known."""
    found = {
        id(one.quantizer): _Histogram(
            one, torch.zeros(BINS, dtype=torch.long), torch.zeros(BINS, dtype=torch.long)
        )
        for one in chosen
    }

    def see(quantizer: IntQuantizer, before: Tensor, after: Tensor) -> None:
        if id(quantizer) in found:
            found[id(quantizer)].count(before, after)

    for images in batches:
        _Tap(model, see).run(images)
    return [histogram.as_json() for histogram in found.values()]
