"""Whether the ranges fit the activations: channels that never change, and values that are cut off.

Channels are watched while all calibration images stream through the float model. What a range cuts
off is counted afterwards in the finished model, on a part of the same images: every site then reads
what the sites before it made of the image, corrections and learned rounding included.
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from care_compress.console import CheckResult
from care_compress.files import read_json
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.observers import extremes
from care_compress.quantize.placement import QuantizedCare

RANGES, CHANNELS = "saturated ranges", "dead channels"
# Of the values that enter a site, above which it is named. Ranges that are chosen for the least
# error cut off up to 0.8 % at four bits and 0.1 % at eight (LOG.md); beyond that it is signal.
MOST_CUT = 0.02
IMAGES = 64  # values are counted on; some ten thousand to a million of each site
BATCH = 16
NNCF_TELLS_NOTHING = "NNCF's file has ranges of its own, which care-compress does not see"


@dataclass(frozen=True)
class Health:
    """What was found of a quantized model; plain data."""

    images: int = 0  # calibration images that channels were watched on
    channels: dict[str, int] = field(default_factory=dict)  # of the input of each site
    dead: dict[str, int] = field(default_factory=dict)  # of them those with one value everywhere
    counted: int = 0  # images that values were counted on
    cut: dict[str, float] = field(default_factory=dict)  # share of the values that enter each site

    def checks(self) -> list[CheckResult]:
        """What a reader should know."""
        return [self._cut(), self._dead()]

    @classmethod
    def missing(cls, reason: str) -> list[CheckResult]:
        """What it could have said."""
        return [CheckResult(check, "not measured", reason) for check in (RANGES, CHANNELS)]

    def _cut(self) -> CheckResult:
        over = sorted((s for s in self.cut if self.cut[s] > MOST_CUT), key=lambda s: -self.cut[s])
        of = f"of {len(self.cut)} sites, on {self.counted} calibration images"
        if not over:
            worst = max(self.cut, key=lambda site: self.cut[site], default="")
            most = f"; {worst} most, {100 * self.cut[worst]:.2g} %" if worst else ""
            said = f"none {of} cuts off more than {100 * MOST_CUT:g} % of its values{most}"
            return CheckResult(RANGES, "fine", said)
        items = tuple(f"{site} {100 * self.cut[site]:.1f} %" for site in over)
        said = f"{len(over)} {of}, cut off more than {100 * MOST_CUT:g} % of their values"
        return CheckResult(RANGES, "warning", said, items)

    def _dead(self) -> CheckResult:
        total, count = sum(self.channels.values()), sum(self.dead.values())
        on = f"on all {self.images} calibration images"
        if not count:
            said = f"none of {total:,} at {len(self.channels)} sites has one value {on}"
            return CheckResult(CHANNELS, "fine", said)
        worst = sorted(self.dead, key=lambda s: -self.dead[s] / self.channels[s])
        items = tuple(f"{site} {self.dead[site]} of {self.channels[site]}" for site in worst)
        said = (
            f"{count:,} of {total:,}, at {len(self.dead)} of {len(self.channels)} sites, have one "
            f"value {on}: they cost time and say nothing"
        )
        return CheckResult(CHANNELS, "warning", said, items)


class _Watch:
    """The least and the largest value of every channel of one site's input."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        reduced = extremes(inputs[0].detach())
        others = [dim for dim in range(reduced.dim()) if dim != 1]
        low, high = reduced.amin(dim=others), reduced.amax(dim=others)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @property
    def dead(self) -> int:
        """Channels with one value everywhere; no bit may differ."""
        assert self.low is not None and self.high is not None
        return int((self.low == self.high).sum())


class ChannelWatch:
    """Watches the inputs of all weighted sites while images stream through."""

    def __init__(self) -> None:
        self._watches: dict[str, _Watch] = {}

    @contextlib.contextmanager
    def on(self, model: QuantizedCare) -> Generator[None]:
        """Watch within this block."""
        handles = []
        for quantizer in model.integers("input"):  # products and sums have no channels of their own
            self._watches[quantizer.site] = watch = _Watch()
            handles.append(quantizer.register_forward_pre_hook(watch))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def health(self, images: int) -> Health:
        """What was seen on so many images."""
        seen = {site: watch for site, watch in self._watches.items() if watch.low is not None}
        channels = {site: len(watch.low) for site, watch in seen.items() if watch.low is not None}
        dead = {site: watch.dead for site, watch in seen.items() if watch.dead}
        return Health(images, channels, dead)


@torch.inference_mode()
def share_cut(model: QuantizedCare, images_BCHW: Tensor) -> dict[str, float]:
    """Share of the values that enter each site which its range cuts off; the worst operand's."""
    counts: dict[IntQuantizer, list[int]] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, IntQuantizer)
        found = counts.setdefault(module, [0, 0])
        found[0] += module.cut(inputs[0])
        found[1] += inputs[0].numel()

    watched = [quantizer for quantizer in model.integers() if quantizer.operand != "weight"]
    handles = [quantizer.register_forward_pre_hook(count) for quantizer in watched]
    try:
        for images in torch.split(images_BCHW, BATCH):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    shares: dict[str, float] = {}
    for quantizer, (cut, values) in counts.items():
        shares[quantizer.site] = max(shares.get(quantizer.site, 0.0), cut / values)
    return shares


def read_health(path: Path) -> Health | None:
    """What was kept; None where nothing was."""
    try:
        return Health(**read_json(path))
    except (OSError, ValueError, TypeError):
        return None
