"""Targets: one YAML file says what one runtime on one kind of device executes.

The plan is checked against it before anything is trained, the export writes what it asks for, and
`care_compress.runtime.doctor` tells from it what this machine can do. Files: recipes/targets/.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from packaging.requirements import InvalidRequirement, Requirement
from pydantic import Field, PrivateAttr, field_validator, model_validator

from care_compress.device import processor
from care_compress.errors import RecipeError
from care_compress.recipe.layers import ENDINGS
from care_compress.recipe.quantize import RuleSection
from care_compress.recipe.reading import did_you_mean, read_yaml
from care_compress.recipe.recipe import RECIPES_DIR, parse
from care_compress.recipe.sections import Section
from care_compress.shipped import install_command

TARGETS_DIR = RECIPES_DIR / "targets"

# What a file says in its metadata that a processor must have, and under which key.
NEEDS = "care_compress.needs"
DOT_PRODUCTS = processor.DOT_PRODUCTS  # what the script of a bundle asks for

_WORDS = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*$")
AS_SHIPPED = "as shipped"  # the placement of a target's own rules

Runtime = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"]
Gelu = Literal["erf", "products", "tanh"]
Device = Literal["cpu", "gpu", "npu", "jetson-orin", "jetson-thor", "rtx"]
_DEVICES: dict[Runtime, tuple[Device, ...]] = {
    "onnxruntime": ("cpu",),
    "openvino": ("cpu", "gpu", "npu"),
    "tensorrt": ("gpu", "jetson-orin", "jetson-thor"),
    "tensorrt_rtx": ("rtx",),
}


class Activations(Section):
    """The integer activations the runtime multiplies."""

    dtype: Literal["u8", "s8"]
    symmetric: bool = Field(description="true: every zero point must be 0")
    per_channel_depthwise: bool = Field(
        description="a depthwise conv's input may have a scale for each channel"
    )


class Weights(Section):
    """The integer weights the runtime multiplies."""

    bits: Annotated[tuple[Literal[8, 4], ...], Field(min_length=1)]
    symmetric: bool
    per_channel: bool = Field(description="a scale for each output channel")
    reduce_range: bool = Field(
        description="8-bit weights are in -64..63: 2 * 255 * 64 fits the 16 bits in which a "
        "processor without integer dot products adds two products, 2 * 255 * 127 does not"
    )


class Needs(Section):
    """What must be on a machine to build for the target and run on it."""

    dot_products: bool = Field(
        False, description="the processor adds products of integers in 32 bits: VNNI, AMX, SDOT"
    )

    packages: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="pip requirements with the versions that are supported"
    )
    platforms: tuple[str, ...] = Field(
        (), description="'Linux x86_64' and the like; any if left out"
    )
    compute_capabilities: tuple[str, ...] = Field(
        (), description="NVIDIA GPUs it runs on: '8.6', '12.*'"
    )

    @field_validator("packages")
    @classmethod
    def _are_requirements(cls, packages: tuple[str, ...]) -> tuple[str, ...]:
        for package in packages:
            try:
                Requirement(package)
            except InvalidRequirement as error:
                raise ValueError(f"{package!r} is no pip requirement ({error})") from None
        return packages


class Placement(Section):
    """What an export adds to a recipe's rules, and in which form it writes GELU."""

    rules: tuple[RuleSection, ...] = ()
    gelu: Gelu | None = Field(None, description="its form; the target's if left out")


