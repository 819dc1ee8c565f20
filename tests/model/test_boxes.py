"""The head of a detector: where its boxes lie, that they survive float16, and that it exports."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from care_compress.errors import InputSizeError
from care_compress.export.to_onnx import float_graph
from care_compress.model.boxes import BoxDecoder, BoxHead, places

CHANNELS = (8, 12, 20)
SIDE = 64


class Detector(nn.Module):
    """Three convolutions for a backbone."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *CHANNELS)
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, stride, stride)
            for before, after, stride in zip(widths, widths[1:], (8, 2, 2), strict=False)
        )
        self.head = BoxHead(CHANNELS, num_classes=2, width=8)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for stage in self.stages:
            features.append(x := stage(x))
        out: Tensor = self.head(features)
        return out


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    network = Detector()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return network.eval()


def test_each_box_holds_its_own_centre(detector: Detector) -> None:
    out = detector(torch.randn(2, 3, SIDE, SIDE))
    centres, _ = places([(8, 8), (4, 4), (2, 2)], out)
    assert out.shape == (2, 4 + 2, 64 + 16 + 4)
    assert (out[:, :2] < centres).all() and (centres < out[:, 2:4]).all()
    # Of the finest level in rows from the left: as pictures are read.
    assert centres[:, 1].tolist() == pytest.approx([1.5 / 8, 0.5 / 8])
    assert centres[:, -1].tolist() == pytest.approx([0.75, 0.75])


def test_distances_are_in_strides_of_each_level() -> None:
    """A raw distance of 2 reaches three strides; the input may be wider than it is high."""
    levels = [torch.full((1, 4, 2, 4), 2.0), torch.full((1, 4, 1, 2), 2.0)]
    logits = [torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 1, 2)]
    out = BoxDecoder()(levels, logits)[0]
    assert out[:, 0].tolist() == pytest.approx([(0.5 - 3) / 4, (0.5 - 3) / 2, 3.5 / 4, 3.5 / 2, 0])
    assert out[:, 8].tolist() == pytest.approx([(0.5 - 3) / 2, 0.5 - 3, 3.5 / 2, 3.5, 1])


def test_float16_holds_boxes_at_any_place() -> None:
    """To half a pixel of 640, and no distance overflows on its way."""
    torch.manual_seed(0)
    levels = [4 * torch.randn(1, 4, 640 // s, 640 // s) for s in (8, 16, 32)]
    logits = [torch.zeros(1, 1, *one.shape[2:]) for one in levels]
    exact = BoxDecoder()(levels, logits)[:, :4]
    half = BoxDecoder()([one.half() for one in levels], [one.half() for one in logits])[:, :4]
    image = (exact > 0) & (exact < 1)
    assert image.sum() > 10_000
    assert 640 * (half.float() - exact)[image].abs().max() < 1
    levels[0][:] = -1e4
    assert BoxDecoder()([one.half() for one in levels], logits).isfinite().all()


def test_autocast_does_not_round_corners() -> None:
    """bfloat16 would know 8 bits of a corner; logits and distances may be that coarse."""
    torch.manual_seed(0)
    head, features = (
        BoxHead(CHANNELS, 2, 8).eval(),
        [torch.randn(1, c, s, s) for c, s in zip(CHANNELS, (32, 16, 8), strict=True)],
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = head(features)
    assert out.dtype == torch.float32
    assert 256 * (out - head(features))[:, :4].abs().max() < 1  # pixels of 256


@pytest.mark.parametrize("sides", [(37, 18, 9), (8, 4, 3), (9, 4, 2)])
def test_an_input_that_does_not_halve_is_refused(sides: tuple[int, ...]) -> None:
    head = BoxHead(CHANNELS, 2, 8).eval()
    with pytest.raises(InputSizeError, match="multiples of 32"):
        head([torch.zeros(1, c, s, s) for c, s in zip(CHANNELS, sides, strict=True)])


def test_a_file_answers_as_the_network_does_for_any_batch(detector: Detector) -> None:
    graph = float_graph(detector, SIDE)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    for batch in (1, 3):
        images = torch.randn(batch, 3, SIDE, SIDE)
        (answered,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(answered, detector(images).detach(), atol=1e-5)
    made = {node.op_type for node in graph.graph}
    assert not made & {"CumSum", "Expand", "ConstantOfShape"}, "the grid is no constant"


def test_a_traced_head_stays_the_same(detector: Detector) -> None:
    """Quantization works on what `torch.export` gives."""
    images = torch.randn(2, 3, SIDE, SIDE)
    traced = torch.export.export(detector, (images,)).module()
    assert torch.equal(traced(images), detector(images))
