"""The command line: ``care-compress quantize int8_qat``. Only verbs; the work is elsewhere.

Heavy imports stand inside the verbs, so that ``--help`` and ``doctor`` answer at once.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from care_compress.console import Terminal, one_line, shortened
from care_compress.device.problems import DeployError
from care_compress.errors import CareError
from care_compress.recipe.recipe import (
    RECIPES_DIR,
    Recipe,
    load_recipe,
    parse_section,
    recipe_files,
)
from care_compress.recipe.sections import DataSection
from care_compress.signals import full_disks_named, stops_in_order

RecipeName = Annotated[str, typer.Argument(help="name of a shipped recipe, or a .yaml file")]
Checkpoint = Annotated[str | None, typer.Option(help="model.checkpoint: file or builtin:NAME")]
ArchName = Annotated[str | None, typer.Option(help="model.arch; inferred if left out")]
Source = Annotated[str | None, typer.Option(help="data.source: folder, zip, hf:, wds:")]
Resolution = Annotated[int | None, typer.Option(help="data.resolution")]
Crop = Annotated[float | None, typer.Option(help="data.crop_pct")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad-images", help="data.skip_bad_images: count them and go on")
]
ValFraction = Annotated[float | None, typer.Option(help="data.val_fraction")]
Override = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable")]
# Not --run: torchrun would take that for an abbreviation of its own --run-path.
RunName = Annotated[str | None, typer.Option(help="run name; the recipe's if left out")]
LONGEST_NAME = 128  # bytes; files beside a run are named after it
Precision = Literal["f32", "bf16", "f16"]
Runs = Annotated[Path, typer.Option(help="where run directories live")]


def plain_name(run: str) -> str:
    """A run's name, if it leads nowhere else and any file system takes it."""
    plain = run.isprintable() and 0 < len(os.fsencode(run)) <= LONGEST_NAME
    if not plain or Path(run).name != run or run.startswith("."):
        raise CareError(
            f"{shortened(repr(run))} is no run name.",
            "use a plain name, and --runs for the folder",
        )
    return run


app = typer.Typer(
    help="Make a float CARE Transformer small and fast on edge devices. "
    "--debug, anywhere, shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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

    from care_compress.preflight import show_plan

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

    from care_compress.pipeline import run_sensitivity

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

    from care_compress.quantize.selection import select_calibration

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
    from care_compress.export.tune import TuneOptions, run_tune

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
    from care_compress.export.deploy import make_bundle

    make_bundle(runs, plain_name(run), target, Terminal())


@app.command()
def engine(
    target: Annotated[str, typer.Argument(help="tensorrt-gpu, tensorrt-jetson-orin, ...")],
    run: RunToDeploy = "int8_qat",
    runs: Runs = Path("runs"),
) -> None:
    """Build a target's engines here and verify them; needs its TensorRT and its GPU."""
    from care_compress.export.deploy import make_engine

    sys.exit(make_engine(runs, plain_name(run), target, Terminal()))


@app.command("import-results")
def import_results(
    file: Annotated[Path, typer.Argument(help="results.json of a device")],
    run: Annotated[str | None, typer.Option(help="the run it belongs to; the file says")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Merge what a device measured into the run that its bundle came from."""
    from care_compress.export.deploy import take_results

    take_results(file, runs, run, Terminal())


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show what this machine can export, build, run and measure."""
    from care_compress.runtime.doctor import run_doctor

    run_doctor(as_json=json)


@app.command()
def recipes(
    check: Annotated[bool, typer.Option(help="only validate every recipe and target")] = False,
) -> None:
    """List the recipes that ship."""
    from care_compress.recipe.target import all_targets

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


@app.command()
def accuracy(
    artifact: Annotated[str, typer.Argument(help="checkpoint, builtin:NAME, .onnx, .xml, .engine")],
    data: Annotated[str, typer.Option(help="folder, zip, hf:, wds: or builtin: source")],
    res: Annotated[int, typer.Option(help="input resolution")],
    crop: Annotated[float, typer.Option(help="crop ratio; 1.0 for no crop")] = 0.875,
    images: Annotated[int | None, typer.Option(min=1, help="N evenly spaced images only")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="images at once; 16 on a CPU, 256 on a GPU")
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="count them and go on")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="other data keys: mean=[0.5,0.5,0.5]")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="also write the numbers here; resumes if interrupted")
    ] = None,
) -> None:
    """Measure top-1 and top-5 of one artifact on the validation images of a source."""
    values = {
        "source": data,
        "resolution": res,
        "crop_pct": crop,
        "skip_bad_images": skip_bad_images,
    }
    section = parse_section(DataSection, values, set_ or [], "the command line")

    from care_compress.evaluate.scoring import measure_artifact

    measure_artifact(artifact, section, images, batch, json, Terminal())


