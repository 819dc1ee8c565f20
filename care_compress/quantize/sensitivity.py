"""Which site costs accuracy: each quantized alone, and each left alone out.

Alone shows what a site does by itself, left out what the network would gain without it; where the
two disagree, errors add up or cancel. Every finished site is written at once, so an interrupted
measurement goes on where it stopped, and nothing is measured twice for the same content.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from care_compress.files import json_text, read_json, write_text
from care_compress.quantize.placement import QuantizedCare
from care_compress.tasks.distance import Distance


@dataclass(frozen=True)
class Effect:
    """Distance of quantized logits from the float ones over some images."""

    sqnr_db: float
    kl: float
    top1: float  # points lost


@dataclass(frozen=True)
class Sensitivity:
    """What one site does."""

    site: str
    alone: Effect
    left_out: Effect  # of everything else


@torch.inference_mode()
def logits_of(model: QuantizedCare, images: Sequence[Tensor]) -> Tensor:
    """Logits of all batches."""
    return torch.cat([model(batch) for batch in images])


def effect(quantized_BK: Tensor, float_BK: Tensor, labels_B: Tensor) -> Effect:
    """SQNR of the logits, mean KL(float || quantized), and top-1 lost in points."""
    distance = Distance()
    distance.add(float_BK, quantized_BK)
    before, after = (F.log_softmax(x.double(), dim=1) for x in (float_BK, quantized_BK))
    kl = F.kl_div(after, before, reduction="batchmean", log_target=True)
    right = [(x.argmax(dim=1) == labels_B).double().mean() for x in (float_BK, quantized_BK)]
    return Effect(distance.shown_db, float(kl), 100 * float(right[0] - right[1]))


def quantized_sites(model: QuantizedCare) -> list[str]:
    """Every site that has a quantizer, in the order of the network."""
    return list(dict.fromkeys(quantizer.site for quantizer in model.quantizers()))


def only(model: QuantizedCare, sites: set[str]) -> None:
    """Quantize these sites and no other."""
    for quantizer in model.quantizers():
        quantizer.enabled = quantizer.site in sites


def measure_sensitivity(
    model: QuantizedCare,
    images: Sequence[Tensor],
    labels: Tensor,
    cache: Path,
    key: str,
    progress: Callable[[int], None],
) -> list[Sensitivity]:
    """Measure every site, hardest first; `cache` holds what is done for this `key`."""
    model.enable(False)
    float_logits = logits_of(model, images)
    sites = quantized_sites(model)
    done: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent, or damaged
        content = read_json(cache)
        if content["key"] == key:  # else it is of another model, or other images
            done = dict(content["sites"])
    for site in sites:
        if site not in done:
            found = {}
            for name, chosen in (("alone", {site}), ("left_out", set(sites) - {site})):
                only(model, chosen)
                found[name] = asdict(effect(logits_of(model, images), float_logits, labels))
            done[site] = found
            content = {"key": key, "images": len(labels), "sites": done}
            write_text(cache, json_text(content, indent=1))
        progress(1)
    model.enable(True)
    measured = [
        Sensitivity(site, Effect(**effects["alone"]), Effect(**effects["left_out"]))
        for site, effects in done.items()
    ]
    return sorted(measured, key=lambda one: one.alone.sqnr_db)
