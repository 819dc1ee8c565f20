"""Post-training quantization, start to end: from the rewritten float model to simulated integers.

    structure -> plan -> rotate -> rescale -> place -> calibrate -> reconstruct -> correct

Each step is switched by one key of the recipe's ``quantize`` section.
"""

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from care_compress.errors import CalibrationError
from care_compress.libraries import quiet
from care_compress.model.attention import CovarianceCore
from care_compress.model.compact import CompactCare, SlicedMixer
from care_compress.quantize.calibrate import Batches, calibrate, not_finite
from care_compress.quantize.correct import correct
from care_compress.quantize.equalize import (
    equalized_layers,
    give_biases,
    norms_to_affine,
    rescale,
    rotate,
)
from care_compress.quantize.gelu import use_hard_swish
from care_compress.quantize.health import Health
from care_compress.quantize.placement import QuantizedCare, simulate
from care_compress.quantize.plan import ATTENTION_PRODUCTS, make_plan
from care_compress.quantize.reconstruct import reconstruct
from care_compress.quantize.spec import Plan
from care_compress.quantize.statistics import observe
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.target import load_target

# What corrections hold at once: 256 images at 96, 50 at 224.
PIXELS = 2_500_000  # images times pixels
LEAST_IMAGES = 16


@dataclass(frozen=True)
class PtqJob:
    """What is quantized, and on what; how is the recipe's ``quantize`` section."""

    network: CompactCare
    resolution: int
    seed: int
    batches: Batches
    notify: Callable[[str], None] = lambda step: None  # what is being done


@dataclass(frozen=True)
class Tuning:
    """What the methods that look at data decided."""

    alphas: dict[str, float | None]  # of the layers that could be rescaled; None: left alone
    rounded: dict[str, bool]  # halves whose rounding was learned, to whether it was kept

    def __str__(self) -> str:
        changed = sum(alpha is not None for alpha in self.alphas.values())
        parts = [f"{changed} of {len(self.alphas)} layers rescaled"] if self.alphas else []
        if self.rounded:
            kept = sum(self.rounded.values())
            parts.append(f"learned rounding kept in {kept} of {len(self.rounded)} halves")
        return ", ".join(parts)


@dataclass(frozen=True)
class Quantized:
    """What PTQ hands on."""

    model: QuantizedCare
    tuning: Tuning
    health: Health


def planned(
    network: CompactCare, section: QuantizeSection, resolution: int
) -> tuple[CompactCare, Plan]:
    """A copy of the network in the form that is quantized, and the plan for it; needs no data."""
    network = copy.deepcopy(network)
    norms_to_affine(network)
    if section.activation == "hard_swish":
        use_hard_swish(network)
    target = load_target(section.target, section.full_range) if section.target else None
    plan = make_plan(network, section.rules, target, resolution)
    if section.covariance:  # wherever an attention product will be an integer one
        for decision in plan.decisions:
            if decision.site.role in ATTENTION_PRODUCTS and decision.input.is_integer:
                mixer = network.get_submodule(decision.site.name.rsplit(".", 2)[0])
                assert isinstance(mixer, SlicedMixer)
                mixer.core = CovarianceCore()
    if section.hadamard:
        rotate(network, plan)
    give_biases(network, equalized_layers(plan, section.prescale, section.equalize))
    return network, make_plan(network, section.rules, target, resolution)


def quantize_network(job: PtqJob, section: QuantizeSection) -> Quantized:
    """Quantize a float network on calibration images."""
    job.notify("rescaling channels")
    network, plan = planned(job.network, section, job.resolution)
    alphas, covariances = _rescaled(network, plan, section, job.batches)
    job.notify("finding ranges")
    model = simulate(network, plan)
    health = calibrate(model, job.batches(), section.calibrate.percentile, covariances)
    reference = float_reference(model)
    biases, norms = section.bias_correction, section.norm_reestimation
    job.notify("correcting biases and norms")
    images = first_images(job.batches, max(LEAST_IMAGES, PIXELS // job.resolution**2))
    correct(model, reference, images, biases=biases, norms=norms)
    rounded = {}
    if section.reconstruct:
        # After the corrections: rounding should not be spent on what they mend for nothing.
        rounded = reconstruct(
            model, reference, section.reconstruct, job.batches, job.seed, job.notify
        )
        correct(model, reference, images, biases=biases, norms=norms)
    return Quantized(model, Tuning(alphas, rounded), health)


def float_reference(model: QuantizedCare) -> QuantizedCare:
    """A copy with the quantizers off: the float model in the same graph, whatever follows."""
    with quiet():
        reference = copy.deepcopy(model)
    reference.enable(False)
    return reference


def first_images(batches: Batches, count: int) -> Tensor:
    """The first `count` calibration images, or all if there are fewer."""
    found, missing = [], count
    with closing(batches()) as stream:
        for images in stream:
            found.append(images[:missing])
            missing -= len(images)
            if missing <= 0:
                break
    return torch.cat(found)


def _rescaled(
    network: CompactCare, plan: Plan, section: QuantizeSection, batches: Batches
) -> tuple[dict[str, float | None], dict[str, Tensor]]:
    """Rescale what can be; the alphas, and the covariance of every such layer's new input."""
    wanted = equalized_layers(plan, section.prescale, section.equalize)
    if not wanted:
        return {}, {}

    def named(images: Tensor) -> CalibrationError:
        with torch.inference_mode(False):  # nothing can be exported inside it
            graph = simulate(network, plan)
        graph.enable(False)
        return not_finite(graph, images)

    seen = observe(network, batches(), wanted, named)
    alphas: dict[str, float | None] = {}
    covariances = {}
    for name, alpha in wanted.items():
        chosen = rescale(network, plan, name, alpha, seen[name])
        if chosen is not None:
            seen[name] = seen[name].rescaled(chosen.scale, chosen.shift)
        alphas[name] = None if chosen is None else chosen.alpha
        covariances[name] = seen[name].covariance()
    return alphas, covariances
