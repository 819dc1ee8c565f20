"""Recipes: one YAML file says everything about one compressed model.

A recipe is data, typed, frozen and strict. An unknown key or a bad value ends in a `RecipeError`
that names the file, the key and the fix, before any work starts. ``--set section.key=value``
changes one value on the command line under the same rules.
"""

import difflib
import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from care_compress.errors import RecipeError
from care_compress.files import read_text
from care_compress.quantization_sections import QuantizeSection
from care_compress.sections import (
    BudgetSection,
    DataSection,
    EvaluateSection,
    ExportSection,
    ModelSection,
    RewriteSection,
    Section,
    TrainSection,
)
from care_compress.terminal import shortened

# Far above any recipe; what is larger would keep the parser busy for minutes, or fill the memory.
MOST_BYTES = 256 * 1024
MOST_VALUES = 20_000

RECIPES_DIR = Path(__file__).resolve().parent.parent / "recipes"

Precision = Literal["fp32", "fp16", "bf16", "int8", "w4a8", "w4a4", "mixed"]
AnySection = TypeVar("AnySection", bound=Section)


class Recipe(Section):
    """One compressed model a user can ask for."""

    name: str
    claim: str = Field(description="what this recipe promises, one sentence")
    precision: Precision = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection | None = None
    rewrite: RewriteSection = RewriteSection()
    quantize: QuantizeSection | None = None
    export: ExportSection = ExportSection()
    budget: BudgetSection = BudgetSection()
    evaluate: EvaluateSection = EvaluateSection()

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
        search = self.quantize is not None and self.quantize.searches
        if search and self.budget.max_top1_drop is None:
            raise ValueError("the search for bits needs budget.max_top1_drop")
        return self


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses repeated keys."""

    def get_single_node(self) -> yaml.Node | None:
        """The document, if it is small with every alias written out."""
        root = super().get_single_node()
        if root is not None and _written_out(root, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for place, _ in node.value:
            key = self.construct_object(place, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"a {type(key).__name__} cannot be a key")
            if key in seen:
                raise yaml.YAMLError(f"key {str(key)!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node stands for; a few lines of aliases of aliases make billions."""
    if node.value is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = None  # until its children are counted
        children = (part for item in node.value for part in _parts(item))
        known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    count = known[id(node)]
    if count is None:
        raise yaml.YAMLError("an alias stands inside the value that it names")
    return count


def _parts(item: yaml.Node | tuple[yaml.Node, yaml.Node]) -> tuple[yaml.Node, ...]:
    """An item of a list, or key and value of a mapping."""
    return item if isinstance(item, tuple) else (item,)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """Parse one YAML file, or name what is wrong with it."""
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.", "give a YAML file") from error
    try:
        return _parsed(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not readable YAML: {error}.", "correct the file") from error


def _parsed(text: str) -> Any:
    """YAML text as plain values; whatever is wrong with it is a `YAMLError` of one line."""
    try:
        return yaml.load(text, Loader=_Loader)  # nosec B506 # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    # The constructors of PyYAML trust what a tag promises: !!int '' is an IndexError, !!bool x a
    # KeyError, !!timestamp x an AttributeError, a date of month 13 a ValueError.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        why = " ".join(str(error).split())  # the parser draws where it is, over several lines
        if not isinstance(error, yaml.YAMLError):
            why = f"a value is not what its tag says ({why})"
        raise yaml.YAMLError(shortened(why)) from error


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    values: Mapping[str, object] | None = None,
) -> Recipe:
    """Read a recipe by name (``int8_qat``) or path.

    `overrides` are ``section.key=value`` texts, `values` are dotted keys with ready values.
    """
    path = find_recipe(name_or_path)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no sections.", "see recipes/fp32.yaml for the form")
    raw.setdefault("name", path.stem)
    for key, value in (values or {}).items():
        _assign(raw, key, value)
    for override in overrides:
        _assign(raw, *_split_override(override))
    return parse(Recipe, raw, str(path))


def parse_section(
    kind: type[AnySection], values: Mapping[str, object], overrides: Sequence[str], where: str
) -> AnySection:
    """One section from ready values and ``key=value`` texts."""
    raw = dict(values)
    for override in overrides:
        _assign(raw, *_split_override(override))
    return parse(kind, raw, where)


def find_recipe(name_or_path: str) -> Path:
    """The file of a shipped recipe, or the path given."""
    given = Path(name_or_path)
    if given.suffix in {".yaml", ".yml"}:
        return given
    shipped = RECIPES_DIR / f"{name_or_path}.yaml"
    if os.path.isfile(shipped):  # Path.is_file raises for a name that is too long
        return shipped
    known = [path.stem for path in recipe_files()]
    near = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"there is no recipe {shortened(repr(name_or_path))}.",
        f"{hint}Shipped recipes: {', '.join(known)}",
    )


def recipe_files() -> list[Path]:
    """Every shipped recipe."""
    return [p for p in sorted(RECIPES_DIR.rglob("*.yaml")) if "targets" not in p.parts]


def _split_override(override: str) -> tuple[str, Any]:
    """``section.key=value`` as key and YAML value."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        given = shortened(repr(override))
        raise RecipeError(f"--set {given} has no value.", "write section.key=value")
    try:
        return key.strip(), _parsed(text)
    except yaml.YAMLError as error:
        given = shortened(repr(override))
        raise RecipeError(f"--set {given} is not a YAML value: {error}.") from error


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


def parse(kind: type[AnySection], raw: Mapping[str, Any], where: str) -> AnySection:
    """Validate plain data as `kind`; the first problem becomes one readable line."""
    try:
        # Through JSON, because there strict mode still takes a list for a tuple.
        return kind.model_validate_json(json.dumps(raw))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            raise RecipeError(*_explain(kind, error, where)) from None
        raise RecipeError(f"{where}: {error}.", "use plain YAML values") from None


def _explain(kind: type[Section], error: ValidationError, where: str) -> tuple[str, str]:
    # A mistyped required key is also a missing one; the typo is the helpful half.
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    keys = [str(part) for part in problem["loc"]]
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _fields_at(kind, keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {shortened('.'.join(keys))}{more}.", fix
    message = problem["msg"].removeprefix("Value error, ")
    got = (
        ""
        if problem["type"] in {"missing", "value_error"}
        else f", got {shortened(repr(problem['input']))}"
    )
    at = f" {'.'.join(keys)}:" if keys else ""
    return f"{where}:{at} {message}{got}{more}.", "correct the value"


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
