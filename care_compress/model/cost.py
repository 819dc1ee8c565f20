"""What one image costs: parameters, multiply-accumulates and operations, counted on a real pass.

The pass runs on the meta device: shapes only, no arithmetic, so even CARE-S2 takes well under a
second. MACs are those of convolutions and matrix products, as in published tables.
"""

import copy
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from care_compress.model.structure import Latest, structure_of

ALLOCATIONS = {"empty", "ones_like"}  # made once by an exporter, or by nobody


@dataclass(frozen=True)
class Cost:
    """Cost of one image at one resolution."""

    parameters: int
    macs: int
    operations: int  # kernels launched; views cost nothing and do not count
    by_operation: dict[str, int] = field(default_factory=dict)


class _CountOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ALLOCATIONS:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


_costs: Latest[Cost] = Latest(64)


def measure_cost(model: nn.Module, resolution: int | tuple[int, int]) -> Cost:
    """Count one eval-mode forward pass of one RGB image, once for every structure."""
    size = (resolution, resolution) if isinstance(resolution, int) else resolution

    def count() -> Cost:
        shadow = copy.deepcopy(model).to("meta").eval()
        image = torch.zeros(1, 3, *size, device="meta")
        operations = _CountOperations()
        with torch.no_grad(), FlopCounterMode(display=False) as flops, operations:
            shadow(image)
        return Cost(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            macs=int(flops.get_total_flops()) // 2,
            operations=operations.counts.total(),
            by_operation=dict(operations.counts.most_common()),
        )

    return _costs.of((size, *structure_of(model)), count)


@dataclass(frozen=True)
class Activations:
    """Bytes that one image's tensors take in a forward pass in float32."""

    live: int  # at once, where each is freed after its last use
    kept: int  # together, as a training keeps them for the way back


class _WeighTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.there: dict[int, int] = {}  # bytes by storage
        self.live = self.most = self.together = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.there:  # else a view
                    self.there[key] = size
                    self.live += size
                    self.together += size
                    weakref.finalize(storage, self._freed, key)
        self.most = max(self.most, self.live)
        return out

    def _freed(self, key: int) -> None:
        self.live -= self.there.pop(key)


_activations: Latest[Activations] = Latest(64)


def measure_activations(model: nn.Module, resolution: int) -> Activations:
    """Weigh what one eval-mode forward pass of one RGB image makes; the pass is on the meta device.

    The image is not among it, and neither is what a kernel needs for itself.
    """

    def weigh() -> Activations:
        shadow = copy.deepcopy(model).to("meta").eval()
        image = torch.zeros(1, 3, resolution, resolution, device="meta")
        tensors = _WeighTensors()
        for value in (image, *shadow.parameters(), *shadow.buffers()):
            tensors.there[value.untyped_storage()._cdata] = 0  # a view of it is nothing new
        with torch.no_grad(), tensors:
            shadow(image)
        return Activations(tensors.most, tensors.together)

    return _activations.of((resolution, *structure_of(model)), weigh)
