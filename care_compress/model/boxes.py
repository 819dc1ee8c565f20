"""Boxes at every place of a feature pyramid: a head without anchors (FCOS, arXiv 1904.01355).

Each place of a level says how far the four sides of the box around it are from its own centre, and
how likely it is each class. Nothing is shared between levels: each module runs once, so that each
has ranges of its own once it is quantized. Shape suffixes as in `care_compress.model.care`; here N
are the places of all levels, from fine to coarse, and K the classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from care_compress.errors import InputSizeError
from care_compress.model.care import ARCHITECTURES, DenseCare, positive_features
from care_compress.model.pyramid import ConvUnit, Pyramid

STRIDES = (8, 16, 32)  # of the last three stage outputs
CORNERS = 4  # rows of the output before the classes: x1, y1, x2, y2
PRIOR = 0.01  # what a class is believed before training, or the many empty places drown the rest


class LevelHead(nn.Module):
    """What is said about the places of one level."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.units = nn.Sequential(ConvUnit(width, width, 3), ConvUnit(width, width, 3))
        self.distances = nn.Conv2d(width, CORNERS, 1)
        self.classes = nn.Conv2d(width, num_classes, 1)
        self.start()

    def start(self) -> None:
        """Begin with boxes two strides wide, and with little belief in any class."""
        for conv in (self.distances, self.classes):
            nn.init.normal_(conv.weight, std=0.01)
        # Boxes start two strides wide: an object counts for the overlap it has, and small ones that
        # begin inside boxes of twice their size were still not learned when large ones were.
        nn.init.zeros_(_bias(self.distances))
        nn.init.constant_(_bias(self.classes), -math.log((1 - PRIOR) / PRIOR))

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Distances before they are made positive (B, 4, H, W), and logits (B, K, H, W)."""
        x = self.units(x_BCHW)
        return self.distances(x), self.classes(x)


class BoxDecoder(nn.Module):
    """Distances of all levels as corners, with the logits below them; it has no parameters.

    A side's distance is elu(t) + 1 strides, as attention's features are: positive everywhere,
    linear where it is large, so that neither float16 overflows nor a step of eight bits grows with
    the box.
    """

    def forward(self, distances: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
        """(B, 4 + K, N): x1, y1, x2, y2 as fractions of the input's sides, then the logits.

        Fractions, because float16 has no room for the pixels of a large image.
        """
        centres_2N, steps_2N = places(
            [(one.shape[2], one.shape[3]) for one in distances], logits[0]
        )
        reach_B4N = positive_features(torch.cat([one.flatten(2) for one in distances], dim=2))
        near = centres_2N - reach_B4N[:, :2] * steps_2N
        far = centres_2N + reach_B4N[:, 2:] * steps_2N
        return torch.cat([near, far, torch.cat([one.flatten(2) for one in logits], dim=2)], dim=1)


def places(sizes_HW: Sequence[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Centre x, y of every place of levels of these sizes (2, N), and its strides in x and y.

    All are fractions of the input's sides. Made from `like`: an exported graph would keep the
    device that `torch.arange` was given.
    """
    centres, steps = [], []
    for height, width in sizes_HW:
        ones = like.new_ones(height, width)
        x, y = (ones.cumsum(1) - 0.5) / width, (ones.cumsum(0) - 0.5) / height
        centres.append(torch.stack([x, y]).flatten(1))
        steps.append(torch.stack([ones / width, ones / height]).flatten(1))
    return torch.cat(centres, dim=1), torch.cat(steps, dim=1)


class BoxHead(nn.Module):
    """Boxes and class logits out of the last three stage outputs."""

    def __init__(self, channels: Sequence[int], num_classes: int, width: int) -> None:
        super().__init__()
        assert len(channels) == len(STRIDES)
        self.num_classes = num_classes
        self.pyramid = Pyramid(channels, width)
        self.levels = nn.ModuleList(LevelHead(width, num_classes) for _ in channels)
        self.decode = BoxDecoder()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, 4 + K, N), as `BoxDecoder` says; finer stage outputs than it needs are left alone."""
        features = features[-len(STRIDES) :]
        check_halved(features)
        levels = self.pyramid(features)
        said = [level(one) for level, one in zip(self.levels, levels, strict=True)]
        distances, logits = zip(*said, strict=True)
        device = levels[0].device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # bfloat16 knows a corner to 1/256 of the image only.
            distances, logits = (tuple(one.float() for one in part) for part in (distances, logits))
        out: Tensor = self.decode(distances, logits)
        return out


class BoxCare(DenseCare):
    """A CARE that finds boxes."""

    task = "detection"
    classes_in = "dense.levels.0.classes.weight"
    first_read = 1  # the output of the first stage, at stride 4, is left alone

    def make_head(self, channels: Sequence[int]) -> nn.Module:
        """Make the head, which reads the last three stage outputs."""
        own = channels[-len(STRIDES) :]
        return BoxHead(own, self.num_classes, ARCHITECTURES[self.arch].neck)

    def start_heads(self) -> None:
        """Begin with boxes of a likely size and nearly no objects."""
        for module in self.modules():
            if isinstance(module, LevelHead):
                module.start()


def check_halved(features: Sequence[Tensor]) -> None:
    """Refuse stage outputs that lost a row or column: their places would not lie where they say."""
    last = features[-1].shape[2:]
    for exponent, one in enumerate(reversed(features)):
        if one.shape[2:] != (last[0] << exponent, last[1] << exponent):
            raise InputSizeError(
                f"boxes need an input whose sides are multiples of {STRIDES[-1]}.",
                f"set data.resolution to a multiple of {STRIDES[-1]}",
            )


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
