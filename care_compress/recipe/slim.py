"""The slim half of a recipe: how much smaller, by which measure, and how the network heals."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from care_compress.recipe.sections import Count, FollowSection, Positive, Section

Share = Annotated[float, Field(gt=0, lt=1)]
Budget = Literal["macs", "parameters", "latency"]
Importance = Literal["reconstruct", "taylor", "module_aware", "magnitude"]


class SlimRuleSection(Section):
    """Which interactions, and how narrow they may become. The last rule that matches decides."""

    stage: Annotated[int, Field(ge=0, le=3)] | None = None
    block: Annotated[int, Field(ge=0, lt=1000)] | None = None
    branch: Literal["inter1", "inter2"] | None = None
    least: Annotated[float, Field(ge=0, le=1)] = Field(
        description="share of the channels that stays; 1: all, 0: the interaction may be taken out"
    )


class SlimBudgetSection(Section):
    """What is left of the float network, as a share; one of them."""

    macs: Share | None = Field(None, description="0.7: 30 % fewer multiply-accumulates")
    parameters: Share | None = None
    latency: Share | None = Field(None, description="of one image on slim.target, as measured here")

    @model_validator(mode="after")
    def _is_one(self) -> "SlimBudgetSection":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(
                "name one of macs, parameters, latency (macs: null takes a base's away)"
            )
        return self

    @property
    def kind(self) -> Budget:
        """Which one it is."""
        return "macs" if self.macs else "parameters" if self.parameters else "latency"

    @property
    def share(self) -> float:
        """How much of it is left."""
        return self.macs or self.parameters or self.latency or 1.0


class HealSection(FollowSection):
    """Training after the cut: the slim network follows the whole one."""

    place: ClassVar[str] = "slim.heal"

    epochs: Count = 1
    batch_size: Count = 64
    learning_rate: Positive = 5e-4


class SlimSection(Section):
    """How the float network becomes a smaller one, before it is quantized."""

    budget: SlimBudgetSection
    target: str = Field("openvino-cpu", description="whose clock a latency budget is measured by")
    importance: Importance = "reconstruct"
    hidden: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="beside budget.macs: hidden numbers (channels times positions of the "
        "interactions) are held to this part of its share; 0.92 of 0.7 leaves 64.4 % of them",
    )
    refit: bool = Field(True, description="least squares of what is left on calibration images")
    multiple: Count = Field(
        16, description="channels are left in multiples of this; what lies between saves no time"
    )
    images: Count = Field(1024, description="training images that are watched")
    rules: tuple[SlimRuleSection, ...] = ()
    heal: HealSection | None = None
