"""Which site costs accuracy: each quantized alone, and each left alone out.

Alone shows what a site does by itself, left out what the network would gain without it; where the
two disagree, errors add up or cancel. Every finished site is written at once, so an interrupted
measurement goes on where it stopped, and nothing is measured twice for the same content.
"""

import contextlib
import platform
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from care_compress.errors import RunError
from care_compress.files import (
    atomic_file,
    fingerprint,
    json_text,
    read_json,
    sha256_file,
    write_text,
)
from care_compress.quantize.artifact import load_saved, quantized_header, save_quantized
from care_compress.quantize.placement import QuantizedCare
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.sections import RewriteSection
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


Effects = dict[str, dict[str, float]]  # both of a site, by name, as plain data


@dataclass(frozen=True)
class SiteJob:
    """What sites are measured on: a network with their quantizers, and images held in memory."""

    model: QuantizedCare
    section: QuantizeSection  # and the rewrites: what builds the network again elsewhere
    rewrites: RewriteSection
    images: tuple[Tensor, ...]
    labels_B: Tensor

    @cached_property
    def float_logits_BK(self) -> Tensor:
        """Logits of the network without any quantizer."""
        self.model.enable(False)
        return logits_of(self.model, self.images)

    def effects(self, site: str) -> Effects:
        """Measure one site, alone and left out."""
        wanted, sites = self.float_logits_BK, set(quantized_sites(self.model))
        found = {}
        for name, chosen in (("alone", {site}), ("left_out", sites - {site})):
            only(self.model, chosen)
            found[name] = asdict(effect(logits_of(self.model, self.images), wanted, self.labels_B))
        return found


MODEL_FILE, IMAGES_FILE = "model.safetensors", "images.pt"


def save_job(job: SiteJob, folder: Path) -> str:
    """Write a job for other processes; return the digest that they check."""
    save_quantized(job.model, job.section, job.rewrites, folder / MODEL_FILE)
    with atomic_file(folder / IMAGES_FILE) as path:
        torch.save({"images": list(job.images), "labels": job.labels_B}, path)
    return fingerprint([sha256_file(folder / name) for name in (MODEL_FILE, IMAGES_FILE)])


def load_job(folder: Path, digest: str) -> SiteJob:
    """Read a job; `RunError` where this machine does not see what was written."""
    files = [folder / name for name in (MODEL_FILE, IMAGES_FILE)]
    if not all(file.is_file() for file in files) or digest != fingerprint(
        [sha256_file(file) for file in files]
    ):
        raise RunError(
            f"{platform.node()} does not see {folder}.",
            "put --runs on storage that every node mounts under the same path",
        )
    header, saved = quantized_header(files[0]), load_saved(files[0])
    assert header is not None
    held = torch.load(files[1], weights_only=True)
    return SiteJob(
        saved.model, saved.section, header.rewrite, tuple(held["images"]), held["labels"]
    )


# A job and sites; each site with its effects comes back, in any order.
MeasureSites = Callable[[SiteJob, Sequence[str]], Generator[tuple[str, Effects]]]


def one_by_one(job: SiteJob, sites: Sequence[str]) -> Generator[tuple[str, Effects]]:
    """Measure in this process, in the order of the network."""
    for site in sites:
        yield site, job.effects(site)


def measure_sensitivity(
    job: SiteJob,
    cache: Path,
    key: str,
    progress: Callable[[int], None],
    measure: MeasureSites = one_by_one,
) -> list[Sensitivity]:
    """Measure every site, hardest first; `cache` holds what is done for this `key`.

    `measure` may spread the sites over processes: each of them is independent of the others.
    """
    sites = quantized_sites(job.model)
    done: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent, or damaged
        content = read_json(cache)
        if content["key"] == key:  # else it is of another model, or other images
            done = dict(content["sites"])
    missing = [site for site in sites if site not in done]
    progress(len(sites) - len(missing))
    with contextlib.closing(measure(job, missing)) as measured:
        for site, effects in measured:
            done[site] = effects
            in_order = {name: done[name] for name in sites if name in done}
            content = {"key": key, "images": len(job.labels_B), "sites": in_order}
            write_text(cache, json_text(content, indent=1))
            progress(1)
    job.model.enable(True)
    found = [
        Sensitivity(site, Effect(**done[site]["alone"]), Effect(**done[site]["left_out"]))
        for site in sites
    ]
    return sorted(found, key=lambda one: one.alone.sqnr_db)
