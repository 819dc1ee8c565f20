"""The sections of a recipe: typed, frozen, strict. The meaning of every key stands here.

Those of quantization are in `care_compress.recipe.quantize`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Task = Literal["classification", "segmentation", "detection"]
Arch = Literal["care_nano", "care_s0", "care_s1", "care_s2"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # what every library takes for a number of things


class Section(BaseModel):
    """Base of all sections: unknown keys refused, types not coerced, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which float network to start from."""

    checkpoint: str | None = Field(
        None,
        description="a file, builtin:NAME, hf-hub:owner/name, or nothing to train from scratch",
    )
    arch: Arch | None = Field(None, description="care_nano, care_s0, ...; inferred if left out")
    backbone: str | None = Field(
        None, description="a classifier whose stages a network of another task begins with"
    )


class DataSection(Section):
    """Which images, and how a file becomes the network's input."""

    source: str = Field("builtin:shapes", description="builtin:, folder, zip, hf: or wds: source")
    resolution: Annotated[int, Field(ge=32, le=2048)] = 224
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    classes: str | None = Field(None, description="file with one class name per line, in order")
    ignore_index: Annotated[int, Field(ge=0, le=255)] | None = Field(
        255, description="pixels of masks that count for nothing; 0: the classes count from 1"
    )
    exif_rotate: bool = False
    skip_bad_images: bool = False
    workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None, description="decoding processes; chosen from the source and the cores if left out"
    )


class RewriteSection(Section):
    """Which exact rewrites to apply (see `care_compress.model.rewrite`)."""

    fold_stem: bool = True
    fold_norms: bool = Field(
        True, description="exact in float, ruinous in front of a quantized 1x1: off for int8"
    )
    merge_heads: bool = True
    fold_depthwise_bias: bool = True
    pool_last_depthwise: bool = True
    fuse_normaliser: bool = True


class AugmentSection(Section):
    """Random changes to training images; all of them drawn from (seed, epoch, image).

    Masks and boxes move with the pixels. For them `scale` is the shown share of the letterboxed
    square and `ratio` how far the image is stretched; for classification both are of the crop.
    """

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    jitter: Fraction = Field(0.0, description="strength of brightness, contrast and saturation")
    erase: Fraction = Field(0.0, description="probability of erasing a random rectangle")
    mixup: NonNegative = Field(0.0, description="beta parameter, 0 = off")
    cutmix: NonNegative = Field(0.0, description="beta parameter, 0 = off")

    @model_validator(mode="after")
    def _ranges_rise(self) -> "AugmentSection":
        if not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale must be [least, most] share of the image, at most 1")
        if not self.ratio[0] <= self.ratio[1]:
            raise ValueError("ratio must be [least, most] width over height")
        return self


class DistillSection(Section):
    """A teacher for the distillation head."""

    teacher: str = Field(description="a CARE checkpoint or an .onnx classifier")
    kind: Literal["hard", "soft"] = "hard"
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    temperature: Positive = 1.0


class TrainSection(Section):
    """How to train the float network; also the loop that QAT runs in."""

    place: ClassVar[str] = "train"  # in a recipe, for messages

    epochs: Count
    max_steps: Count | None = Field(None, description="end earlier, after this many steps")
    batch_size: Count = Field(description="over all processes together")
    learning_rate: Positive
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    final_lr_fraction: Fraction = 0.01
    weight_decay: NonNegative = 0.05
    label_smoothing: Fraction = 0.1
    drop_path: Fraction = 0.0
    clip_grad_norm: Positive | None = None
    ema_decay: Fraction | None = Field(None, description="weight averaging, warmed up")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpoint_steps: Count = Field(200, description="a killed run loses at most this many steps")
    validate_epochs: Count = Field(1, description="epochs between validations")
    augment: AugmentSection = AugmentSection()
    distill: DistillSection | None = None

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainSection":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be smaller than epochs ({self.epochs})")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole training."""
        return min(self.epochs * steps_per_epoch, self.max_steps or self.epochs * steps_per_epoch)


class FollowSection(TrainSection):
    """A training whose teacher is the run's own float model: of QAT, and after a cut."""

    weight_decay: NonNegative = 0.0
    label_smoothing: Fraction = 0.0
    labels: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="weight of the labels beside the float model's logits"
    )
    temperature: Positive = 2.0
    augment: AugmentSection = AugmentSection(scale=(0.5, 1.0))
    features: NonNegative = Field(
        1.0, description="weight of the distance between the stage outputs"
    )

    @model_validator(mode="after")
    def _no_other_teacher(self) -> "FollowSection":
        if self.distill is not None or self.drop_path:
            what = self.place.rsplit(".", 1)[-1]
            raise ValueError(f"{what} learns from its own float model: no distill, no drop_path")
        return self


class ExportSection(Section):
    """Which targets get files, and how the files are checked."""

    targets: tuple[str, ...] | None = Field(
        None, description="names of recipes/targets/; every one that can execute it if left out"
    )
    batch: Count | Literal["dynamic"] = Field(1, description="images at once; dynamic: any number")
    input: Literal["float", "uint8"] = Field(
        "float",
        description="uint8: files take cropped RGB pixels (B, H, W, 3) and normalise themselves",
    )
    images: Count = Field(
        256, description="validation images on which a file must answer as the model does"
    )
    dot_products: bool | None = Field(
        None, description="of the processors CPU files are laid out for; as here if left out"
    )
    target_rules: bool = Field(
        True, description="follow a target's own rules (TensorRT: depthwise convs stay in float)"
    )


class EvaluateSection(Section):
    """How the result is measured."""

    batch_size: Count | None = Field(
        None, description="images at once; if left out, 16 on a CPU and 256 on a GPU"
    )
    images: Count | None = Field(
        None, description="N evenly spaced validation images; all if left out"
    )


class BudgetSection(Section):
    """What the compressed model may cost at most."""

    max_top1_drop: NonNegative | None = Field(None, description="in points; classification")
    max_miou_drop: NonNegative | None = Field(None, description="in points; segmentation")
    max_map50_drop: NonNegative | None = Field(None, description="in points; detection")
    min_speedup: dict[str, Positive] | None = Field(
        None, description="over the baseline at batch 1, one thread, by target: openvino-cpu: 1.5"
    )
    min_agreement: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="percent of answers as the baseline's, on every target"
    )
    max_size: Positive | None = Field(None, description="of the largest exported model, in MB")

    @property
    def max_drop(self) -> float | None:
        """The limit in the metric of the recipe's own task; it has no other."""
        limits = (self.max_top1_drop, self.max_miou_drop, self.max_map50_drop)
        return next((limit for limit in limits if limit is not None), None)


# The key of a task's own limit.
DROPS: dict[Task, str] = {
    "classification": "max_top1_drop",
    "segmentation": "max_miou_drop",
    "detection": "max_map50_drop",
}
# Settings that change how a training is watched, not what it computes.
WATCHING = {"checkpoint_steps", "validate_epochs"}
