"""Sites measured on Ray's workers: the same numbers as in one process, bit for bit.

A site is a piece of seconds. What all of them need, the quantized network and the images, is
written beside the run once and read by each worker once, so a worker's memory is that of one
network and of the images, however many sites there are.
"""

from collections.abc import Generator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from care_compress.errors import CareError, TargetError
from care_compress.files import temporary_folder
from care_compress.quantize.sensitivity import Effects, MeasureSites, SiteJob, load_job, save_job
from care_compress.sweep.cluster import Cluster
from care_compress.sweep.driver import LOST, SPARE, told_by_ray


def sites_on(cluster: Cluster, run: Path) -> MeasureSites:
    """Return what measures the sites of a run on the workers of a cluster."""

    def measure(job: SiteJob, sites: Sequence[str]) -> Generator[tuple[str, Effects]]:
        ray, ahead, waiting = cluster.ray, list(sites), dict[Any, str]()
        task = ray.remote(effects_of).options(num_cpus=1, max_retries=LOST)
        with temporary_folder(run.absolute() / "sites") as folder:
            digest = save_job(job, folder)
            while ahead or waiting:
                while ahead and len(waiting) < cluster.slots(1, 0) + SPARE:
                    site = ahead.pop(0)
                    waiting[task.remote(folder, digest, site)] = site
                for reference in cluster.wait(list(waiting)):
                    site = waiting.pop(reference)
                    try:
                        effects: Effects = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        cause = getattr(error, "cause", None)
                        if isinstance(cause, CareError):
                            raise cause from error
                        raise TargetError(
                            f"{site} was not measured: {told_by_ray(error)}"
                        ) from error
                    yield site, effects

    return measure


def effects_of(folder: Path, digest: str, site: str) -> Effects:
    """Measure one site, on a node."""
    return kept_job(folder, digest).effects(site)


@lru_cache(maxsize=1)
def kept_job(folder: Path, digest: str) -> SiteJob:
    """Read what the sites are measured on, once for all sites of a worker."""
    torch.set_num_threads(1)  # the core that the task holds
    return load_job(folder, digest)
