"""Whether the ranges fit the activations: channels that never change, and values that are cut off.

Channels are watched while all calibration images stream through the float model. What a range cuts
off is counted afterwards in the finished model, on a part of the same images: every site then reads
what the sites before it made of the image, corrections and learned rounding included.
"""

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from care_compress.console import CheckResult
from care_compress.files import read_json
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.statistics import ChannelRange, watching

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
        """What a reader should know: of the ranges, and of the channels."""
        over = sorted((s for s in self.cut if self.cut[s] > MOST_CUT), key=lambda s: -self.cut[s])
        of = f"of {len(self.cut)} sites, on {self.counted} calibration images"
        if over:
            said = f"{len(over)} {of}, cut off more than {100 * MOST_CUT:g} % of their values"
            items = tuple(f"{site} {100 * self.cut[site]:.1f} %" for site in over)
            ranges = CheckResult(RANGES, "warning", said, items)
        else:
            worst = max(self.cut, key=lambda site: self.cut[site], default="")
            most = f"; {worst} most, {100 * self.cut[worst]:.2g} %" if worst else ""
            said = f"none {of} cuts off more than {100 * MOST_CUT:g} % of its values{most}"
            ranges = CheckResult(RANGES, "fine", said)
        total, count = sum(self.channels.values()), sum(self.dead.values())
        on = f"on all {self.images} calibration images"
        if count:
            said = (
                f"{count:,} of {total:,}, at {len(self.dead)} of {len(self.channels)} sites, have "
                f"one value {on}: they cost time and say nothing"
            )
            by_share = sorted(self.dead, key=lambda s: -self.dead[s] / self.channels[s])
            items = tuple(f"{site} {self.dead[site]} of {self.channels[site]}" for site in by_share)
            channels = CheckResult(CHANNELS, "warning", said, items)
        else:
            said = f"none of {total:,} at {len(self.channels)} sites has one value {on}"
            channels = CheckResult(CHANNELS, "fine", said)
        return [ranges, channels]

    @classmethod
    def missing(cls, reason: str) -> list[CheckResult]:
        """The same checks where there is no health to read, with the reason."""
        return [CheckResult(check, "not measured", reason) for check in (RANGES, CHANNELS)]


@contextlib.contextmanager
def watching_channels(model: QuantizedCare) -> Generator[dict[str, ChannelRange]]:
    """Within this block, the range of every channel that enters each weighted site."""
    # Products and sums have no channels of their own.
    found = {quantizer.site: ChannelRange() for quantizer in model.integers("input")}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, IntQuantizer)
        found[module.site].widen(inputs[0].detach())

    with watching(model.integers("input"), watch):
        yield found


def channel_health(ranges: Mapping[str, ChannelRange], images: int) -> Health:
    """What the channels were like on so many images; those with one value are dead."""
    channels, dead = {}, {}
    for site, seen in ranges.items():
        if seen.low is None or seen.high is None:
            continue
        channels[site] = len(seen.low)
        if count := int((seen.low == seen.high).sum()):  # no bit may differ
            dead[site] = count
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
    with watching(watched, count):
        for images in torch.split(images_BCHW, BATCH):
            model(images)
    shares: dict[str, float] = {}
    for quantizer, (cut, values) in counts.items():
        shares[quantizer.site] = max(shares.get(quantizer.site, 0.0), cut / values)
    return shares


def read_health(path: Path) -> Health | None:
    """The health that was written beside a model; None where there is none."""
    try:
        return Health(**read_json(path))
    except (OSError, ValueError, TypeError):
        return None
