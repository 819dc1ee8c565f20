"""hard-swish in place of GELU: the scaling folds away, and what remains can be healed."""

import copy

import pytest
import torch
from quantized import SIZE, images, network, quantized, section, sqnr
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.model.compact import blocks
from care_compress.quantize.gelu import HARD_SWISH_SLOPE, use_hard_swish
from care_compress.quantize.ptq import planned


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(HARD_SWISH_SLOPE * x) / HARD_SWISH_SLOPE


@pytest.mark.parametrize("pooled", [True, False])
def test_the_scaling_folds_into_the_neighbours(pooled: bool) -> None:
    start = network(pool_last_depthwise=pooled).double()
    written_out, folded = copy.deepcopy(start), copy.deepcopy(start)
    for block in blocks(written_out):
        block.inter_layer.activation = Scaled()
    use_hard_swish(folded)
    x = images(4).double()
    with torch.no_grad():
        assert sqnr(folded(x), written_out(x)) > 200


def test_hard_swish_is_near_gelu_and_another_function() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert 26 < sqnr(F.hardswish(HARD_SWISH_SLOPE * x) / HARD_SWISH_SLOPE, F.gelu(x)) < 30


def test_the_recipe_section_asks_for_it() -> None:
    chosen = section(activation="hard_swish")
    swapped, _ = planned(network(), chosen, SIZE)
    kinds = {type(block.inter_layer.activation) for block in blocks(swapped)}
    assert kinds == {nn.Hardswish}
    with torch.no_grad():
        made = quantized(chosen).model(images(8))
        own, published = swapped(images(8)), network()(images(8))
    # What is quantized is the network with hard-swish, and that is another function than GELU's.
    assert 0 < sqnr(made, published) < sqnr(made, own)
