"""Recipes: one YAML file says everything about one compressed model.

A recipe is data, typed, frozen and strict. An unknown key or a bad value ends in a `RecipeError`
that names the file, the key and the fix, before any work starts. ``base: int8_ptq`` puts a recipe
over another (`care_compress.recipe.layers`), ``--set section.key=value`` changes one value on the
command line under the same rules.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from care_compress.console import shortened
from care_compress.errors import CareError, RecipeError
from care_compress.recipe.layers import ENDINGS, Origins, read_layers
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.reading import did_you_mean, parse_yaml
from care_compress.recipe.sections import (
    DROPS,
    BudgetSection,
    DataSection,
    EvaluateSection,
    ExportSection,
    ModelSection,
    RewriteSection,
    Section,
    Task,
    TrainSection,
)
from care_compress.recipe.slim import SlimSection
from care_compress.shipped import shipped

RECIPES_DIR = shipped("recipes")
LONGEST_NAME = 128  # bytes; files beside a run are named after it

Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "w4a8", "w4a4", "mixed"]
AnySection = TypeVar("AnySection", bound=Section)


class Recipe(Section):
    """One compressed model a user can ask for."""

    name: str
    claim: str = Field(description="what this recipe promises, one sentence")
    task: Task = "classification"
    precision: Precision = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection | None = None
    slim: SlimSection | None = None
    rewrite: RewriteSection = RewriteSection()
    quantize: QuantizeSection | None = None
    export: ExportSection = ExportSection()
    budget: BudgetSection = BudgetSection()
    evaluate: EvaluateSection = EvaluateSection()
    _origins: Origins = PrivateAttr(default_factory=Origins)

    @property
    def origins(self) -> Origins:
        """Where its values stand."""
        return self._origins

    @property
    def full_range(self) -> bool:
        """Whether 8-bit weights leave -64..63 on CPUs, too (``quantize.full_range``)."""
        return self.quantize is not None and self.quantize.full_range

    @model_validator(mode="after")
    def _has_a_start(self) -> "Recipe":
        if self.model.checkpoint is None and self.train is None:
            raise ValueError("there is neither model.checkpoint nor a train section to make one")
        if self.model.checkpoint is None and self.model.arch is None:
            raise ValueError("model.arch is needed to train from scratch")
        return self

    @model_validator(mode="after")
    def _precision_fits(self) -> "Recipe":
        if (self.precision == "fp32") != (self.quantize is None):
            raise ValueError("a quantize section goes with a precision other than fp32")
        float8 = self.quantize is not None and self.quantize.has_float8
        if (self.precision == "fp8") != float8:  # it names the file, and so what it is built for
            raise ValueError("rules with fp8 go with precision: fp8, and it with them")
        search = self.quantize is not None and self.quantize.searches
        if search and self.budget.max_drop is None:
            raise ValueError(f"the search for bits needs budget.{DROPS[self.task]}")
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> "Recipe":
        for task, key in DROPS.items():
            if task != self.task and getattr(self.budget, key) is not None:
                raise ValueError(
                    f"budget.{key} is for {task}; set it to null, and {DROPS[self.task]} instead"
                )
        if self.model.backbone is not None and self.model.checkpoint is not None:
            raise ValueError("model.checkpoint is a whole network: leave model.backbone out")
        return self


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    values: Mapping[str, object] | None = None,
) -> Recipe:
    """Read a recipe by name (``int8_qat``) or path.

    `overrides` are ``section.key=value`` texts, `values` are dotted keys with ready values.
    """
    path = Path(name_or_path)
    if path.suffix not in ENDINGS:
        path = RECIPES_DIR / f"{name_or_path}.yaml"
        if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            known = [file.stem for file in recipe_files()]
            fix = f"{did_you_mean(name_or_path, known)} Shipped recipes: {', '.join(known)}"
            name = shortened(repr(name_or_path))
            raise RecipeError(f"there is no recipe {name}.", fix.lstrip())
    raw, origins = read_layers(path, RECIPES_DIR, Recipe.model_fields)
    raw.setdefault("name", path.stem)
    for key, value in chain((values or {}).items(), _read_overrides(overrides)):
        _assign(raw, key, value)
        origins.set(key, value)
    recipe = parse(Recipe, raw, str(path), origins)
    recipe._origins = origins
    return recipe


def parse_section(
    kind: type[AnySection], values: Mapping[str, object], overrides: Sequence[str], where: str
) -> AnySection:
    """One section from ready values and ``key=value`` texts."""
    raw = dict(values)
    for key, value in _read_overrides(overrides):
        _assign(raw, key, value)
    return parse(kind, raw, where)


def _read_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of ``--set`` texts."""
    for override in overrides:
        given = shortened(repr(override))
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {given} has no value.", "write section.key=value")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {given} is not a YAML value: {error}.") from error
        yield key.strip(), value


def plain_name(run: str) -> str:
    """A run's name, if it leads nowhere else and any file system takes it."""
    plain = run.isprintable() and 0 < len(os.fsencode(run)) <= LONGEST_NAME
    if not plain or Path(run).name != run or run.startswith("."):
        raise CareError(
            f"{shortened(repr(run))} is no run name.",
            "use a plain name, and --runs for the folder",
        )
    return run


def recipe_files() -> list[Path]:
    """Every shipped recipe."""
    return [p for p in sorted(RECIPES_DIR.rglob("*.yaml")) if "targets" not in p.parts]


def _assign(raw: dict[str, Any], key: str, value: object) -> None:
    """Set one dotted key."""
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"cannot set {key}: {parent} is no section.")
        node = child
    node[leaf] = value


def parse(
    kind: type[AnySection], raw: Mapping[str, Any], where: str, origins: Origins | None = None
) -> AnySection:
    """Validate plain data as `kind`; the first problem becomes one readable line.

    Where the data come from several files, `origins` knows which of them has the problem.
    """
    try:
        # Through JSON, because there strict mode still takes a list for a tuple.
        return kind.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        # A mistyped required key is also a missing one; the typo is the helpful half.
        problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        keys = [str(part) for part in problem["loc"]]
        where = where if origins is None else origins.where(*keys)
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if problem["type"] == "extra_forbidden":
            known = _fields_at(kind, keys[:-1])
            if kind is Recipe and len(keys) == 1:
                known = ["base", *known]
            fix = did_you_mean(keys[-1], known) or f"known keys: {', '.join(known)}"
            key = shortened(".".join(keys))
            raise RecipeError(f"{where}: unknown key {key}{more}.", fix) from None
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] not in {"missing", "value_error"}:
            message += f", got {shortened(repr(problem['input']))}"
        at = f" {'.'.join(keys)}:" if keys else ""
        raise RecipeError(f"{where}:{at} {message}{more}.", "correct the value") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: {error}.", "use plain YAML values") from None


def _fields_at(kind: type[Section], keys: Sequence[str]) -> list[str]:
    """Field names of the section that `keys` leads to."""
    for key in keys:
        if key.isdigit():  # an item of a list; its kind was found with the list
            continue
        field = kind.model_fields.get(key)
        inner = None if field is None else _section_in(field.annotation)
        if inner is None:
            return []
        kind = inner
    return list(kind.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation names, however deep: ``tuple[Rule, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (_section_in(inner) for inner in get_args(annotation))
    return next((section for section in found if section is not None), None)
