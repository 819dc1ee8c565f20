"""The vocabulary of quantization: what a tensor becomes, where, and who decided.

A `Site` is one operation that can run in integers. A `TensorSpec` says what one of its tensors
becomes; a `Decision` holds both for a site, with the rules that decided; a `Plan` is all of them.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

from care_compress.recipe.quantize import RangeMethod

Granularity = Literal["tensor", "channel", "group"]
Half = Literal["fp16", "bf16"]

# Energy of one operation, 45 nm, picojoules: (multiply, add).
# There is none for 8-bit floats: they multiply as 8-bit integers here, and add as floats.
ENERGY_PJ = {"float": (3.7, 0.9), "fp16": (1.1, 0.4), "bf16": (1.1, 0.4), "fp8": (0.2, 0.9)}
INT8_MULTIPLY_PJ, INT32_ADD_PJ = 0.2, 0.1
WIDTH = {"float": 32, "fp16": 16, "bf16": 16, "fp8": 8}
LARGEST_FLOAT8 = 448  # of E4M3 without infinities


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's representation; ``bits`` is an integer width, or names a float type.

    ``fp8`` is E4M3 with a scale and no zero point.

    ``axis`` is the dimension with a scale for each index: 0 for the (O, C, k, k) weight of a conv,
    1 for the (B, C, H, W) input of a depthwise. ``group`` input channels of a weight share a scale.
    """

    bits: int | Literal["float", "fp8"] | Half
    granularity: Granularity = "tensor"
    axis: int = 0
    group: int | None = None
    symmetric: bool = True
    range: RangeMethod = "min_max"
    reduced: bool = False  # one bit of them is not used: 8-bit weights in -64..63

    @property
    def is_integer(self) -> bool:
        """Whether it is multiplied as integers, not as some float."""
        return isinstance(self.bits, int)

    @property
    def has_scale(self) -> bool:
        """Whether it is scaled into the range of its type: integers, and 8-bit floats."""
        return self.is_integer or self.bits == "fp8"

    @property
    def width(self) -> int:
        """Bits of storage."""
        return self.bits if isinstance(self.bits, int) else WIDTH[self.bits]

    @property
    def levels(self) -> int:
        """How many integers there are: 256 of 8 bits, 128 if one of them is not used."""
        assert isinstance(self.bits, int)
        return 1 << (self.bits - self.reduced)

    @property
    def quant_min(self) -> int:
        """Smallest integer: -128 for symmetric 8 bits, -64 reduced, 0 for asymmetric.

        Of 8-bit floats the smallest number.
        """
        if self.bits == "fp8":
            return -LARGEST_FLOAT8
        return -self.levels // 2 if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """Largest integer: 127, 63 or 255 for 8 bits. Of 8-bit floats the largest number."""
        if self.bits == "fp8":
            return LARGEST_FLOAT8
        return self.quant_min + self.levels - 1

    @property
    def dtype(self) -> torch.dtype:
        """The type it is stored in; four bits take the lower half of an integer."""
        if self.bits == "fp8":
            return torch.float8_e4m3fn
        return torch.int8 if self.symmetric else torch.uint8

    def __str__(self) -> str:
        if not self.has_scale:
            return str(self.bits)
        where = f"group {self.group}" if self.granularity == "group" else self.granularity
        if self.bits == "fp8":
            return f"fp8 per {where}"
        kind = "s" if self.symmetric else "u"
        clip = "" if self.range == "min_max" else f", {self.range}"
        used = f" in {self.quant_min}..{self.quant_max}" if self.reduced else ""
        return f"{kind}{self.bits}{used} per {where}{clip}"


FLOAT = TensorSpec("float")


@dataclass(frozen=True)
class Site:
    """One operation that can run in integers, named as its module is."""

    name: str  # stages.2.blocks.0.inter_layer.inter1_fc1
    role: str  # pointwise
    stage: int | None  # 2
    block: int | None  # 0
    branch: str | None  # inter1
    macs: int
    parameters: int
    channels: int  # input channels, which groups of a weight must divide
    prescaled: bool  # its input comes from a pre-norm, the scale-reparameterization site
    weighted: bool  # it multiplies a weight; the others multiply or add two activations
    narrowest: int = 0  # input channels or output channels, whichever are fewer; 0: not weighted


@dataclass(frozen=True)
class Decision:
    """What becomes of one site, and the numbers of the rules that said so (0: no rule did)."""

    site: Site
    input: TensorSpec
    weight: TensorSpec | None
    input_rule: int
    weight_rule: int

    @property
    def quantized(self) -> bool:
        """Whether anything of the site leaves float."""
        return self.input != FLOAT or (self.weight is not None and self.weight != FLOAT)

    @property
    def in_integers(self) -> bool:
        """Both factors are integers, so that the product can be one of integers."""
        return self.input.is_integer and (self.weight is None or self.weight.is_integer)

    @property
    def precision(self) -> str:
        """How the product is computed: ``w8a8``, ``w4a16``, ``float``."""
        if self.site.role == "residual_add" or self.weight is None:
            return str(self.input.bits) if not self.input.is_integer else f"a{self.input.width}"
        if not self.input.is_integer and not self.weight.is_integer:
            return str(self.input.bits)
        return f"w{self.weight.width}a{self.input.width}"

    @property
    def energy_pj(self) -> float:
        """Estimate for the site's MACs; below 8 bits by the product of the widths."""
        left = self.weight or self.input
        if self.in_integers:
            multiply = INT8_MULTIPLY_PJ * left.width * self.input.width / 64
            return self.site.macs * (multiply + INT32_ADD_PJ)
        # A product runs in the wider of its two types: int weights are expanded first.
        kind = self.input.bits if not self.input.is_integer else left.bits
        return self.site.macs * sum(ENERGY_PJ[str(kind)])

    @property
    def bit_operations(self) -> int:
        """MACs times both widths: the usual measure of mixed precision."""
        left = self.weight or self.input
        return self.site.macs * left.width * self.input.width


@dataclass(frozen=True)
class Kept:
    """Operations that stay in float by nature, and why."""

    what: str
    count: int
    why: str
    macs: int = 0


@dataclass(frozen=True)
class Plan:
    """Every site with its decision, in the order of the network."""

    decisions: tuple[Decision, ...]
    kept: tuple[Kept, ...]
    target: str | None
    resolution: int

    def of(self, name: str) -> Decision:
        """The decision for the site called `name`."""
        return next(decision for decision in self.decisions if decision.site.name == name)

    @property
    def macs(self) -> int:
        """MACs of all sites, and of what is float by nature."""
        return sum(decision.site.macs for decision in self.decisions) + self.kept_macs

    @property
    def kept_macs(self) -> int:
        """MACs of what is float by nature."""
        return sum(kept.macs for kept in self.kept)

    @property
    def energy_mj(self) -> float:
        """Estimate for one image, in millijoules."""
        in_float = self.kept_macs * sum(ENERGY_PJ["float"])
        return (in_float + sum(decision.energy_pj for decision in self.decisions)) * 1e-9

    def macs_by_precision(self) -> dict[str, int]:
        """MACs for each precision, most first."""
        totals = Counter[str]()
        for decision in self.decisions:
            if decision.site.macs:
                totals[decision.precision] += decision.site.macs
        if self.kept_macs:
            totals["float"] += self.kept_macs
        return dict(totals.most_common())
