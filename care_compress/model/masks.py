"""A class for every place: the semantic head of a feature pyramid (arXiv 1901.02446) on CARE.

Each level of the pyramid is brought to a quarter of the image by 3x3 convolutions and doublings,
the levels are added, and a 1x1 gives the logits. Shape suffixes as in `care_compress.model.care`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from care_compress.model.care import ARCHITECTURES, DenseCare, Sum
from care_compress.model.pyramid import ConvUnit, Pyramid, enlarged


class MaskHead(nn.Module):
    """Logits (B, K, H / 4, W / 4) of the four stage outputs."""

    def __init__(self, channels: Sequence[int], num_classes: int, width: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(channels, width)
        # As many doublings as lead to the first level, and a convolution before each of them.
        self.towers = nn.ModuleList(Tower(max(1, level), width) for level in range(len(channels)))
        self.adds = nn.ModuleList(Sum() for _ in channels[1:])
        self.predict = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits at the size of the first of the features."""
        levels = self.pyramid(features)
        total, *others = (
            tower(level, list(reversed(levels[:place])))
            for place, (tower, level) in enumerate(zip(self.towers, levels, strict=True))
        )
        for add, other in zip(self.adds, others, strict=True):
            total = add(total, other)
        logits: Tensor = self.predict(total)
        return logits


class Tower(nn.Module):
    """Convolutions that bring one level to the size of the first."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(ConvUnit(width, width, 3) for _ in range(length))

    def forward(self, x_BCHW: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """A convolution before each doubling to the size of a finer level."""
        if not finer:
            x_BCHW = self.units[0](x_BCHW)
        for unit, like in zip(self.units, finer, strict=False):
            x_BCHW = enlarged(unit(x_BCHW), like, "bilinear")
        return x_BCHW


class MaskCare(DenseCare):
    """A CARE that gives a class to every place of an image."""

    task = "segmentation"
    classes_in = "dense.predict.weight"

    def make_head(self, channels: Sequence[int]) -> nn.Module:
        """Make the semantic head."""
        return MaskHead(channels, self.num_classes, ARCHITECTURES[self.arch].neck)
