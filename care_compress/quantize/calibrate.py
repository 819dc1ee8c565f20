"""Ranges of all quantizers: one streaming pass for activations, and the weights as they stand."""

from collections.abc import Callable, Generator, Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from care_compress.errors import CalibrationError
from care_compress.quantize.health import Health, channel_health, watching_channels
from care_compress.quantize.observers import make_observer, weight_scale
from care_compress.quantize.placement import QuantizedCare, site_of

# Starts a new pass over the calibration images: normalised float batches.
Batches = Callable[[], Generator[Tensor]]


@torch.inference_mode()
def calibrate(
    quantized: QuantizedCare,
    batches: Iterable[Tensor],
    percentile: float,
    covariances: Mapping[str, Tensor] | None = None,
) -> Health:
    """Set every scale and zero point, and switch the simulation on.

    `covariances` are those of the inputs of some layers, by site. Returned is what the channels
    were like on the way.
    """
    quantized.enable(False)
    watched = [q for q in quantized.integers() if q.operand != "weight"]
    for quantizer in watched:
        quantizer.observer = make_observer(quantizer, percentile).to(quantizer.scale.device)
    seen = 0
    with watching_channels(quantized) as channels:
        for images in batches:
            if not bool(torch.isfinite(quantized(images)).all()):
                raise not_finite(quantized, images)
            seen += len(images)
    if not seen:
        raise CalibrationError(
            "there is no calibration image.", "check quantize.calibrate and the training split"
        )
    for quantizer in watched:
        observer = quantizer.observer
        assert observer is not None
        # The logits may hide an infinite value (1 / inf is 0).
        if not all(bool(torch.isfinite(end).all()) for end in (observer.min_val, observer.max_val)):
            raise CalibrationError(
                f"{quantizer.operand} of {quantizer.site} is NaN or infinite on some calibration "
                "images, though the logits are numbers.",
                "keep that site in float by a rule, and check the checkpoint",
            )
        # Searches for a range run on the CPU, where the histograms are.
        quantizer.set_qparams(*observer.cpu().calculate_qparams())
        quantizer.observer = None
    set_weight_scales(quantized, covariances or {})
    quantized.enable(True)
    return channel_health(channels, seen)


def set_weight_scales(quantized: QuantizedCare, covariances: Mapping[str, Tensor]) -> None:
    """Scales of all integer weights, from the weights as they stand."""
    for quantizer in quantized.integers("weight"):
        weight = quantized.weight(quantizer.site)
        # A row of the weight has one scale per channel only; a group would need its own covariance.
        rows = quantizer.spec.granularity == "channel"
        covariance = covariances.get(quantizer.site) if rows else None
        scale = weight_scale(quantizer, weight, covariance)
        quantizer.set_qparams(scale, torch.zeros_like(quantizer.zero_point))


class _FirstNonFinite(Interpreter):
    """Runs the graph node by node until a value is no number."""

    found: Node | None = None

    def run_node(self, n: Node) -> object:
        out = super().run_node(n)
        bad = isinstance(out, Tensor) and not bool(torch.isfinite(out).all())
        if bad and self.found is None:
            self.found = n
        return out


def not_finite(quantized: QuantizedCare, images: Tensor) -> CalibrationError:
    """The error for such images; names the first operation of the float graph that makes one."""
    run = _FirstNonFinite(quantized.graph)
    run.run(images)
    assert run.found is not None
    node = run.found
    if node.op == "placeholder":
        where = "the input images"
    elif node.op == "get_attr":
        where = f"the parameter {str(node.target).removeprefix('network.')}"
    else:
        where = f"{site_of(node)} ({node.name})"
    return CalibrationError(
        f"the float model computes NaN or infinity; the first comes from {where}.",
        "check the checkpoint, and data.mean and data.std",
    )
