"""What a compiled engine runs, as TensorRT prints it while it builds: every kernel, no GPU needed.

At VERBOSE severity the builder logs the finished engine, one line for each kernel with the types
and shapes of what it reads and writes. TensorRT for RTX does so without a GPU, so it is the one way
here to see what NVIDIA's compiler made of a graph. Built for several GPUs at once it prints one
listing, of the first.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from care_compress.device.layers import NODES, LayerRow, type_in

LISTING = "Layers:\n"  # how the message begins
# Bytes of one value.
_SIZES = {"FP32": 4, "INT32": 4, "FP16": 2, "BF16": 2, "INT64": 8, "INT4": 0.5, "FP4": 0.5}
_FIELDS = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: .*?"
    r"(?:Metadata: (?P<metadata>.*))?$"
)
_TENSOR = re.compile(r"Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (\w+)")


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def size(self) -> int:
        """Its bytes."""
        return int(prod(self.shape) * _SIZES.get(self.type, 1))


@dataclass(frozen=True)
class Kernel:
    """One thing that the GPU is asked to do."""

    name: str
    type: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    origin: tuple[str, ...]  # nodes of the graph

    @property
    def row(self) -> LayerRow:
        """The kernel as one row of the layer table."""
        read = (*self.inputs, *self.constants, *self.outputs)
        output = self.outputs[0].type if self.outputs else "unknown"
        precision = read[0].type if read else "unknown"
        return LayerRow(self.name, self.type, precision, output, self.origin or (self.name,))


@dataclass(frozen=True)
class Traffic:
    """What one image costs in memory, counted over kernels."""

    kernels: int
    activation_bytes: int  # read and written
    constant_bytes: int  # weights, each counted once


def parse_kernels(listing: str) -> tuple[Kernel, ...]:
    """The kernels of a listing; none of a text that holds none."""
    found = []
    for line in listing.splitlines():
        if (fields := _FIELDS.match(line)) is None:
            continue
        kernel = Kernel(
            name=fields["name"],
            type=fields["type"],
            inputs=_operands(fields["inputs"]),
            constants=_operands(fields["constants"]),
            outputs=_operands(fields["outputs"]),
            origin=tuple(dict.fromkeys(NODES.findall(fields["metadata"] or ""))),
        )
        found.append(kernel)
    return tuple(found)


def traffic(kernels: Sequence[Kernel]) -> Traffic:
    """Count what kernels move."""
    constants = {one.name: one.size for kernel in kernels for one in kernel.constants}
    moved = sum(one.size for kernel in kernels for one in (*kernel.inputs, *kernel.outputs))
    return Traffic(len(kernels), moved, sum(constants.values()))


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        # A free length counts once: the listing is of one image.
        Operand(name, tuple(abs(int(one)) for one in shape.split(",") if one), type_in(kind))
        for name, shape, kind in _TENSOR.findall(text)
    )
