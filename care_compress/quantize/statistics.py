"""What flows into each 1x1: channel ranges and a small sample of rows, in one streaming pass."""

import contextlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.model.compact import CompactCare
from care_compress.quantize.observers import extremes

ROWS = 2048  # sampled rows per layer, over all images; what the search for alpha is judged on
ROWS_PER_IMAGE = 4


@contextlib.contextmanager
def watching(
    modules: Iterable[nn.Module], hook: Callable[[nn.Module, tuple[Tensor, ...]], None]
) -> Generator[None]:
    """Call `hook` with a module and its inputs whenever one of these runs within the block."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class ChannelRange:
    """The smallest and the largest value of every channel, over all batches."""

    low: Tensor | None = None  # (C,)
    high: Tensor | None = None  # (C,)

    def widen(self, x: Tensor) -> None:
        """Take in one batch; channels are its second dimension."""
        reduced = extremes(x)
        others = [dim for dim in range(reduced.dim()) if dim != 1]
        low, high = reduced.amin(dim=others), reduced.amax(dim=others)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


@dataclass
class InputStatistics(ChannelRange):
    """Of one layer's input: the range of every channel, and sampled rows."""

    rows: list[Tensor] = field(default_factory=list)  # each (n, C * kernel positions)
    images: int = 0  # seen so far
    every: int = 1  # of the rows drawn, this many make one kept

    def add(self, layer: nn.Conv2d, x_BCHW: Tensor) -> None:
        """Take in one batch."""
        self.widen(x_BCHW)
        # Copies: a view of every other row would keep all of them, and with many images the memory.
        self.rows.append(_rows(layer, x_BCHW, self.images)[:: self.every].clone())
        self.images += len(x_BCHW)
        if sum(len(rows) for rows in self.rows) >= 2 * ROWS:
            self.rows = [self.sample()[::2].clone()]
            self.every *= 2

    def sample(self) -> Tensor:
        """All sampled rows."""
        return torch.cat(self.rows)

    def rescaled(self, scale_C: Tensor, shift_C: Tensor) -> "InputStatistics":
        """These statistics after x' = (x - shift) / scale."""
        assert self.low is not None and self.high is not None
        rows = self.sample()
        positions = rows.shape[1] // len(scale_C)
        scale, shift = (v.repeat_interleave(positions) for v in (scale_C, shift_C))
        low, high = (self.low - shift_C) / scale_C, (self.high - shift_C) / scale_C
        return InputStatistics(low, high, [(rows - shift) / scale])

    def covariance(self) -> Tensor:
        """Covariance of the sampled rows (C, C)."""
        rows = self.sample()
        centred = rows - rows.mean(dim=0)
        return centred.T @ centred / len(rows)


def _rows(layer: nn.Conv2d, x_BCHW: Tensor, first: int) -> Tensor:
    """Some rows that the layer multiplies with its flattened weight: a few per image."""
    kernel = layer.kernel_size
    if kernel == (1, 1):
        columns = x_BCHW.flatten(2)
    else:
        columns = F.unfold(x_BCHW, (kernel[0], kernel[1]), stride=layer.stride)
    positions = columns.shape[2]
    # A stride coprime to any image width, and another start for each image.
    start = (first + torch.arange(len(columns), device=columns.device)) * 7919
    steps = torch.arange(ROWS_PER_IMAGE, device=columns.device) * 104729
    chosen = (start[:, None] + steps) % positions
    return (
        columns.gather(2, chosen[:, None].expand(-1, columns.shape[1], -1))
        .transpose(1, 2)
        .flatten(0, 1)
    )


@torch.inference_mode()
def observe(
    model: CompactCare,
    batches: Iterable[Tensor],
    names: Iterable[str],
    not_finite: Callable[[Tensor], Exception] = lambda images: ValueError("NaN or infinity"),
) -> dict[str, InputStatistics]:
    """Run the float model once over all batches, watching the inputs of the named layers.

    `not_finite` makes the error for images whose logits are no numbers.
    """
    found = {name: InputStatistics() for name in names}
    by_layer = {model.get_submodule(name): statistics for name, statistics in found.items()}
    spoiled = None

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        by_layer[layer].add(layer, inputs[0])

    with watching(by_layer, watch):
        for images in batches:
            if not bool(torch.isfinite(model(images)).all()):
                spoiled = images
                break
    if spoiled is not None:
        raise not_finite(spoiled)  # after the block: the error may run the model again
    return found
