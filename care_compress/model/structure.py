"""The structure of a network, which is all but the numbers in its tensors, as a key to a cache.

Tracing and counting take seconds and see nothing but the structure, so what was made of one
network serves every other one like it.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import nn

Structure = tuple[Hashable, ...]
Made = TypeVar("Made")


def structure_of(network: nn.Module) -> Structure:
    """Everything that tracing sees but the numbers in the tensors."""
    parts: list[Hashable] = []
    for name, module in network.named_modules():
        plain = {key: value for key, value in vars(module).items() if key[0] != "_"}
        parts.append((name, type(module), repr(sorted(plain.items()))))
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        parts.append((name, value.shape, value.dtype, value.requires_grad))
    return tuple(parts)


class Latest(Generic[Made]):
    """What was made of the latest `held` structures."""

    def __init__(self, held: int) -> None:
        self.held = held
        self._made: OrderedDict[Structure, Made] = OrderedDict()

    def of(self, structure: Structure, make: Callable[[], Made]) -> Made:
        """Return what was made of this structure, or make it; callers must not change it."""
        if structure not in self._made:
            made = make()
            while len(self._made) >= self.held:
                self._made.popitem(last=False)
            self._made[structure] = made
        self._made.move_to_end(structure)
        return self._made[structure]
