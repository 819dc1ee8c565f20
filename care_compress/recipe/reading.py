"""Reading YAML that somebody else wrote: only so large, only so deep, nothing twice, no tags."""

import difflib
import re
from collections.abc import Hashable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from care_compress.console import shortened
from care_compress.errors import RecipeError
from care_compress.files import read_text

# Far above any recipe; what is larger would keep the parser busy for minutes, or fill the memory.
MOST_BYTES = 256 * 1024
MOST_VALUES = 20_000


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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _written_out(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Count the values a node stands for; a few lines of aliases of aliases make billions."""
    if node.value is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = None  # until its children are counted
        # A list has items, a mapping pairs of key and value.
        groups = (item if isinstance(item, tuple) else (item,) for item in node.value)
        children = chain.from_iterable(groups)
        known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    count = known[id(node)]
    if count is None:
        raise yaml.YAMLError("an alias stands inside the value that it names")
    return count


def read_yaml(path: Path) -> Any:
    """Parse one YAML file, or name what is wrong with it."""
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.", "give a YAML file") from error
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not readable YAML: {error}.", "correct the file") from error


def parse_yaml(text: str) -> Any:
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


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Ask for the known name that is nearest to one that does not exist, if any is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else ""
