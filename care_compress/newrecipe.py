"""A recipe of the user's own: written from a few answers, or a copy of all that ship.

Every answer is tried at once: the checkpoint is opened, the images are listed, and the recipe that
comes of them all is planned before a file is written.
"""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import typer
import yaml
from rich.console import Console

from care_compress.console import say, shortened
from care_compress.data.sources import check_classes, open_samples
from care_compress.errors import CareError, DataError, RecipeError
from care_compress.files import write_text
from care_compress.model.care import Care
from care_compress.model.checkpoint import load_checkpoint
from care_compress.preflight import preflight
from care_compress.recipe.layers import ENDINGS
from care_compress.recipe.recipe import RECIPES_DIR, Recipe, load_recipe, parse, recipe_files
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import TARGETS_DIR, all_targets, load_target, target_files
from care_compress.run.processes import World

Answer = TypeVar("Answer")
SHAPES = "builtin:shapes"
HELD_OUT = 0.1  # of images that nobody divided


@dataclass(frozen=True)
class Given:
    """What the command line says; what it leaves out is asked for."""

    ckpt: str | None = None
    data: str | None = None
    res: int | None = None
    base: str | None = None
    target: str | None = None
    out: Path | None = None
    # Not asked for.
    crop: float | None = None
    val_fraction: float | None = None
    classes: str | None = None

    def left_out(self) -> list[str]:
        """The options that would be asked for."""
        asked = ("ckpt", "data", "res", "base", "target", "out")
        return [f"--{name}" for name in asked if getattr(self, name) is None]


def write_recipe(given: Given, yes: bool, force: bool, console: Console) -> None:
    """Ask for what is not given, unless `yes` takes what is suggested, and write the recipe."""
    asks = not yes and at_a_terminal()
    if given.left_out() and not yes and not asks:
        raise RecipeError(
            f"nobody can be asked here for {', '.join(given.left_out())}.",
            "give them, or --yes to take what would be suggested",
        )

    def answer(
        question: str, said: str | None, suggested: str, check: Callable[[str], Answer]
    ) -> Answer:
        if said is not None or not asks:
            return check(suggested if said is None else said)
        while True:
            typed = _prompted(question, suggested)
            try:
                return check(typed)
            except CareError as error:
                say(str(error), console)

    def model_of(text: str) -> tuple[str, Care]:
        return text, load_checkpoint(text)

    def images_of(text: str) -> DataSection:
        return _opened(text, given, model.num_classes)

    def resolution_of(text: str) -> int:
        if not text.isdecimal():
            raise RecipeError(f"{shortened(repr(text))} is no resolution.", "give one side: 224")
        return parse(DataSection, {"resolution": int(text)}, "--res").resolution

    checkpoint, model = answer(
        "Checkpoint: a .pth, .pt or .safetensors file, or builtin:NAME",
        given.ckpt,
        "builtin:care_nano_shapes",
        model_of,
    )
    say(f"  {model.arch}, {model.num_classes:,} classes", console)
    images = answer(
        "Images: a folder or .zip of class folders, hf:NAME, wds:PATTERN, or builtin:shapes",
        given.data,
        SHAPES,
        images_of,
    )
    if images.val_fraction is not None and given.val_fraction is None:
        say(f"  nobody divided them: {HELD_OUT:.0%} will be kept for validation", console)
    drawn = images.source == SHAPES
    res = None if given.res is None else str(given.res)
    resolution = answer("Resolution", res, "64" if drawn else "224", resolution_of)
    if asks and given.base is None:
        for name, recipe in _methods().items():
            say(f"  {name}: {recipe.claim}", console)
    while True:
        base = answer("Method: the recipe to start from", given.base, "int8_qat", _method)
        if asks and given.target is None:
            for one in all_targets():
                say(f"  {one.name}: {one.title}", console)
        target = answer("Target", given.target, "openvino-cpu", lambda text: load_target(text).name)
        out = given.out or Path(f"my_{base}.yaml")
        out = answer("File to write", None if given.out is None else str(out), str(out), _file)
        values: dict[str, object] = {
            "model.checkpoint": checkpoint,
            "data.source": images.source,
            "data.resolution": resolution,
            "data.crop_pct": (1.0 if drawn else 0.9) if given.crop is None else given.crop,
            "export.targets": [target],
        }
        values |= {
            f"data.{key}": value
            for key, value in (("val_fraction", images.val_fraction), ("classes", images.classes))
            if value is not None
        }
        try:
            start = _found_by(base, out)
            section = start.quantize
            if section is not None and section.target is not None:
                values["quantize.target"] = target
            recipe = load_recipe(str(start.origins.files[0]), [], values)
            preflight(recipe, World(), Console(quiet=True))
            break
        except CareError as error:
            if not asks or (given.base is not None and given.target is not None):
                raise
            say(str(error), console)
    if os.path.lexists(out) and not force:
        if not asks or not _confirmed(f"{out} is there already. Write over it?"):
            raise RecipeError(f"{out} is there already.", "give --force, or another --out")
    write_text(out, _text(recipe, base, model))
    _next_steps(recipe, out, console)


