"""Post-training quantization, start to end: from the rewritten float model to simulated integers.

    structure -> plan -> rotate -> rescale -> place -> calibrate -> reconstruct -> correct

Each step is switched by one key of the recipe's ``quantize`` section.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from care_compress.model.attention import CovarianceCore
from care_compress.model.compact import CompactCare, SlicedMixer
from care_compress.quantization_sections import QuantizeSection
from care_compress.quantize.calibrate import Batches, calibrate
from care_compress.quantize.correct import correct, images_to_hold
from care_compress.quantize.equalize import (
    equalized_layers,
    give_biases,
    norms_to_affine,
    rescale,
    rotate,
)
from care_compress.quantize.placement import QuantizedCare, simulate
from care_compress.quantize.plan import ATTENTION_PRODUCTS, make_plan
from care_compress.quantize.quiet import quiet
from care_compress.quantize.reconstruct import reconstruct
from care_compress.quantize.spec import Plan
from care_compress.quantize.statistics import observe
from care_compress.target import load_target


@dataclass
class Quantized:
    """What PTQ hands on."""

    model: QuantizedCare
    alphas: dict[str, float | None] = field(default_factory=dict)  # rescaled layer to its alpha


def planned(
    network: CompactCare, section: QuantizeSection, resolution: int
) -> tuple[CompactCare, Plan]:
    """A copy of the network in the form that is quantized, and the plan for it; needs no data."""
    network = copy.deepcopy(network)
    norms_to_affine(network)
    target = load_target(section.target) if section.target else None
    plan = make_plan(network, section.rules, target, resolution)
    if section.covariance:
        _use_covariance(network, plan)
    if section.hadamard:
        rotate(network, plan)
    give_biases(network, equalized_layers(plan, section.prescale, section.equalize))
    return network, make_plan(network, section.rules, target, resolution)


def quantize_network(
    network: CompactCare, section: QuantizeSection, resolution: int, seed: int, batches: Batches
) -> Quantized:
    """Quantize a float network on calibration images; `batches` starts one pass over them."""
    network, plan = planned(network, section, resolution)
    alphas, covariances = _rescaled(network, plan, section, batches)
    model = simulate(network, plan)
    calibrate(model, batches(), section.calibrate.percentile, covariances)
    reference = float_reference(model)
    biases, norms = section.bias_correction, section.norm_reestimation
    images = first_images(batches, images_to_hold(resolution))
    correct(model, reference, images, biases=biases, norms=norms)
    if section.reconstruct:
        # After the corrections: rounding should not be spent on what they mend for nothing.
        reconstruct(model, reference, section.reconstruct, batches, seed)
        correct(model, reference, images, biases=biases, norms=norms)
    return Quantized(model, alphas)


def float_reference(model: QuantizedCare) -> QuantizedCare:
    """A copy with the quantizers off: the float model in the same graph, whatever follows."""
    with quiet():
        reference = copy.deepcopy(model)
    reference.enable(False)
    return reference


def first_images(batches: Batches, count: int) -> Tensor:
    """The first `count` calibration images, or all if there are fewer."""

    def enough() -> Iterator[Tensor]:
        missing = count
        for images in batches():
            yield images[:missing]
            missing -= len(images)
            if missing <= 0:
                return

    return torch.cat(list(islice(enough(), count)))


def _rescaled(
    network: CompactCare, plan: Plan, section: QuantizeSection, batches: Batches
) -> tuple[dict[str, float | None], dict[str, Tensor]]:
    """Rescale what can be; the alphas, and the covariance of every such layer's new input."""
    wanted = equalized_layers(plan, section.prescale, section.equalize)
    if not wanted:
        return {}, {}
    seen = observe(network, batches(), wanted)
    alphas: dict[str, float | None] = {}
    covariances = {}
    for name, alpha in wanted.items():
        chosen = rescale(network, plan, name, alpha, seen[name])
        if chosen is not None:
            seen[name] = seen[name].rescaled(chosen.scale, chosen.shift)
        alphas[name] = None if chosen is None else chosen.alpha
        covariances[name] = seen[name].covariance()
    return alphas, covariances


def _use_covariance(network: CompactCare, plan: Plan) -> None:
    """Put the covariance form wherever an attention product will be an integer one."""
    for decision in plan.decisions:
        if decision.site.role in ATTENTION_PRODUCTS and decision.input.is_integer:
            mixer = network.get_submodule(decision.site.name.rsplit(".", 2)[0])
            assert isinstance(mixer, SlicedMixer)
            mixer.core = CovarianceCore()
