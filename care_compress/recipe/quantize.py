"""The quantization half of a recipe: rules, calibration, tuning, QAT and the search for bits."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from care_compress.recipe.sections import (
    Count,
    FollowSection,
    Fraction,
    NonNegative,
    Positive,
    Section,
)

Bits = Literal["float", "fp16", "bf16", "fp8", 8, 6, 4]
RangeMethod = Literal["min_max", "moving_average", "percentile", "mse", "entropy"]
Unit = Annotated[float, Field(ge=0, le=1)]


class TensorSection(Section):
    """How one tensor of a site is represented. In YAML plain bits will do: ``weight: 8``."""

    bits: Bits = Field(description="of an integer, or a float type; fp8 is E4M3 with a scale")
    granularity: Literal["tensor", "channel"] | None = Field(
        None, description="left out: channel for weights and where the target allows it, or tensor"
    )
    group: Count | None = Field(None, description="weights only: input channels that share a scale")
    symmetric: bool | None = Field(None, description="left out: as the target executes it")
    range: RangeMethod = "min_max"


def _bits_alone(value: Any) -> Any:
    return value if isinstance(value, dict | TensorSection) else {"bits": value}


Tensor = Annotated[TensorSection, BeforeValidator(_bits_alone)]


class RuleSection(Section):
    """Which sites, and what becomes of them. The last rule that matches a site decides."""

    stage: Annotated[int, Field(ge=0, le=3)] | None = None
    block: Annotated[int, Field(ge=0, lt=1000)] | None = None
    branch: str | None = Field(None, description="inter1, inter2, mixer.att, mixer.dw3, ...")
    role: str | None = Field(None, description="pointwise, depthwise, attention.kv, head, ...")
    site: str | None = Field(None, description="a module name; * and ? stand for anything")
    max_channels: Count | None = Field(
        None, description="products with a weight of so many input or output channels, or fewer"
    )
    weight: Tensor | None = None
    input: Tensor | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "RuleSection":
        if self.weight is None and self.input is None:
            raise ValueError("a rule needs weight or input")
        return self


class CalibrateSection(Section):
    """Which training images the ranges and corrections are measured on."""

    images: Count = 512
    method: Literal["random", "stratified", "diverse"] = "stratified"
    list: str | None = Field(None, description="a saved list (calibration/select.py); overrides")
    batch_size: Count = 32
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        99.99, description="share of values that a percentile range keeps"
    )


class ReconstructSection(Section):
    """Learning how 4-bit weights round, one interaction at a time."""

    steps: Count = 300
    batch_size: Count = 32
    images: Count = 256
    learning_rate: Positive = Field(3e-2, description="of the rounding variables")
    drop: Fraction = Field(0.5, description="share of activations left unquantized (QDrop)")


class QatSection(FollowSection):
    """Quantization-aware training: everything the float trainer has, and what quantization adds."""

    place: ClassVar[str] = "quantize.qat"

    epochs: Count = 1
    batch_size: Count = 64
    learning_rate: Positive = 5e-5
    scale_rate: Positive = Field(20.0, description="times learning_rate, for scales and offsets")
    dampening: NonNegative = Field(
        0.0, description="weight at the end of the pull towards the grid; rises as a cosine"
    )
    freeze_scales: Unit = Field(0.8, description="part of the training after which scales stay")


class SearchSection(Section):
    """Automatic mixed precision: bits per site under the budget's drop."""

    cost: Literal["bit_operations", "energy"] = "bit_operations"
    max_cost: Positive | None = Field(
        None, description="of one image (energy: mJ); reached, it is enough"
    )
    trials: Count = 40
    minutes: Positive = Field(20.0, description="of trials; every site is measured before them")
    images: Count = Field(
        1000, description="training images that calibrate nothing, which judge a trial"
    )


