"""Rounding to integers and back, x^ = s (clamp(round(x / s) + z, q_min, q_max) - z).

PyTorch's own operation goes through 64-bit integers one number at a time on a CPU. The same steps
on whole tensors give the same bits in a sixth of the time (LOG.md); without them over half of a
simulated forward pass would be rounding. Only NaN differs: it stays one here, where PyTorch makes
it the low end of the range.
"""

import torch
from torch import Tensor


def round_to_integers(
    x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], axis: int | None = None
) -> Tensor:
    """`x` as integers within the limits hold it; with an axis, each index has a scale of its own.

    Gradients pass where nothing was cut off.
    """
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if differentiated or x.device.type != "cpu" or x.dtype != torch.float32:
        return _by_torch(x, scale, zero_point, limits, axis)
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    steps = (x * scale.reciprocal()).round_().add_(zero_point).clamp_(*limits)
    return steps.sub_(zero_point).mul_(scale)


def _by_torch(
    x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], axis: int | None
) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *limits)
