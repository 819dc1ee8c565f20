"""Sites measured on Ray's workers: the same numbers as in one process, bit for bit.

A site is a piece of seconds. What all of them need, the quantized network and the images, is
written beside the run once and read by each worker once, so a worker's memory is that of one
network and of the images, however many sites there are.
"""

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from care_compress.data.loader import Batch
from care_compress.files import temporary_folder
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.search import MeasureNoises, noise_of
from care_compress.quantize.sensitivity import Effects, MeasureSites, SiteJob, load_job, save_job
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.sections import RewriteSection
from care_compress.sweep.cluster import Cluster
from care_compress.sweep.pieces import in_pieces
from care_compress.tasks.known import task_called

Found = TypeVar("Found")


def sites_on(cluster: Cluster, run: Path) -> MeasureSites:
    """Return what measures the sites of a run on the workers of a cluster."""

    def measure(job: SiteJob, sites: Sequence[str]) -> Generator[tuple[str, Effects]]:
        return shared_out(cluster, run, effects_of, job, sites)

    return measure


def noises_on(cluster: Cluster, run: Path, rewrites: RewriteSection) -> MeasureNoises:
    """Return what measures the sites of a search for bits on the workers of a cluster."""

    def measure(
        model: QuantizedCare,
        section: QuantizeSection,
        images: Sequence[Tensor],
        sites: Sequence[str],
    ) -> dict[str, float]:
        none = torch.empty(0, dtype=torch.int64)  # noise is that of answers, right or wrong
        batches = tuple(Batch(one, none, none) for one in images)
        job = SiteJob(task_called(model.task), model, section, rewrites, batches)
        return dict(shared_out(cluster, run, noise_there, job, sites))

    return measure


def shared_out(
    cluster: Cluster,
    run: Path,
    task: Callable[[Path, str, str], Found],
    job: SiteJob,
    sites: Sequence[str],
) -> Generator[tuple[str, Found]]:
    """Do a task for every site; what travels lies in the run's folder meanwhile."""
    with temporary_folder(run.absolute() / "sites") as folder:
        digest = save_job(job, folder)
        gpus = 1 if job.batches[0].images.is_cuda else 0
        yield from in_pieces(cluster, task, (folder, digest), sites, lambda site: site, gpus)


def effects_of(folder: Path, digest: str, site: str) -> Effects:
    """Measure one site, on a node."""
    return kept_job(folder, digest).effects(site)


def noise_there(folder: Path, digest: str, site: str) -> float:
    """Measure the noise of one site, on a node."""
    job = kept_job(folder, digest)
    return noise_of(job.model, job.pixels, job.float_answers, site)


@lru_cache(maxsize=1)
def kept_job(folder: Path, digest: str) -> SiteJob:
    """Read what the sites are measured on, once for all sites of a worker."""
    job = load_job(folder, digest)
    job.model.to(job.batches[0].images.device)
    return job
