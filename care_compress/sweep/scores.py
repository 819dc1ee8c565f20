"""Images of one evaluation scored on Ray's workers: the same score as in one process.

A piece is a whole number of batches, as many as take some seconds by what the last one took. Scores
come back in the order of the images, so an interrupted evaluation goes on with or without Ray.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch

from care_compress.evaluate.scoring import Scored, ScoreImages, ScoringJob, opened, score_elsewhere
from care_compress.sweep.cluster import Cluster
from care_compress.sweep.pieces import in_pieces

SECONDS = 5.0  # of one piece
GROWTH = 4  # at most, from one piece to the next: the first batch of a worker is its slowest
Part = tuple[int, Sequence[int]]  # how many images come before it, and its own


def scores_on(cluster: Cluster) -> ScoreImages:
    """Return what scores images on the workers of a cluster."""

    def measure(job: ScoringJob, indices: Sequence[int]) -> Generator[Scored]:
        # A worker decodes on the cores that it holds.
        job = replace(job, data=job.data.model_copy(update={"workers": 0}))
        batches = 1

        def parts() -> Iterator[Part]:
            first = 0
            while first < len(indices):
                part = indices[first : first + batches * job.batch_size]
                yield first, part
                first += len(part)

        def told(part: Part) -> str:
            return f"images {part[0]:,} to {part[0] + len(part[1]):,}"

        early, through = dict[int, Scored](), 0
        gpus = 1 if job.device == "cuda" else 0
        for (first, part), (scored, took) in in_pieces(
            cluster, score_part, (job,), parts(), told, gpus
        ):
            fitting = len(part) / job.batch_size * SECONDS / max(took, 1e-3)
            batches = max(1, min(int(fitting), GROWTH * batches))
            early[first] = scored
            while through in early:
                scored = early.pop(through)
                through += scored.images
                yield scored

    return measure


def score_part(job: ScoringJob, part: Part) -> tuple[Scored, float]:
    """Score some images, on a node, and say how many seconds they took."""
    threads = torch.get_num_threads()
    opened(job, threads)  # not among the seconds
    began = time.monotonic()
    scored = score_elsewhere(job, part[1], threads)
    return scored, time.monotonic() - began
