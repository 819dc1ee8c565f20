"""A feature pyramid over the stage outputs (FPN, arXiv 1612.03144), for answers at every place.

Each stage output gets a 1x1 convolution to a common width; from the coarsest on, each level is
doubled and added to the next finer one. Shape suffixes as in `care_compress.model.care`.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.model.care import Sum


class ConvUnit(nn.Module):
    """Convolution, BatchNorm, ReLU; the norm folds into the convolution for inference."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Mix the channels of a neighbourhood."""
        return F.relu(self.norm(self.conv(x_BCHW)))


class Pyramid(nn.Module):
    """Levels of one width out of features of several."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(one, width, 1) for one in channels)
        self.adds = nn.ModuleList(Sum() for _ in channels[1:])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One level for each of the features, in their order: from fine to coarse."""
        levels = [lateral(one) for lateral, one in zip(self.laterals, features, strict=True)]
        for place in reversed(range(len(levels) - 1)):
            levels[place] = self.adds[place](
                levels[place], enlarged(levels[place + 1], levels[place])
            )
        return levels


def enlarged(x_BCHW: Tensor, like: Tensor, mode: str = "nearest") -> Tensor:
    """Copy at the size of another level, for a level is added to the next finer one.

    Doubling, the usual case, is said as such: a size would be computed anew in an exported graph.
    """
    height, width = like.shape[2:]
    align = None if mode == "nearest" else False
    if (height, width) == (2 * x_BCHW.shape[2], 2 * x_BCHW.shape[3]):
        return F.interpolate(x_BCHW, scale_factor=2.0, mode=mode, align_corners=align)
    return F.interpolate(x_BCHW, size=(height, width), mode=mode, align_corners=align)
