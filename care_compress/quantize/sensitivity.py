"""Which site costs accuracy: each quantized alone, and each left alone out.

Alone shows what a site does by itself, left out what the network would gain without it; where the
two disagree, errors add up or cancel. Every finished site is written at once, so an interrupted
measurement goes on where it stopped, and nothing is measured twice for the same content.
"""

import contextlib
import platform
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from care_compress.data.annotations import Annotation, Boxes
from care_compress.data.loader import Batch
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
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Score, Task


@dataclass(frozen=True)
class Effect:
    """Distance of quantized answers from the float ones over some images."""

    sqnr_db: float
    kl: float
    drop: float  # points of the task's metric, by whose key JSON has it


@dataclass(frozen=True)
class Sensitivity:
    """What one site does."""

    site: str
    alone: Effect
    left_out: Effect  # of everything else


@torch.inference_mode()
def logits_of(model: QuantizedCare, images: Sequence[Tensor]) -> Tensor:
    """Logits of all batches, or what a network of another task answers."""
    return torch.cat([model(batch) for batch in images])


class Answered(NamedTuple):
    """Answers to all batches, and how good they are."""

    answers: Tensor
    score: Score

    @classmethod
    def of(cls, task: Task, answers: Tensor, batches: Sequence[Batch]) -> "Answered":
        """Count answers to these batches."""
        parts = torch.split(answers, [len(batch.images) for batch in batches])
        first, *others = map(task.count, parts, batches)
        return cls(answers, sum(others, first))


def effect(task: Task, found: Answered, wanted: Answered) -> Effect:
    """SQNR of the answers, mean KL(float || quantized) over their rows, and points lost."""
    distance = Distance()
    distance.add(wanted.answers, found.answers)
    before, after = (
        F.log_softmax(task.rows(one.answers).double(), dim=1) for one in (wanted, found)
    )
    kl = F.kl_div(after, before, reduction="batchmean", log_target=True)
    return Effect(distance.shown_db, float(kl), task.lost(wanted.score, found.score))


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

    task: Task
    model: QuantizedCare
    section: QuantizeSection  # and the rewrites: what builds the network again elsewhere
    rewrites: RewriteSection
    batches: tuple[Batch, ...]

    @property
    def images(self) -> int:
        """How many images."""
        return sum(len(batch.images) for batch in self.batches)

    @property
    def pixels(self) -> list[Tensor]:
        """The images of every batch."""
        return [batch.images for batch in self.batches]

    @cached_property
    def float_answers(self) -> Tensor:
        """Answers of the network without any quantizer."""
        self.model.enable(False)
        return logits_of(self.model, self.pixels)

    @cached_property
    def in_float(self) -> Answered:
        """Those answers, and how good they are."""
        return Answered.of(self.task, self.float_answers, self.batches)

    def effects(self, site: str) -> Effects:
        """Measure one site, alone and left out."""
        wanted, sites = self.in_float, set(quantized_sites(self.model))
        found = {}
        for name, chosen in (("alone", {site}), ("left_out", sites - {site})):
            only(self.model, chosen)
            answers = logits_of(self.model, self.pixels)
            one = effect(self.task, Answered.of(self.task, answers, self.batches), wanted)
            lost = {self.task.metric.key: one.drop}
            found[name] = {"sqnr_db": one.sqnr_db, "kl": one.kl, **lost}
        return found

    def effect_of(self, told: Mapping[str, float]) -> Effect:
        """Read an effect from plain data."""
        return Effect(told["sqnr_db"], told["kl"], told[self.task.metric.key])


MODEL_FILE, IMAGES_FILE = "model.safetensors", "images.pt"


def save_job(job: SiteJob, folder: Path) -> str:
    """Write a job for other processes; return the digest that they check."""
    save_quantized(job.model, job.section, job.rewrites, folder / MODEL_FILE)
    with atomic_file(folder / IMAGES_FILE) as path:
        torch.save([_packed(batch) for batch in job.batches], path)
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
    task = task_called(header.task)
    return SiteJob(task, saved.model, saved.section, header.rewrite, tuple(map(_unpacked, held)))


def _packed(batch: Batch) -> dict[str, Any]:
    """A batch as tensors and numbers alone, which are read without running code."""
    labels: list[Any] = []
    for one in batch.annotations:
        if isinstance(one, Boxes):
            parts = (one.corners, one.classes, one.crowd)
            labels.append((*map(torch.from_numpy, parts), *one.size))
        else:
            labels.append(torch.from_numpy(one))
    return {**batch._asdict(), "annotations": labels}


def _unpacked(held: Mapping[str, Any]) -> Batch:
    labels: list[Annotation] = []
    for one in held["annotations"]:
        if isinstance(one, Tensor):
            labels.append(one.numpy())
        else:
            corners, classes, crowd, height, width = one
            labels.append(Boxes(corners.numpy(), classes.numpy(), crowd.numpy(), (height, width)))
    return Batch(held["images"], held["labels"], held["indices"], tuple(labels))


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
            content = {"key": key, "images": job.images, "sites": in_order}
            write_text(cache, json_text(content, indent=1))
            progress(1)
    job.model.enable(True)
    found = [
        Sensitivity(site, job.effect_of(done[site]["alone"]), job.effect_of(done[site]["left_out"]))
        for site in sites
    ]
    return sorted(found, key=lambda one: one.alone.sqnr_db)
