"""The head that gives a class to every place: what it reads, and how its levels meet."""

import pytest
import torch
from torch.nn import functional as F

from care_compress.model.masks import MaskHead, Tower

CHANNELS = (8, 12, 16, 24)


def test_every_layer_of_the_head_has_a_say() -> None:
    """The finest level, too, is convolved, though it needs no doubling."""
    torch.manual_seed(0)
    head = MaskHead(CHANNELS, num_classes=3, width=4)
    features = [torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate(CHANNELS)]
    logits = head(features)
    assert logits.shape == (2, 3, 16, 16)
    logits.square().mean().backward()
    silent = [
        name for name, one in head.named_parameters() if one.grad is None or not one.grad.any()
    ]
    assert silent == []


@pytest.mark.parametrize("sides", [(4, 8, 16), (3, 5, 9)])
def test_a_level_is_enlarged_step_by_step_and_smoothly(sides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tower = Tower(2, 4).eval()
    level = torch.randn(1, 4, sides[0], sides[0])
    finer = [torch.zeros(1, 4, side, side) for side in sides[1:]]
    expected = level
    for unit, side in zip(tower.units, sides[1:], strict=True):
        expected = F.interpolate(unit(expected), (side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(tower(level, finer), expected)
