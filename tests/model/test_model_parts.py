"""Small parts of the network and what runs it, by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from care_compress.errors import TargetError
from care_compress.model.attention import AttentionCore
from care_compress.model.care import build_model, linear_attention
from care_compress.model.compact import GlobalMean, MergedHead, PooledDepthwise, TwinHeads
from care_compress.model.cost import measure_cost
from care_compress.model.predictor import as_answers, in_slices
from care_compress.model.rewrite import norm_as_affine


def test_the_answer_is_the_mean_of_both_heads() -> None:
    model = build_model("care_nano", 5).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        pooled = model.forward_features(images)[-1].mean(dim=(2, 3))
        wanted = torch.stack([model.head(pooled), model.dist_head(pooled)]).mean(dim=0)
        torch.testing.assert_close(model(images), wanted)


def test_a_fresh_network_begins_small_and_without_offsets() -> None:
    layers = [m for m in build_model("care_nano", 5).modules() if isinstance(m, nn.Conv2d)]
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.02)
    assert not any(bool(layer.bias.any()) for layer in layers if layer.bias is not None)


def test_the_core_to_quantize_is_the_published_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 16, 49, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(AttentionCore()(q, k, v), linear_attention(q, k, v))


def test_a_pooled_depthwise_is_the_mean_of_a_padded_convolution() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 3, 3, padding=1, groups=3), torch.randn(2, 3, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(PooledDepthwise(conv)(x), GlobalMean()(conv(x)))


def test_merged_heads_answer_as_two() -> None:
    torch.manual_seed(0)
    model = build_model("care_nano", 5)
    for head in (model.head, model.dist_head):
        for parameter in head.parameters():
            nn.init.normal_(parameter)
    twins = TwinHeads(model.head, model.dist_head).double()
    pooled = torch.randn(4, model.head.fc.in_features, dtype=torch.float64) * 1e-3
    torch.testing.assert_close(MergedHead(twins)(pooled), twins(pooled))


def test_a_norm_in_eval_mode_is_a_scale_and_a_shift() -> None:
    norm = nn.BatchNorm2d(2).double().eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([1.0, -1.0]))
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(torch.tensor([0.5, -4.0]))
    norm.running_var.copy_(torch.tensor([1e-5, 4.0]))
    scale, shift = (value.view(-1, 1, 1) for value in norm_as_affine(norm))
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(x * scale + shift, norm(x))


class Shuffled(nn.Module):
    """One product of 3 x 4 with 4 x 5, one addition, and views around them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).reshape(-1, 3)
        return (pixels @ self.weight + 1).transpose(0, 1)


def test_a_cost_counts_products_and_no_views_at_its_own_resolution() -> None:
    small, large = measure_cost(Shuffled(), (2, 4)), measure_cost(Shuffled(), (4, 4))
    assert (small.parameters, small.macs) == (15, 2 * 4 * 3 * 5)
    assert large.macs == 2 * small.macs
    assert small.by_operation["mm"] == small.by_operation["add"] == 1
    assert not {"permute", "transpose"} & small.by_operation.keys()


@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_a_fixed_batch_takes_any_number_of_images(count: int) -> None:
    taken = []

    def run(images: Tensor) -> Tensor:
        taken.append(len(images))
        return images.mean(dim=(2, 3))

    images = torch.randn(count, 3, 2, 2)
    assert torch.equal(in_slices(run, images, 3), images.mean(dim=(2, 3)))
    assert set(taken) == {3}
    assert torch.equal(in_slices(run, images, None), images.mean(dim=(2, 3)))


def test_answers_that_are_no_logits_of_these_images_are_refused() -> None:
    images, path = torch.zeros(2, 3, 8, 8), Path("model.onnx")
    good = np.zeros((2, 5), np.float32)
    assert as_answers(good, images, 5, 2, path).shape == (2, 5)
    for bad in (good.T, good[:1], good[:, :4], good.astype(np.int64), [1.0], good[0]):
        with pytest.raises(TargetError, match="not with"):
            as_answers(bad, images, 5, 2, path)
