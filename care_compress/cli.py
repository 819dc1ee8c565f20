"""The command line: ``care-compress quantize int8_qat``. Only verbs; the work is elsewhere.

Heavy imports stand inside the verbs, so that ``--help`` and ``doctor`` answer at once.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from care_compress.device.problems import DeployError
from care_compress.errors import CareError
from care_compress.measuring_verbs import app as measuring
from care_compress.recipe import RECIPES_DIR, Recipe, load_recipe, recipe_files
from care_compress.stopping import full_disks_named, stops_in_order
from care_compress.terminal import Terminal, one_line, shortened
from care_compress.verb_options import (
    ArchName,
    Checkpoint,
    Crop,
    Override,
    RecipeName,
    Resolution,
    RunName,
    Runs,
    SkipBad,
    Source,
    ValFraction,
    plain_name,
)

app = typer.Typer(
    help="Make a float CARE Transformer small and fast on edge devices. "
    "--debug, anywhere, shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(measuring)

# What the short options of the verbs set in a recipe.
KEYS = {
    "ckpt": "model.checkpoint",
    "arch": "model.arch",
    "data": "data.source",
    "res": "data.resolution",
    "crop": "data.crop_pct",
    "skip_bad_images": "data.skip_bad_images",
    "val_fraction": "data.val_fraction",
    "method": "quantize.calibrate.method",
    "images": "quantize.calibrate.images",
}


LONGEST_LINE = 2000  # letters of an error; a path can be longer
# What typer raises for a verb or an option that does not exist. It brings click along or uses the
# one installed, depending on its version, and names the class in neither case.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _chosen(recipe: str, overrides: list[str] | None, **given: object) -> Recipe:
    """The recipe with the values given on the command line."""
    values = {KEYS[option]: value for option, value in given.items() if value is not None}
    return load_recipe(recipe, overrides or [], values)


def _run_name(name: str | None, recipe: Recipe) -> str:
    return plain_name(name or recipe.name)


@app.command()
def quantize(
    recipe: RecipeName,
    ckpt: Checkpoint = None,
    arch: ArchName = None,
    data: Source = None,
    res: Resolution = None,
    crop: Crop = None,
    skip_bad_images: SkipBad = False,
    val_fraction: ValFraction = None,
    set_: Override = None,
    name: RunName = None,
    runs: Runs = Path("runs"),
    repair: Annotated[
        bool, typer.Option("--repair", help="make again what was damaged since it was written")
    ] = False,
) -> None:
    """Run a recipe from its float model to results; what is there and still holds is kept."""
    chosen = _chosen(
        recipe,
        set_,
        ckpt=ckpt,
        arch=arch,
        data=data,
        res=res,
        crop=crop,
        skip_bad_images=skip_bad_images or None,
        val_fraction=val_fraction,
    )
    run = _run_name(name, chosen)

    from care_compress.pipeline import run_recipe

    run_recipe(chosen, runs, run, Terminal(), repair)


@app.command()
def plan(
    recipe: RecipeName,
    ckpt: Checkpoint = None,
    arch: ArchName = None,
    res: Resolution = None,
    set_: Override = None,
    target: Annotated[
        str | None, typer.Option(help="as exported to this one, by its own rules too")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show what a recipe makes of every layer, and which rule decided; needs no data."""
    chosen = _chosen(recipe, set_, ckpt=ckpt, arch=arch, res=res)

    from care_compress.planning import show_plan

    show_plan(chosen, target, json, Terminal())


@app.command()
def sensitivity(
    recipe: RecipeName,
    ckpt: Checkpoint = None,
    arch: ArchName = None,
    data: Source = None,
    res: Resolution = None,
    crop: Crop = None,
    set_: Override = None,
    images: Annotated[int, typer.Option(min=1, help="validation images per measurement")] = 256,
    name: RunName = None,
    runs: Runs = Path("runs"),
) -> None:
    """Measure which site costs accuracy: each quantized alone, and each left alone out."""
    chosen = _chosen(recipe, set_, ckpt=ckpt, arch=arch, data=data, res=res, crop=crop)
    run = _run_name(name or f"{chosen.name}_sensitivity", chosen)

    from care_compress.study import run_sensitivity

    run_sensitivity(chosen, runs, run, images, Terminal())


@app.command()
def select(
    recipe: RecipeName,
    out: Annotated[Path, typer.Argument(help="the list to write, for quantize.calibrate.list")],
    method: Annotated[
        str | None, typer.Option(help="quantize.calibrate.method: random, stratified, diverse")
    ] = None,
    images: Annotated[int | None, typer.Option(help="quantize.calibrate.images")] = None,
    ckpt: Checkpoint = None,
    arch: ArchName = None,
    data: Source = None,
    res: Resolution = None,
    crop: Crop = None,
    set_: Override = None,
) -> None:
    """Choose calibration images of the training split and write them down."""
    chosen = _chosen(
        recipe,
        set_,
        ckpt=ckpt,
        arch=arch,
        data=data,
        res=res,
        crop=crop,
        method=method,
        images=images,
    )

    from care_compress.study import select_calibration

    select_calibration(chosen, out, Terminal())