class NncfSection(Section):
    """Settings of the NNCF backend, passed on as NNCF names them."""

    preset: Literal["performance", "mixed"] = "mixed"
    model_type: Literal["transformer"] | None = None
    fast_bias_correction: bool = True
    smooth_quant_alpha: Unit | None = Field(
        None, description="of convolutions too; left out: NNCF's own choice, without them"
    )
    ignored_types: tuple[Literal["Add", "MatMul", "Multiply"], ...] = Field(
        (), description="operations of OpenVINO that stay in float; MatMul is attention and head"
    )
    accuracy_control: bool = Field(
        False, description="keep layers in float until the budget's drop holds"
    )

    @property
    def multiplies_symmetric(self) -> bool:
        """Whether attention multiplies two symmetric activations."""
        return self.preset == "performance" and "MatMul" not in self.ignored_types

    @model_validator(mode="after")
    def _smooths(self) -> "NncfSection":
        if self.smooth_quant_alpha is not None and self.model_type is None:
            raise ValueError("NNCF uses smooth_quant_alpha only with model_type: transformer")
        return self


# What only our own backend does.
OURS = (
    "rules",
    "activation",
    "prescale",
    "equalize",
    "covariance",
    "hadamard",
    "norm_reestimation",
    "bias_correction",
    "reconstruct",
    "search",
)


class QuantizeSection(Section):
    """How the float model becomes a quantized one."""

    backend: Literal["torchao", "nncf"] = "torchao"
    target: str | None = Field(
        "openvino-cpu", description="whose limits hold; null: simulated, no runtime's"
    )
    full_range: bool = Field(
        False, description="8-bit weights beyond -64..63 on CPUs, too: wrong without dot products"
    )
    rules: tuple[RuleSection, ...] = ()
    activation: Literal["gelu", "hard_swish"] = Field(
        "gelu", description="hard_swish is cheaper and another function: it needs qat to heal"
    )
    calibrate: CalibrateSection = CalibrateSection()
    prescale: Unit | Literal["trained", "search"] = Field(
        "search", description="alpha of the pre-norm scale site; trained: leave BatchNorm as it is"
    )
    equalize: Unit | Literal["off", "search"] = Field(
        "search", description="alpha of depthwise -> fc2 equalization and shift"
    )
    covariance: bool = Field(True, description="the covariance form wherever attention is integer")
    hadamard: bool = Field(False, description="rotate 4-bit 1x1 inputs in blocks before scaling")
    norm_reestimation: bool = Field(False, description="move the pre-norms after their inputs")
    bias_correction: bool = True
    reconstruct: ReconstructSection | None = None
    qat: QatSection | None = None
    search: SearchSection | None = None
    nncf: NncfSection | None = None

    @property
    def has_float8(self) -> bool:
        """Whether a rule asks for 8-bit floats."""
        tensors = (tensor for rule in self.rules for tensor in (rule.weight, rule.input))
        return any(tensor is not None and tensor.bits == "fp8" for tensor in tensors)

    @property
    def searches(self) -> bool:
        """Whether validation images have a say in what is quantized."""
        controlled = self.nncf is not None and self.nncf.accuracy_control
        return self.search is not None or controlled

    @model_validator(mode="after")
    def _backend_fits(self) -> "QuantizeSection":
        if self.backend == "nncf":
            fields = type(self).model_fields
            foreign = [name for name in OURS if getattr(self, name) != fields[name].default]
            if foreign:
                raise ValueError(
                    f"backend nncf has its own placement and tuning: no {', '.join(foreign)}"
                )
        if self.backend == "nncf" and self.qat is not None:
            if self.qat.dampening:
                raise ValueError("qat.dampening needs backend: torchao")
            if self.nncf is None or "MatMul" not in self.nncf.ignored_types:
                raise ValueError(
                    "NNCF's simulation of a quantized attention gives NaN: qat needs "
                    "nncf.ignored_types: [MatMul]"
                )
            if self.nncf.accuracy_control:
                raise ValueError(
                    "qat would quantize the layers that nncf.accuracy_control keeps in float: use "
                    "one of them"
                )
        if self.nncf is not None and not self.full_range and self.nncf.multiplies_symmetric:
            raise ValueError(
                "two symmetric activations fill 8 bits both, and their products overflow on a CPU "
                "without dot products: preset performance needs nncf.ignored_types: [MatMul]"
            )
        if self.backend == "torchao" and self.nncf is not None:
            raise ValueError("a nncf section needs backend: nncf")
        if self.backend == "torchao" and not self.rules:
            raise ValueError("there are no rules, so nothing would be quantized")
        learned = [name for name in ("qat", "reconstruct", "search") if getattr(self, name)]
        if self.has_float8 and learned:
            raise ValueError(f"fp8 is quantized without training or search: no {learned[0]}")
        return self