@app.command()
def latency(
    artifact: Annotated[str, typer.Argument(help=".onnx, .xml, .engine, checkpoint, builtin:NAME")],
    batch: Annotated[str, typer.Option(help="images at once, separated by commas")] = "1,8",
    threads: Annotated[
        str | None, typer.Option(help="separated by commas; one and all if left out")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="what OpenVINO may round floats to; its own choice")
    ] = None,
    res: Annotated[
        int | None, typer.Option(min=32, max=4096, help="where the file leaves it open")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="also write the numbers here")] = None,
) -> None:
    """Time one artifact: latency, throughput, load time, peak memory, size; and the machine."""
    batches = _counts("--batch", batch)
    counts = None if threads is None else _counts("--threads", threads)

    from care_compress.evaluate.latency import SpeedOptions, measure_speed

    measure_speed(artifact, SpeedOptions(batches, counts, precision, res, json), Terminal())


def _counts(option: str, text: str) -> tuple[int, ...]:
    """``1,8`` as numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,5}", part) for part in parts):
        raise CareError(f"{option} {text!r} is no list of positive numbers.", f"write {option} 1,8")
    return tuple(dict.fromkeys(int(part) for part in parts))


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(help="baseline, then others: runs, recipes, precisions (fp32 int8), files"),
    ],
    targets: Annotated[str | None, typer.Option(help="names, separated by commas")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="N evenly spaced images only")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the numbers here")] = None,
    max_drop: Annotated[float | None, typer.Option(min=0, help="points of top-1")] = None,
    min_speedup: Annotated[float | None, typer.Option(min=0, help="over the first model")] = None,
    data: Annotated[str | None, typer.Option(help="for bare files: their images")] = None,
    res: Annotated[int, typer.Option(help="for bare files: their resolution")] = 224,
    crop: Annotated[float, typer.Option(help="for bare files: their crop ratio")] = 0.875,
    report: Annotated[bool, typer.Option(help="write report.html of the last run, too")] = True,
    runs: Runs = Path("runs"),
) -> None:
    """Accuracy and latency side by side on every target; exit code 0 if every budget holds."""
    section = None
    if data is not None:
        values = {"source": data, "resolution": res, "crop_pct": crop}
        section = parse_section(DataSection, values, [], "the command line")

    from care_compress.evaluate.compare import run_compare
    from care_compress.evaluate.comparison import CompareOptions
    from care_compress.pipeline import run_recipe
    from care_compress.report.write import write_report

    wanted = None if targets is None else tuple(targets.split(","))
    options = CompareOptions(wanted, images, json, max_drop, min_speedup, section)
    found = run_compare(models, runs, options, run_recipe, Terminal())
    if report and found.models[-1].run is not None:
        write_report(found.models[-1].run, Terminal())
    sys.exit(0 if found.holds else 1)


@app.command()
def fidelity(
    run: Annotated[str, typer.Argument(help="a run's name")],
    targets: Annotated[str | None, typer.Option(help="names, separated by commas")] = None,
    images: Annotated[int, typer.Option(min=1, help="N evenly spaced validation images")] = 16,
    json: Annotated[Path | None, typer.Option(help="also write the numbers here")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Follow a run from the float model to each file: what every step loses, and where."""
    from care_compress.evaluate.fidelity import run_fidelity

    wanted = None if targets is None else tuple(targets.split(","))
    run_fidelity(runs, plain_name(run), wanted, images, json, Terminal())


@app.command()
def layers(
    file: Annotated[Path, typer.Argument(help="an .onnx, .xml or .engine file, anyone's")],
    res: Annotated[
        int | None, typer.Option(min=1, max=4096, help="input resolution; the file's own")
    ] = None,
    precision: Annotated[
        Literal["f32", "bf16"], typer.Option(help="what OpenVINO may round floats to")
    ] = "f32",
    json: Annotated[Path | None, typer.Option(help="also write every layer here")] = None,
) -> None:
    """Show what a runtime makes of a file: its layers, their precision and their time."""
    from care_compress.evaluate.layers import show_layers

    show_layers(file, res, precision, json, Terminal())


@app.command()
def reference(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="some of its recipes; all if left out")
    ] = None,
    accepted: Annotated[
        Path | None, typer.Option(help="accepted values; eval/reference.yaml if left out")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Check that recipes still give the accepted top-1 and size; exit code 1 if one drifted."""
    from care_compress.evaluate.reference import REFERENCE_FILE, run_reference
    from care_compress.pipeline import run_recipe

    file = accepted or REFERENCE_FILE
    sys.exit(run_reference(recipes or [], file, runs, run_recipe, Terminal()))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="a run's name")] = "int8_qat",
    runs: Runs = Path("runs"),
) -> None:
    """Write report.html and report.md of a finished run."""
    from care_compress.report.write import write_report

    write_report(runs / plain_name(run), Terminal())