@app.command()
def tune(
    target: Annotated[str, typer.Argument(help="openvino-cpu, onnxruntime-cpu")],
    run: Annotated[str, typer.Option(help="the run whose export is tuned")] = "int8_qat",
    images: Annotated[int, typer.Option(min=1, help="validation images for the drop")] = 512,
    max_drop: Annotated[float | None, typer.Option(min=0, help="points of top-1")] = None,
    again: Annotated[bool, typer.Option("--again", help="measure, whatever is known")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Find the placement that is fastest on this processor, and export it."""
    from care_compress.tuning import TuneOptions, run_tune

    options = TuneOptions(images, max_drop, again)
    run_tune(runs, plain_name(run), target, options, Terminal())


RunToDeploy = Annotated[str, typer.Option(help="the run whose exports are taken")]


@app.command()
def bundle(
    target: Annotated[str, typer.Argument(help="tensorrt-jetson-orin, openvino-cpu, ...")],
    run: RunToDeploy = "int8_qat",
    runs: Runs = Path("runs"),
) -> None:
    """Pack what a device needs to verify and measure the models, and a Jetson to build engines."""
    from care_compress.deploying import make_bundle

    make_bundle(runs, plain_name(run), target, Terminal())


@app.command()
def engine(
    target: Annotated[str, typer.Argument(help="tensorrt-gpu, tensorrt-jetson-orin, ...")],
    run: RunToDeploy = "int8_qat",
    runs: Runs = Path("runs"),
) -> None:
    """Build a target's engines here and verify them; needs its TensorRT and its GPU."""
    from care_compress.deploying import make_engine

    sys.exit(make_engine(runs, plain_name(run), target, Terminal()))


@app.command("import-results")
def import_results(
    file: Annotated[Path, typer.Argument(help="results.json of a device")],
    run: Annotated[str | None, typer.Option(help="the run it belongs to; the file says")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Merge what a device measured into the run that its bundle came from."""
    from care_compress.deploying import take_results

    take_results(file, runs, run, Terminal())


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show what this machine can export, build, run and measure."""
    from care_compress.doctor import run_doctor

    run_doctor(as_json=json)


@app.command()
def recipes(
    check: Annotated[bool, typer.Option(help="only validate every recipe and target")] = False,
) -> None:
    """List the recipes that ship."""
    from care_compress.target import all_targets

    loaded = [load_recipe(str(path)) for path in recipe_files()]
    targets = all_targets()
    console = Terminal()
    if not loaded:
        raise CareError(f"no recipe found in {RECIPES_DIR}.", "run from a full checkout")
    if check:
        from care_compress.model.checkpoint import resolve_checkpoint

        for recipe in loaded:
            if (recipe.model.checkpoint or "").startswith("builtin:"):
                resolve_checkpoint(str(recipe.model.checkpoint))
        console.print(f"{len(loaded)} recipes and {len(targets)} targets are valid")
        return
    table = Table("recipe", "precision", "claim")
    for recipe in loaded:
        table.add_row(recipe.name, recipe.precision, recipe.claim)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's error is one clear line and exit code 2."""
    # Read when torch loads, so before any verb runs. By default OpenMP threads wait by spinning for
    # milliseconds and hold the cores that decoding workers need (measured in LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    given = list(sys.argv[1:] if arguments is None else arguments)
    wanted = [argument for argument in given if argument != "--debug"]
    debug = wanted != given
    errors = Terminal(stderr=True, soft_wrap=True)
    try:
        with stops_in_order(errors), full_disks_named():
            # Alone on the line it prints its help, with --debug its own traceback is no use.
            code = app(wanted, standalone_mode=not wanted)
    except (CareError, DeployError, UsageError) as error:
        if debug and not isinstance(error, UsageError):
            raise
        errors.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        # Names in the message come from files; they are shown, never read as markup.
        errors.print(shortened(one_line(_told(error)), LONGEST_LINE), markup=False, highlight=False)
        sys.exit(2)
    sys.exit(code or 0)  # typer's own is 130, after Ctrl-C


def _told(error: Exception) -> str:
    """The message of an error; typer's say where to look it up."""
    if not isinstance(error, UsageError):
        return str(error)
    context = getattr(error, "ctx", None)
    verb = context.command_path if context is not None else "care-compress"
    message: str = error.format_message()  # type: ignore[attr-defined]
    return f"{message} Fix: see {verb} --help"
