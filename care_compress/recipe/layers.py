"""A recipe over another: ``base: int8_ptq`` names the one below, and only what differs is said.

Mappings merge key by key; a list or a single value replaces what the base says. null takes a
mapping or a list of the base away (``qat: null``); in the place of a single value it is one itself
(``quantize.target: null``). What comes out has no base any more; `Origins` knows where each of its
values stands.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from care_compress.console import shortened
from care_compress.errors import RecipeError
from care_compress.recipe.reading import did_you_mean, read_yaml

ENDINGS = (".yaml", ".yml")
MOST_FILES = 8  # over one another; what nobody can follow any more is a mistake
COMMAND = "the command line"


@dataclass
class Place:
    """The topmost file that says a value, or that says something inside it."""

    file: Path | None  # none: the command line
    inner: dict[str, "Place"] = field(default_factory=dict)


@dataclass(frozen=True)
class Origins:
    """Where the values of a recipe stand. All are equal: where it stands makes no other recipe."""

    files: tuple[Path, ...] = field(default=(), compare=False)  # the recipe, its base, its base's
    root: Place = field(default_factory=lambda: Place(None), compare=False)

    def said(self, *keys: str) -> str | None:
        """What to call the file that says this very value; None where it is a default."""
        place = self._walk(keys)[-1]
        return None if place is None else self.label(place.file)

    def where(self, *keys: str) -> str:
        """The file to look into for a mistake in a value, as a message names it."""
        place = [place for place in self._walk(keys) if place is not None][-1]
        if place.file is None or place.file == self.files[0]:
            return COMMAND if place.file is None else str(place.file)
        return f"{place.file} (a base of {self.files[0]})"

    def label(self, file: Path | None) -> str:
        """A file's name, or its whole path where two of the recipe's files share the name."""
        if file is None:
            return COMMAND
        alone = sum(other.name == file.name for other in self.files) < 2
        return file.name if alone else str(file)

    def chain(self, name: str) -> tuple[str, ...]:
        """The recipe called `name` and those that it is over, from the top."""
        bases = (self.label(file) for file in self.files[1:])
        return (name, *(base.removesuffix(".yaml").removesuffix(".yml") for base in bases))

    def set(self, key: str, value: object) -> None:
        """Note a dotted key that was set beside the files."""
        *parents, leaf = key.split(".")
        place = self.root
        for parent in parents:
            place = place.inner.setdefault(parent, Place(None))
        place.inner[leaf] = _over({}, {leaf: value}, Place(None), None)[1].inner[leaf]

    def as_json(self) -> dict[str, str]:
        """Every value that somebody said, by its dotted key."""
        found: dict[str, str] = {}

        def collect(place: Place, at: tuple[str, ...]) -> None:
            if at and not place.inner:
                found[".".join(at)] = self.label(place.file)
            for key, inner in place.inner.items():
                collect(inner, (*at, key))

        collect(self.root, ())
        return found

    def _walk(self, keys: Sequence[str]) -> list[Place | None]:
        """The places on the way to a value; the last is None where nobody says it."""
        way: list[Place | None] = [self.root]
        for key in keys:
            above = way[-1]
            way.append(None if above is None else above.inner.get(key))
        return way


def read_layers(
    path: Path, shipped: Path, known: Collection[str]
) -> tuple[dict[str, Any], Origins]:
    """Read a recipe and all that it is over, as one recipe without a base.

    A base is looked for beside the file that names it, then in `shipped`; `known` are the keys of
    a recipe.
    """
    files = [path]
    said = [_read(path, None)]
    while "base" in said[-1]:
        above = files[-1]
        file = _base_file(said[-1].pop("base"), above, shipped)
        below = _read(file, above)  # first: a name that no file can have is refused here
        reals = [os.path.realpath(one) for one in files]
        files.append(file)
        named = " -> ".join(str(one) for one in files)
        if os.path.realpath(file) in reals:
            raise RecipeError(f"{path}: its bases go round: {named}.", "take one base out")
        if len(files) > MOST_FILES:
            raise RecipeError(
                f"{path} stands over more than {MOST_FILES - 1} bases: {named}.",
                "write some of them together",
            )
        if not set(below) & ({*known, "base"} - {"name"}):
            raise RecipeError(
                f"{above}: its base {file} is no recipe: it has none of a recipe's sections.",
                "name a recipe",
            )
        below.pop("name", None)  # a recipe is called after its own file
        said.append(below)
    raw, root = _over({}, said[-1], Place(files[-1]), files[-1])
    for number in range(len(files) - 2, -1, -1):
        _check_start(raw, said[number], files[number], files[number + 1])
        raw, root = _over(raw, said[number], root, files[number])
    return raw, Origins(tuple(files), root)


def _read(path: Path, above: Path | None) -> dict[str, Any]:
    """One file of a recipe, named together with the file whose base it is."""
    try:
        raw = read_yaml(path)
        if not isinstance(raw, dict):
            raise RecipeError(f"{path} holds no sections.", "see recipes/fp32.yaml for the form")
    except RecipeError as error:
        if above is None:
            raise
        raise RecipeError(f"{above}: its base {error.message}", error.fix) from error
    return raw


def _base_file(said: object, file: Path, shipped: Path) -> Path:
    """The file that ``base:`` of `file` means."""
    if not isinstance(said, str):
        raise RecipeError(
            f"{file}: base: it is {shortened(repr(said))}, no name and no path.",
            "name a shipped recipe, or give the path of a .yaml file",
        )
    if said.endswith(ENDINGS):
        return file.parent / os.path.expanduser(said)
    for folder in (file.parent, shipped):
        found = folder / f"{said}.yaml"
        # A recipe that is called as its base means the other one. os.path, because Path.is_file
        # raises for a name that is too long.
        if os.path.isfile(found) and os.path.realpath(found) != os.path.realpath(file):
            return found
    known = sorted({one.stem for folder in (file.parent, shipped) for one in folder.glob("*.yaml")})
    known = [name for name in known if name != file.stem]
    raise RecipeError(
        f"{file}: its base {shortened(repr(said))} is neither beside it nor shipped.",
        f"{did_you_mean(said, known)} Recipes: {shortened(', '.join(known))}".lstrip(),
    )


def _over(
    below: Mapping[str, Any], said: Mapping[str, Any], under: Place, file: Path | None
) -> tuple[dict[str, Any], Place]:
    """What a file says over what is below it, and where each value stands then."""
    values, place = dict(below), Place(file, dict(under.inner))
    for key, value in said.items():
        before, inner = values.get(key), Place(file)
        if isinstance(value, dict) and isinstance(before, dict):
            values[key], inner = _over(before, value, place.inner[str(key)], file)
        elif isinstance(value, dict):
            values[key], inner = _over({}, value, inner, file)
        elif value is None and isinstance(before, dict | list):
            del values[key]
        else:
            values[key] = value
        place.inner[str(key)] = inner
    return values, place


def _check_start(below: Mapping[str, Any], said: Mapping[str, Any], file: Path, base: Path) -> None:
    """Refuse to guess whether a checkpoint takes the place of a training or is trained further."""
    model, trains = said.get("model", {}), isinstance(below.get("train"), dict)
    if not isinstance(model, dict):
        return
    start = below["model"] if isinstance(below.get("model"), dict) else {}
    from_below, own = start.get("checkpoint"), model.get("checkpoint")
    if own is not None and trains and from_below is None and "train" not in said:
        raise RecipeError(
            f"{file}: model.checkpoint: its base {base} trains a model from scratch.",
            "write train: null to take the checkpoint as it is, or train: {} to train it further",
        )
    wants = isinstance(said.get("train"), dict) and "checkpoint" not in model
    if wants and not trains and from_below is not None:
        raise RecipeError(
            f"{file}: train: its base {base} starts from {shortened(repr(from_below))}.",
            "write model: {checkpoint: null} to train from scratch, or name the checkpoint that "
            "is trained further",
        )


def commented(resolved: Mapping[str, Any], name: str, origins: Origins) -> str:
    """A complete recipe as YAML; behind each value that somebody said stands who did."""
    text = yaml.safe_dump(dict(resolved), sort_keys=False)
    lines = text.split("\n")

    def comment(node: yaml.MappingNode, at: tuple[str, ...]) -> None:
        for key, value in node.value:
            keys = (*at, key.value)
            if isinstance(value, yaml.MappingNode) and value.value:
                comment(value, keys)
            elif (said := origins.said(*keys)) is not None:
                # A list goes on for lines of its own; the comment stands where it begins.
                listed = isinstance(value, yaml.SequenceNode) and value.value
                mark = key.end_mark if listed else value.end_mark
                lines[mark.line] += f"  # {_printable(said)}"

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    comment(root, ())
    head = f"# {_printable(' over '.join(origins.chain(name)))}, whole; values without a file "
    return "\n".join([head + "behind them are defaults", *lines])


def _printable(text: str) -> str:
    """Names of files, in letters that YAML takes in a comment."""
    return text if text.isprintable() else ascii(text)
