"""What quantization costs beside the float model (`make bench WHAT=quantize`).

Two ratios on CARE-S0 at 96x96, in alternating groups so that noise on the machine hits both alike:
a QAT step (teacher, fake quantization, learned scales) over a float training step, and one pass of
observers over calibration images over the float forward of the same images.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from steps import CLASSES, MEAN, SIZE, STD, interleaved, random_batch, trainer_step
from torch import Tensor

from care_compress.data.transforms import normalize
from care_compress.model.care import build_model
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantize.calibrate import calibrate
from care_compress.quantize.placement import QuantizedCare, simulate
from care_compress.quantize.ptq import planned
from care_compress.quantize.qat import FollowFloat, parameter_groups, prepare_to_learn
from care_compress.recipe.quantize import QatSection, RangeMethod, TensorSection
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import TrainSection
from care_compress.tasks.classification import BothHeads, Classification

METHODS: tuple[RangeMethod, ...] = ("min_max", "percentile", "mse", "entropy")


def networks(method: RangeMethod) -> tuple[CompactCare, QuantizedCare]:
    """CARE-S0, rewritten, and quantized as the default recipe does with this range."""
    recipe = load_recipe("int8_qat")
    assert recipe.quantize is not None
    first, *others = recipe.quantize.rules
    rule = first.model_copy(
        update={"input": TensorSection(bits=8, range=method, granularity="tensor")}
    )
    section = recipe.quantize.model_copy(update={"rules": (rule, *others)})
    if method == "min_max":
        section = recipe.quantize
    compact = rewrite(build_model("care_s0", CLASSES), recipe.rewrite)
    network, plan = planned(compact, section, SIZE)
    return network, simulate(network, plan)


def ratios(pairs: list[tuple[float, float]]) -> list[float]:
    """Ours over the base, sorted."""
    return sorted(ours / base for ours, base in pairs)


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=512, help="calibration images per pass")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {"QAT step / float training step": qat_ratios(options.batch, options.rounds)}
    images = torch.randn(options.images, 3, SIZE, SIZE).contiguous(
        memory_format=torch.channels_last
    )
    for method in METHODS:
        name = f"calibration / float forward, {method}"
        found[name] = calibration_ratios(torch.split(images, 32), method, options.rounds)
    table = Table("CARE-S0, 96x96", "ratio", "quartiles")
    for name, values in found.items():
        quarter = len(values) // 4
        table.add_row(
            name,
            f"{statistics.median(values):.2f}",
            f"{values[quarter]:.2f} to {values[-1 - quarter]:.2f}",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def qat_ratios(batch_size: int, rounds: int) -> list[float]:
    """A whole QAT step, teacher included, over a whole float step."""
    batch = random_batch(batch_size)
    plan = TrainSection(epochs=10, batch_size=batch_size, learning_rate=1e-4)
    float_step = trainer_step(build_model("care_s0", CLASSES), BothHeads(None, None), plan, batch)
    compact, model = networks("min_max")
    calibrate(model, [normalize(batch.images, MEAN, STD)], 99.99)
    prepare_to_learn(model)
    section = QatSection(batch_size=batch_size, dampening=0.1)
    qat_step = trainer_step(
        model, FollowFloat(Classification(), compact, section), section, batch, parameter_groups
    )
    return ratios(interleaved(qat_step, float_step, rounds))


def calibration_ratios(
    batches: tuple[Tensor, ...], method: RangeMethod, rounds: int
) -> list[float]:
    """One pass of observers, ranges included, over the plain forward."""
    compact, model = networks(method)
    compact.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            compact(batch)

    def observed() -> None:
        calibrate(model, batches, 99.99)

    return ratios(interleaved(observed, forward, rounds))


if __name__ == "__main__":
    main()
