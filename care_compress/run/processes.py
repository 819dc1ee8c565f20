"""Several processes on one training: start with ``torchrun``, CPU or GPU.

Rank r takes its slice of every global batch; gradients are averaged by DistributedDataParallel and
BatchNorm statistics are those of the global batch.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from care_compress.errors import TrainingError

WAITING = timedelta(hours=24)
Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """One process among all."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """The process's [start, stop) of `count` items."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value: Value) -> list[Value]:
        """Return what every process has, in their order."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value)
        return every

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """Join the processes torchrun started; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}.",
                "start as many processes as there are GPUs",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    # The others wait while the main process quantizes or searches, which may take hours.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAITING)
    try:
        yield World(rank, size, device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    finally:
        dist.destroy_process_group()


def distribute(model: nn.Module, world: World) -> nn.Module:
    """The model to run forward: wrapped for gradient averaging if there are several processes."""
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def synchronise_norms(model: nn.Module, world: World) -> nn.Module:
    """Make every BatchNorm use the statistics of the global batch."""
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return synced
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, GlobalBatchNorm2d.of(child))
    return model


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce that gradients flow through: every process's loss depends on every input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def sum_over_processes(values: Tensor) -> Tensor:
    """Differentiable sum over all processes."""
    total: Tensor = _SumOverProcesses.apply(values)  # type: ignore[no-untyped-call]
    return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over all processes' batches on the CPU, where torch's SyncBatchNorm refuses to run.

    Mean first, then squares around it: the one-pass formula loses the variance to cancellation.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "GlobalBatchNorm2d":
        """The same layer with the same parameters and statistics."""
        twin = cls(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        twin.load_state_dict(norm.state_dict())
        return twin.to(norm.weight).train(norm.training)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise by the global batch in training, by the running statistics otherwise."""
        if not self.training:
            return super().forward(x_BCHW)
        x = x_BCHW.float()
        sums = torch.cat([x.sum(dim=(0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])])
        sums = sum_over_processes(sums)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(-1, 1, 1)
        squares = sum_over_processes(centred.square().sum(dim=(0, 2, 3)))
        variance = squares / count
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        out: Tensor = centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return out
