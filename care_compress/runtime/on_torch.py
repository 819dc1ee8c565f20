"""Predictions by a torch module."""

import torch
from torch import Tensor, nn


class TorchPredictor:
    """Runs a CARE (published or rewritten) in eval mode without gradients."""

    def __init__(self, model: nn.Module, num_classes: int, device: torch.device) -> None:
        # channels_last is what CPU and GPU convolutions are fastest in.
        layout = torch.channels_last
        self.model = model.to(device=device, memory_format=layout).eval()  # type: ignore[call-overload]
        self.task: str = getattr(model, "task", "classification")  # of a bare module, too
        self.num_classes = num_classes
        self.device = device

    @torch.inference_mode()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Answers (B, ...) on the images' device."""
        images = images_BCHW.to(self.device, memory_format=torch.channels_last)
        logits: Tensor = self.model(images)
        return logits.float().to(images_BCHW.device)
