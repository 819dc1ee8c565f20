"""Where a CARE can be cut: the hidden channels of each interaction, and what each of them costs.

They hold nine tenths of a classifier's multiply-accumulates, and nothing else in the network sees
them: a channel is one row of the first 1x1, one depthwise kernel and one column of the second 1x1.
Those of the last interaction are read by the head. Of a head for masks or boxes nothing is cut.
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
    last: bool  # the head reads them, and there is no second 1x1 of their own

    @property
    def name(self) -> str:
        """The name that plans and tables use: ``2.0 inter1``."""
        return f"{self.stage}.{self.block} {self.branch}"

    def hidden_numbers(self, width: int) -> float:
        """Channels times positions at a width, in those of one channel of the first stage."""
        return width / 4.0**self.stage

    def macs_of_channel(self, resolution: int, model: Care) -> int:
        """Multiply-accumulates that one channel takes for one image, as published tables count."""
        side = resolution // STEM_STRIDE >> self.stage
        if self.last:  # a classifier's heads read it once for each image, others at every place
            reads = sum(len(weight) for weight in _head_weights(model, self))
            return side * side * (self.inputs + 9) + reads * (1 if model.pools else side * side)
        return side * side * (2 * self.inputs + 9)

    def parameters_of_channel(self, model: Care) -> int:
        """Numbers that one channel takes."""
        own = self.inputs + 1 + 9 + 1
        if not self.last:
            return own + self.inputs
        norm = 2 if model.pools else 0  # weight and bias, before each of the classifier's heads
        return own + sum(norm + len(weight) for weight in _head_weights(model, self))


def find_places(model: Care) -> list[Place]:
    """Every interaction of a network, in order."""
    return [place for place, _ in _walk(model)]


def bottleneck_at(model: Care, place: Place) -> Bottleneck:
    """The layers of a place in a network."""
    return next(half for found, half in _walk(model) if found.name == place.name)


def layer_behind(model: Care, place: Place) -> nn.Conv2d | None:
    """The 1x1 that reads the channels of a place; none where a classifier pools them first."""
    if not place.last:
        return bottleneck_at(model, place).fc2
    if model.pools:
        return None
    (name,) = model.readers_of(place.stage)
    lateral = model.get_submodule(name)
    assert isinstance(lateral, nn.Conv2d)
    return lateral


def _head_weights(model: Care, place: Place) -> Iterator[nn.Parameter]:
    for name in model.readers_of(place.stage):
        yield model.get_parameter(f"{name}.weight")


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
