"""Work in pieces of seconds on Ray's workers: any number of them gives the bits of one process.

A network's last bits depend on how many threads compute it, so a worker computes with as many as
this process would, and holds as many cores. A worker or a node that is lost costs its pieces only:
Ray gives them to others, and a piece gives the same wherever it is done.
"""

import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from care_compress.errors import CareError, TargetError
from care_compress.sweep.cluster import Cluster
from care_compress.sweep.driver import LOST, SPARE, told_by_ray
from care_compress.sweep.tasks import check_code, pipeline_digest

Piece = TypeVar("Piece")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Like:
    """The process that hands out: a worker computes as it would."""

    threads: int
    cwd: Path  # what relative paths start from
    code: str  # digest of its pipeline

    @classmethod
    def this_process(cls) -> "Like":
        """Describe the one that is asked."""
        return cls(torch.get_num_threads(), Path.cwd(), pipeline_digest())


def in_pieces(
    cluster: Cluster,
    task: Callable[..., Done],
    given: tuple[Any, ...],
    pieces: Iterable[Piece],
    told: Callable[[Piece], str],
    gpus: int = 0,
) -> Generator[tuple[Piece, Done]]:
    """Do ``task(*given, piece)`` for every piece; each comes back when it is done, in any order.

    A piece is asked for when a worker will soon be free for it, so `pieces` may learn from those
    that came back. `told` names one in an error.
    """
    like, ray = Like.this_process(), cluster.ray
    most = max((int(node.cpus) for node in cluster.nodes), default=1)
    cores = max(1, min(like.threads, most))
    if not cluster.slots(cores, gpus):
        raise TargetError(
            f"no node of Ray has {cores} free cores and {gpus} GPUs.", "add one, or leave --ray out"
        )
    do = ray.remote(as_there).options(num_cpus=cores, num_gpus=gpus, max_retries=LOST)
    what = ray.put((task, given))  # once, not with every piece
    ahead, waiting = iter(pieces), dict[Any, Piece]()
    left = True
    while left or waiting:
        while left and len(waiting) < cluster.slots(cores, gpus) + SPARE:
            for piece in ahead:
                waiting[do.remote(like, what, piece)] = piece
                break
            else:
                left = False
        for reference in cluster.wait(list(waiting)) if waiting else ():
            piece = waiting.pop(reference)
            try:
                done: Done = ray.get(reference)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, CareError):
                    raise cause from error
                raise TargetError(f"{told(piece)} was not done: {told_by_ray(error)}") from error
            yield piece, done


def as_there(like: Like, what: tuple[Callable[..., Done], tuple[Any, ...]], piece: Any) -> Done:
    """Do one piece on a node, as the process that handed it out would."""
    enter(like)
    task, given = what
    return task(*given, piece)


@cache
def enter(like: Like) -> None:
    """Make this worker like that process, once."""
    check_code(like.code)
    os.chdir(like.cwd)
    torch.set_num_threads(like.threads)
