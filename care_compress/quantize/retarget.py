"""One quantized model, many targets: the same weights, ranges in the form each runtime executes.

TensorRT takes one symmetric range for a tensor, OpenVINO a zero point and a range for each channel
of a depthwise input. What calibration or training found says everything about either,

    low = s (q_min - z),    high = s (q_max - z),

so no image is needed, and ranges that QAT learned are kept.
"""

import copy

import torch
from torch import Tensor

from care_compress.model.compact import CompactCare
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.gelu import use_gelu
from care_compress.quantize.placement import ROOT, QuantizedCare, replanned
from care_compress.quantize.plan import ATTENTION_PRODUCTS, make_plan
from care_compress.quantize.spec import TensorSpec
from care_compress.recipe.quantize import QuantizeSection, RuleSection
from care_compress.recipe.sections import ExportSection
from care_compress.recipe.target import Target

SMALLEST_SCALE = 2.0**-24  # float16's smallest number
LARGEST_SUM = 2.0**31
# Around this zero point OpenVINO takes u8 for s8, and a product of u8 and s8 that fill 8 bits both
# overflows without dot products. Others it multiplies as floats.
SIGNED = 128


def float_network(model: QuantizedCare, skeleton: CompactCare) -> CompactCare:
    """The network inside a quantized model: `skeleton` with its weights, rescaled and trained."""
    network = copy.deepcopy(skeleton)
    network.load_state_dict(model.graph.get_submodule(ROOT).state_dict(), strict=True)
    return network


def retarget(
    model: QuantizedCare, network: CompactCare, rules: tuple[RuleSection, ...], target: Target
) -> QuantizedCare:
    """The model as `target` executes it by these rules; `RecipeError` if it cannot.

    `network` is the one inside `model`.
    """
    plan = make_plan(network, rules, target, model.plan.resolution, model.plan)
    moved = replanned(model, plan)
    found = {(quantizer.site, quantizer.operand): quantizer for quantizer in model.integers()}
    for quantizer in moved.integers():
        source = found[quantizer.site, quantizer.operand]
        scale, zero_point = _range_in(source, quantizer.spec, len(quantizer.scale))
        # Of an attention product, this activation stands in the place of a weight.
        in_product = plan.of(quantizer.site).site.role in ATTENTION_PRODUCTS
        if in_product and quantizer.operand == "right" and target.weights.reduce_range:
            zero_point = torch.where(zero_point == SIGNED, SIGNED - 1, zero_point)
        quantizer.set_qparams(scale, zero_point)
        if target.is_typed:
            quantizer.scale.copy_(_round_up_to_half(quantizer.scale))
    use_gelu(moved, target.gelu)
    if target.runtime == "onnxruntime":
        _round_biases(moved)
    return moved


@torch.no_grad()
def _round_biases(model: QuantizedCare) -> None:
    """Biases as whole steps of the integer sums, n s_x s_w.

    ONNX Runtime adds them to its int32 sums and rounds them to that, unasked. Rounded here, the
    simulation knows: what is between them falls from 39 to 43 dB.
    """
    scales = {(q.site, q.operand): q.calculate_qparams()[0] for q in model.integers()}
    parameters = dict(model.graph.named_parameters())
    for (site, operand), step in scales.items():
        bias, weight = parameters.get(f"{ROOT}.{site}.bias"), scales.get((site, "weight"))
        if operand != "input" or bias is None or weight is None or len(step) > 1:
            continue
        if len(weight) in (1, len(bias)):  # a group of input channels has no scale of the sum
            unit = step.double() * weight.double()
            count = (bias / unit).round()
            bias.copy_(torch.where(count.abs() < LARGEST_SUM, count * unit, bias.double()))


def _range_in(source: IntQuantizer, spec: TensorSpec, scales: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of `spec` that cover what `source` covers."""
    scale, zero_point = source.calculate_qparams()
    alike = source.spec.granularity == spec.granularity and source.spec.symmetric == spec.symmetric
    ends = (source.quant_min, source.quant_max)
    if alike and ends == (spec.quant_min, spec.quant_max) and len(scale) == scales:
        return scale, zero_point
    low = scale * (source.quant_min - zero_point)
    high = scale * (source.quant_max - zero_point)
    if scales == 1:
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    low, high = low.expand(scales), high.expand(scales)
    if spec.symmetric:
        scale = torch.maximum(low / spec.quant_min, high / spec.quant_max)
        return scale, torch.zeros_like(scale)
    scale = (high - low) / (spec.quant_max - spec.quant_min)
    return scale, (spec.quant_min - low / scale).round()


def _round_up_to_half(scale: Tensor) -> Tensor:
    """The next float16: upwards, so that the largest value still fits.

    A graph typed in float16 holds its scales in float16. Rounded here, the simulation and the
    integers made from the weights know it; rounded in the file, every weight of a channel with a
    tiny scale would be off by up to half.
    """
    half = scale.to(torch.float16)
    low = half.float() < scale
    up = torch.nextafter(half, torch.full_like(half, torch.inf))
    return torch.where(low, up, half).float().clamp(min=SMALLEST_SCALE)


def export_rules(
    export: ExportSection, section: QuantizeSection, target: Target
) -> tuple[RuleSection, ...]:
    """The rules a model was quantized by, and then the target's own unless those are unwanted."""
    return (*section.rules, *target.rules) if export.target_rules else section.rules