def copy_recipes(folder: Path, console: Console) -> None:
    """Copy all recipes and targets that ship, with their pages; nothing is overwritten."""
    recipes, targets = recipe_files(), target_files(TARGETS_DIR)
    copies = {folder / path.relative_to(RECIPES_DIR): path for path in recipes}
    copies |= {folder / "targets" / path.relative_to(TARGETS_DIR): path for path in targets}
    copies[folder / "README.md"] = RECIPES_DIR / "README.md"
    copies[folder / "targets" / "README.md"] = TARGETS_DIR / "README.md"
    taken = [copy for copy in copies if os.path.lexists(copy)]
    if taken:
        more = f" and {len(taken) - 1} more files" if len(taken) > 1 else ""
        raise RecipeError(
            f"{taken[0]}{more} would be overwritten.", "name a folder that is not there yet"
        )
    for copy, path in copies.items():
        write_text(copy, path.read_text(encoding="utf-8"))
    say(f"{len(recipes)} recipes and {len(targets)} targets are in {folder}. Next:", console)
    say(f"  care-compress plan {shlex.quote(str(folder / 'int8_qat.yaml'))}", console)


def at_a_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin is not None and sys.stdin.isatty()


def _prompted(question: str, suggested: str) -> str:
    try:
        return str(typer.prompt(question, default=suggested)).strip()
    except typer.Abort:
        raise RecipeError("the questions came to no end; nothing was written.") from None


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort:
        return False


def _opened(source: str, given: Given, classes: int) -> DataSection:
    """The data section of a source that holds the classes of the model, opened once."""
    asked = {"source": source, "val_fraction": given.val_fraction, "classes": given.classes}
    section = parse(DataSection, asked, "the answers")
    try:
        samples = [open_samples(section, split) for split in ("train", "val")]
    except DataError:
        # A set that nobody divided opens with a part held out.
        if given.val_fraction is not None or source == SHAPES:
            raise
        divided = section.model_copy(update={"val_fraction": HELD_OUT})
        try:
            samples = [open_samples(divided, split) for split in ("train", "val")]
        except DataError:
            samples = []
        if not samples:
            raise  # what is wrong with it as it was given
        section = divided
    for one in samples:
        try:
            check_classes(one, classes)
        except DataError as error:
            raise DataError(error.message, f"{error.fix} (--classes FILE)") from None
    return section


def _methods() -> dict[str, Recipe]:
    """The shipped recipes that start from a checkpoint, by name."""
    loaded = [load_recipe(str(path)) for path in recipe_files()]
    return {recipe.name: recipe for recipe in loaded if recipe.train is None}


