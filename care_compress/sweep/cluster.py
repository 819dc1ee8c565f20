"""Ray, opened quietly: on the cores of this machine, or at the address of a cluster.

It sends no report of its use, opens no dashboard, and its signal handlers are taken back, so that
Ctrl-C ends a sweep as it ends every verb.
"""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from care_compress import machine
from care_compress.console import one_line, shortened
from care_compress.errors import CareError, Stopped, TargetError
from care_compress.libraries import load_ray
from care_compress.signals import SIGNALS

TIMING = "timing"  # where some nodes offer this resource, timings go to those alone
ANSWER_SECONDS = 5.0  # within which an address must accept a connection
OBJECT_STORE = 100 * 2**20  # bytes: recipes and rows; models stay in their run directories
HERE = "local"
STARTS = 3  # Ray gives itself half a minute, which a busy machine may not grant it
QUIET = {"logging_level": "ERROR", "log_to_driver": False, "namespace": "care-compress"}
SHORT = "/tmp"  # nosec B108 # folders are made anew in it
FOLDER = "care-ray-"  # and the process that made it


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    id: str
    name: str
    cpus: float
    gpus: float
    times: bool  # offers `TIMING`

    def fits(self, cpus: float, gpus: float) -> bool:
        """Whether a trial that holds so much can run there."""
        return self.cpus >= cpus and self.gpus >= gpus


class Cluster:
    """Ray, connected."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    @property
    def nodes(self) -> list[Node]:
        """The machines that are alive now."""
        return [
            Node(
                one["NodeID"],
                one["NodeManagerHostname"],
                one["Resources"].get("CPU", 0.0),
                one["Resources"].get("GPU", 0.0),
                one["Resources"].get(TIMING, 0.0) >= 1,
            )
            for one in self.ray.nodes()
            if one["Alive"]
        ]

    def slots(self, cpus: float, gpus: float) -> int:
        """How many trials can run at once."""
        fitting = [node for node in self.nodes if node.fits(cpus, gpus)]
        return sum(
            int(min(node.cpus / cpus, node.gpus / gpus if gpus else node.cpus / cpus) + 1e-9)
            for node in fitting
        )

    def wait(self, references: Sequence[Any]) -> Sequence[Any]:
        """Return those that are done; none where a second went by without one."""
        try:
            done, _ = self.ray.wait(list(references), num_returns=1, timeout=1.0)
        except SystemError as error:
            # Ray runs our signal handler inside its own code, and goes on although it raised.
            if isinstance(error.__cause__, Stopped):
                raise error.__cause__ from None
            raise
        found: Sequence[Any] = done
        return found

    def on(self, node: Node) -> Any:
        """The scheduling strategy that runs a task on this node and no other."""
        strategies = self.ray.util.scheduling_strategies
        return strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)


@contextlib.contextmanager
def open_cluster(address: str | None) -> Iterator[Cluster]:
    """Connect to `address`, to ``RAY_ADDRESS``, or start Ray on this machine; leave it behind.

    What was started here ends with the block, its files too; a cluster stays as it was.
    """
    address = address or os.environ.get("RAY_ADDRESS") or HERE
    handlers = {one: signal.getsignal(one) for one in SIGNALS}
    with contextlib.ExitStack() as left:
        left.callback(_restore, handlers)
        ray = load_ray()
        if address == HERE:
            _start(ray, left)
        else:
            _check_answers(address)
            try:
                ray.init(address=address, **QUIET)
            except Exception as error:  # Ray raises plain ones, too
                raise TargetError(
                    f"Ray at {address} cannot be used: {shortened(one_line(str(error)))}",
                    "ray start --head on a machine of the cluster, or leave the address out",
                ) from error
        left.callback(ray.shutdown)
        _restore(handlers)
        yield Cluster(ray)


@contextlib.contextmanager
def workers_at(address: str | None) -> Iterator[Cluster | None]:
    """Open Ray for a verb that ``--ray`` shares out; nothing is opened where it was not given."""
    if address is None:
        yield None
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CareError("--ray and torchrun both hand the work out.", "give one of them")
    with open_cluster(address) as cluster:
        yield cluster


def _start(ray: Any, left: contextlib.ExitStack) -> None:
    """Start Ray on the cores of this machine; its files go with what is `left` behind."""
    _sweep_killed()
    for attempt in range(STARTS):
        # In /tmp: the paths of its sockets may have 107 letters, and TMPDIR may be long.
        folder = tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=SHORT)
        left.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            ray.init(
                address=HERE,
                num_cpus=machine.read_machine().cpu.logical_cores,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                _temp_dir=folder,
                **QUIET,
            )
            return
        except Exception as error:  # a plain one where it took more than half a minute
            if attempt + 1 == STARTS:
                raise TargetError(
                    f"Ray does not start here: {shortened(one_line(str(error)))}",
                    "try again when this machine has less to do",
                ) from error


def _sweep_killed() -> None:
    """Remove what Ray left of processes that were killed."""
    for path in Path(SHORT).glob(f"{FOLDER}*-*"):
        owner = path.name.removeprefix(FOLDER).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    """Put our own handlers back: Ray sets its own when it is imported and when it begins."""
    with contextlib.suppress(ValueError):  # not in the main thread, where none was set
        for one, handler in handlers.items():
            signal.signal(one, handler)


def _check_answers(address: str) -> None:
    """Raise unless somebody answers: Ray itself would try for minutes and log all the while."""
    if address == "auto":
        return  # Ray looks for a cluster of this machine, and says so at once where there is none
    if "://" in address:
        raise CareError(
            f"{address} asks for Ray's client, which cannot hand out work.",
            "start it on a machine of the cluster, with the address auto",
        )
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise CareError(f"{address!r} is no address.", "write HOST:6379, or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS):
            pass
    except OSError as error:
        raise TargetError(
            f"nobody answers at {address}: {error.strerror or error}.",
            "start the cluster (ray start --head), or leave the address out to run here",
        ) from error
