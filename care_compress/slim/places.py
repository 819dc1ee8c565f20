"""Where a CARE can be cut: the hidden channels of each interaction, and what each of them costs.

They hold nine tenths of the multiply-accumulates, and nothing else in the network sees them: a
channel is one row of the first 1x1, one depthwise kernel and one column of the second 1x1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from care_compress.model.care import STEM_STRIDE, Block, Bottleneck, Care, Stage


@dataclass(frozen=True)
class Place:
    """The hidden channels of one interaction."""

    stage: int
    block: int  # within its stage
    branch: str  # inter1, inter2
    index: int  # of the block in the whole network
    inputs: int  # channels that the first 1x1 reads
    channels: int  # hidden ones
    last: bool  # they end in the head, and there is no second 1x1

    @property
    def name(self) -> str:
        """The name that plans and tables use: ``2.0 inter1``."""
        return f"{self.stage}.{self.block} {self.branch}"

    def macs_of_channel(self, resolution: int, classes: int) -> int:
        """Multiply-accumulates that one channel takes for one image, as published tables count."""
        side = resolution // STEM_STRIDE >> self.stage
        if self.last:  # two heads read it, once for each image
            return side * side * (self.inputs + 9) + 2 * classes
        return side * side * (2 * self.inputs + 9)

    def parameters_of_channel(self, classes: int) -> int:
        """Numbers that one channel takes."""
        own = self.inputs + 1 + 9 + 1
        return own + 2 * (2 + classes) if self.last else own + self.inputs


def find_places(model: Care) -> list[Place]:
    """Every interaction of a network, in order."""
    return [place for place, _ in _walk(model)]


def bottleneck_at(model: Care, place: Place) -> Bottleneck:
    """The layers of a place in a network."""
    return next(half for found, half in _walk(model) if found.name == place.name)


def _walk(model: Care) -> Iterator[tuple[Place, Bottleneck]]:
    index = 0
    for i, stage in enumerate(model.stages):
        assert isinstance(stage, Stage)
        for j, block in enumerate(stage.blocks):
            assert isinstance(block, Block)
            for half in block.inter_layer.bottlenecks():
                fc1: nn.Conv2d = half.fc1
                last = half.fc2 is None
                sizes = (fc1.in_channels, fc1.out_channels, last)
                yield Place(i, j, half.name, index, *sizes), half
            index += 1