def _method(name: str) -> str:
    load_recipe(name)  # its error knows the name that was meant
    known = _methods()
    if name not in known:
        raise RecipeError(
            f"{shortened(name)} is no shipped recipe that starts from a checkpoint.",
            f"choose one of {', '.join(known)}",
        )
    return name


def _file(text: str) -> Path:
    if not text.endswith(ENDINGS):
        raise RecipeError(f"{shortened(repr(text))} is no .yaml file.", "end its name in .yaml")
    return Path(os.path.expanduser(text))


def _found_by(base: str, out: Path) -> Recipe:
    """The recipe that ``base:`` in the file to write will mean: one beside it comes first."""
    beside = out.parent / f"{base}.yaml"
    own = os.path.isfile(beside) and os.path.realpath(beside) != os.path.realpath(out)
    recipe = load_recipe(str(beside) if own else base)
    if recipe.train is not None:
        raise RecipeError(f"{beside} trains a model of its own.", "write the file elsewhere")
    return recipe


def _text(recipe: Recipe, base: str, model: Care) -> str:
    """The file: what differs from the base, and why or how to change it."""
    data, section = recipe.data, recipe.quantize
    source, checkpoint = _scalar(data.source), _scalar(recipe.model.checkpoint)
    mean = _scalar(list(data.mean))
    lines = [
        f"# What is not said here is as in {base}; recipes/README.md of care-compress lists every "
        "key.",
        f"claim: {_scalar(f'{base} of {recipe.model.checkpoint} on {data.source}')}",
        f"base: {base} # another method: one of those that care-compress recipes lists",
        "model:",
        f"  checkpoint: {checkpoint} # {model.arch}, {model.num_classes} classes",
        "data:",
        f"  source: {source} # a folder, .zip, hf:NAME, wds:PATTERN; paths as seen by the command",
        f"  resolution: {data.resolution} # as the checkpoint was trained; smaller is faster",
        f"  crop_pct: {data.crop_pct} # 0.9 for published checkpoints, 1.0 for the whole image",
    ]
    if data.val_fraction is not None:
        held = "of the images are scored, the others train; the same ones every time"
        lines.append(f"  val_fraction: {data.val_fraction} # {held}")
    if data.classes is not None:
        lines.append(f"  classes: {_scalar(data.classes)} # the model's classes, one per line")
    lines.append(f"  # mean: {mean} # and std: change them if yours was trained with others")
    if section is not None:
        lines.append("quantize:")
        if section.target is not None:
            lines.append(f"  target: {section.target} # whose limits hold while it is quantized")
        lines.append("  # calibrate: {images: 1024} # more are slower and hardly better")
        if section.qat is not None:
            steps = section.qat.max_steps or "one epoch of"
            lines.append(
                f"  # qat: {{epochs: 2, max_steps: 1000}} # {base} trains for {steps} steps"
            )
    lines += [
        "export:",
        f"  targets: {_scalar(list(recipe.export.targets or ()))} # leave it out for every target "
        "that can run it",
    ]
    drop = recipe.budget.max_top1_drop
    if drop is not None:
        lines += ["budget:", f"  max_top1_drop: {drop} # points; beyond it compare exits with 1"]
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """A value on one line of YAML, whatever is in it."""
    plain = yaml.safe_dump(value, default_flow_style=True, width=2**30)
    text = plain.removesuffix("...\n").removesuffix("\n")
    if "\n" in text:
        text = yaml.safe_dump(value, default_style='"', width=2**30).removesuffix("\n")
    return text


def _next_steps(recipe: Recipe, out: Path, console: Console) -> None:
    file, section = shlex.quote(str(out)), recipe.quantize
    say(f"{out} is written. Next:", console)
    if section is not None and section.backend == "torchao":
        say(f"  care-compress plan {file}      # every layer, before anything is run", console)
    say(f"  care-compress quantize {file}  # model, files and results in runs/{out.stem}", console)
    if section is not None:
        name = shlex.quote(out.stem)
        say(f"  care-compress compare fp32 {name}  # what it costs, and what it buys", console)
