"""What every runtime looks like to accuracy, latency and distillation: pixels in, logits out."""

from typing import Protocol

from torch import Tensor


class Predictor(Protocol):
    """A loaded classifier, wherever it runs."""

    num_classes: int

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, K) in float32 of normalised float32 images; any batch size."""
        ...