class Target(Section):
    """One runtime on one kind of device."""

    name: str = Field(description="the file's name")
    title: str
    runtime: Runtime
    device: Device
    activations: Activations
    weights: Weights
    float_type: Literal["fp32", "bf16", "fp16"] = Field(
        description="what the operations left unquantized run in"
    )
    float8: tuple[str, ...] = Field(
        (), description="NVIDIA GPUs with products of 8-bit floats (E4M3): '8.9'; none if left out"
    )
    opset: Annotated[int, Field(ge=20)] = Field(
        description="ONNX opset of the exported graph, one that every supported version reads"
    )
    rules: tuple[RuleSection, ...] = Field(
        (), description="what an export adds to a recipe's rules: sites that run faster in float"
    )
    gelu: Gelu = Field("erf", description="the form of every GELU of an image (export/gelu.py)")
    placements: dict[str, Placement] = Field(
        {}, description="what may be faster on one processor or board: `tune`, here or there"
    )
    without_dot_products: str | None = Field(
        None, description="the placement that an export takes on processors without them"
    )
    builds_without_device: bool = Field(
        False, description="an engine can be built where the device is absent"
    )
    needs: Needs
    _placement: str = PrivateAttr(AS_SHIPPED)
    notes: tuple[str, ...] = Field((), description="why the values above are what they are")

    @property
    def file_needs(self) -> str | None:
        """What an exported file needs of the processor that runs it; most need nothing."""
        return DOT_PRODUCTS if self.needs.dot_products else None

    @property
    def is_engine(self) -> bool:
        """Whether what runs is an engine, built from the exported graph."""
        return self.runtime in ("tensorrt", "tensorrt_rtx")

    @property
    def is_bundled(self) -> bool:
        """Whether `make bundle` packs what proves it on another machine."""
        return self.is_engine or self.device == "cpu"

    @property
    def is_typed(self) -> bool:
        """Whether operations run in the type the graph gives them, so that it must say float16."""
        return self.is_engine and self.float_type == "fp16"

    def at_full_range(self) -> "Target":
        """The target where every processor has integer dot products: weights use all 8 bits."""
        if not self.weights.reduce_range:
            return self
        weights = self.weights.model_copy(update={"reduce_range": False})
        needs = self.needs.model_copy(update={"dot_products": True})
        return self.model_copy(update={"weights": weights, "needs": needs})

    def placement_for(self, dot_products: bool | None) -> str:
        """The placement of an export on a processor with these; its own where nothing is known."""
        if dot_products is False and self.without_dot_products is not None:
            return self.without_dot_products
        return AS_SHIPPED

    def placed(self, name: str) -> "Target":
        """The target with one placement in the place of its own rules."""
        if name == AS_SHIPPED:
            return self
        chosen = self.placements[name]
        gelu = chosen.gelu or self.gelu
        target = self.model_copy(update={"rules": chosen.rules, "gelu": gelu})
        target._placement = name
        return target

    @property
    def placement(self) -> str:
        """What the placement in use is called."""
        return self._placement

    @model_validator(mode="after")
    def _placement_exists(self) -> "Target":
        if self.without_dot_products not in (None, *self.placements):
            raise ValueError(f"without_dot_products: no placement {self.without_dot_products!r}")
        return self

    @model_validator(mode="after")
    def _placements_name_files(self) -> "Target":
        odd = [name for name in self.placements if self.is_engine and not _WORDS.match(name)]
        if odd:
            raise ValueError(f"placements: {odd[0]!r} becomes a file: use a-z, 0-9 and dashes")
        return self

    @model_validator(mode="after")
    def _device_fits(self) -> "Target":
        known = _DEVICES[self.runtime]
        if self.device not in known:
            raise ValueError(f"{self.runtime} runs on device {' or '.join(known)}")
        return self


# Targets from files of users' own, by name, once this process has read them.
_own: dict[str, Target] = {}


def load_target(name: str, full_range: bool = False) -> Target:
    """The target called `name`, e.g. ``openvino-cpu``, or that of a ``.yaml`` of one's own.

    One of one's own goes by its file's name from then on. See `Target.at_full_range`.
    """
    path = TARGETS_DIR / f"{name}.yaml"
    if path in target_files(TARGETS_DIR):
        target = read_target(path)
    elif name.endswith(ENDINGS):
        target = read_target(Path(name))
        if (TARGETS_DIR / f"{target.name}.yaml").is_file():
            raise RecipeError(
                f"{name} has the name of a shipped target.", "give your file another name"
            )
        _own[target.name] = target
    elif name in _own:
        target = _own[name]
    else:
        known = [*(file.stem for file in target_files(TARGETS_DIR)), *_own]
        fix = f"{did_you_mean(name, known)} Targets: {', '.join(known)}, or a .yaml file".lstrip()
        raise RecipeError(f"there is no target {name!r}.", fix)
    return target.at_full_range() if full_range else target


def own_target(name: str) -> Target | None:
    """The target of one's own called `name`, as its file says; None for one that ships."""
    return _own.get(name)


def all_targets() -> tuple[Target, ...]:
    """Every shipped target, by name."""
    return tuple(read_target(path) for path in target_files(TARGETS_DIR))


def target_files(directory: Path) -> list[Path]:
    """The target files below `directory`; none at all is an error, never an empty answer."""
    files = sorted(directory.rglob("*.yaml"))
    if not files:
        raise RecipeError(
            f"{directory} holds no target files.", f"install it again: {install_command()}"
        )
    return files


def read_target(path: Path) -> Target:
    """Read one target file."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} holds no keys.", "see recipes/targets/openvino-cpu.yaml for the form"
        )
    if raw.setdefault("name", path.stem) != path.stem:
        raise RecipeError(
            f"{path}: name: it is {raw['name']!r}, the file's is {path.stem!r}.",
            "leave the key out: the file's name is the target's",
        )
    return parse(Target, raw, str(path))
