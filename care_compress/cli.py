"""The command line: ``care-compress quantize int8_qat``. Only verbs; the work is elsewhere.

Heavy imports stand inside the verbs, so that ``--help`` and ``doctor`` answer at once.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from care_compress.console import Terminal, one_line, shortened
from care_compress.device.problems import DeployError
from care_compress.errors import CareError
from care_compress.libraries import settle_libraries
from care_compress.recipe.recipe import (
    RECIPES_DIR,
    Recipe,
    load_recipe,
    parse_section,
    plain_name,
    recipe_files,
)
from care_compress.recipe.sections import DataSection
from care_compress.shipped import VERSION, install_command
from care_compress.signals import full_disks_named, stops_in_order

LONGEST_LINE = 2000  # letters of an error; a path can be longer
# What typer raises for a verb or an option that does not exist. It brings click along or uses the
# one installed, depending on its version, and names the class in neither case.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# The options that change a recipe: the key each sets, its type, and what its help says of the key.
RECIPE_OPTIONS: dict[str, tuple[str, type, str]] = {
    "method": ("quantize.calibrate.method", str, ": random, stratified, diverse"),
    "images": ("quantize.calibrate.images", int, ""),
    "ckpt": ("model.checkpoint", str, ": file, builtin:NAME, hf-hub:owner/name"),
    "arch": ("model.arch", str, "; inferred if left out"),
    "data": ("data.source", str, ": folder, zip, hf:, wds:"),
    "res": ("data.resolution", int, ""),
    "crop": ("data.crop_pct", float, ""),
    "skip_bad_images": ("data.skip_bad_images", bool, ": count them and go on"),
    "val_fraction": ("data.val_fraction", float, ""),
}

# What several verbs ask for.
# Not --run: torchrun would take that for an abbreviation of its own --run-path.
RunName = Annotated[str | None, typer.Option(help="run name; the recipe's if left out")]
Runs = Annotated[Path, typer.Option(help="where run directories live")]
RunToDeploy = Annotated[str, typer.Option(help="the run whose exports are taken")]
GivenRun = Annotated[str, typer.Argument(help="a run's name")]
Targets = Annotated[str | None, typer.Option(help="names, separated by commas")]
ImagesOnly = Annotated[int | None, typer.Option(min=1, help="N evenly spaced images only")]
MaxDrop = Annotated[float | None, typer.Option(min=0, help="points of top-1, mIoU or mAP50")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable")]
OnRay = Annotated[
    str | None, typer.Option(help="on Ray's workers: local, or the address of a cluster")
]
JsonFile = Annotated[Path | None, typer.Option(help="also write the numbers here")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    """Print the version and end, before a verb is asked for."""
    if wanted:
        typer.echo(f"care-compress {VERSION}")
        raise typer.Exit


@app.callback()
def of_all_verbs(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="show it")
    ] = False,
) -> None:
    """Make a float CARE Transformer small and fast on edge devices.

    --debug, anywhere, shows the traceback of an error.
    """


def on_a_recipe(*options: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hand a verb the `Recipe` that its user names and changes by these options and ``--set``."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def run(recipe: str, set_: list[str] | None, **given: Any) -> None:
            values = {RECIPE_OPTIONS[name][0]: given.pop(name) for name in options}
            chosen = {key: value for key, value in values.items() if value is not None}
            verb(load_recipe(recipe, set_ or [], chosen), **given)

        # typer reads the command line off the signature: a name and options in the recipe's place.
        asked: list[tuple[str, object, object]] = [
            ("recipe", str, typer.Argument(help="name of a shipped recipe, or a .yaml file"))
        ]
        for name in options:
            key, kind, more = RECIPE_OPTIONS[name]
            flag = f"--{name.replace('_', '-')}"
            asked.append((name, kind | None, typer.Option(None, flag, help=key + more)))
        override = typer.Option(None, "--set", help="section.key=value, repeatable")
        asked.append(("set_", list[str] | None, override))
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(name, keyword, default=how, annotation=kind)
            for name, kind, how in asked
        ]
        _, *own = inspect.signature(verb).parameters.values()
        parameters += [one.replace(kind=keyword) for one in own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


@app.command()
@on_a_recipe("ckpt", "arch", "data", "res", "crop", "skip_bad_images", "val_fraction")
def quantize(
    recipe: Recipe,
    name: RunName = None,
    runs: Runs = Path("runs"),
    repair: Annotated[
        bool, typer.Option("--repair", help="make again what was damaged since it was written")
    ] = False,
    ray: OnRay = None,
) -> None:
    """Run a recipe from its float model to results; what is there and still holds is kept."""
    run = plain_name(name or recipe.name)

    if ray is not None and (recipe.quantize is None or recipe.quantize.search is None):
        raise CareError(
            f"{recipe.name} searches no bits, and --ray shares out nothing else of a run.",
            "leave --ray out; care-compress sweep shares runs out",
        )

    from care_compress.pipeline import run_recipe
    from care_compress.sweep.cluster import workers_at

    with workers_at(ray) as cluster:
        if cluster is None:
            run_recipe(recipe, runs, run, Terminal(), repair)
            return

        from care_compress.sweep.sites import noises_on

        measure = noises_on(cluster, runs / run, recipe.rewrite)
        run_recipe(recipe, runs, run, Terminal(), repair, measure=measure)


@app.command()
@on_a_recipe("ckpt", "arch", "data", "res", "crop")
def plan(
    recipe: Recipe,
    target: Annotated[
        str | None, typer.Option(help="as exported to this one, by its own rules too")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what a recipe makes of every layer, and which rule decided; only slim needs images."""
    from care_compress.preflight import show_plan

    show_plan(recipe, target, json, Terminal())


@app.command()
@on_a_recipe("ckpt", "arch", "data", "res", "crop")
def sensitivity(
    recipe: Recipe,
    images: Annotated[int, typer.Option(min=1, help="validation images per measurement")] = 256,
    name: RunName = None,
    runs: Runs = Path("runs"),
    ray: OnRay = None,
) -> None:
    """Measure which site costs accuracy: each quantized alone, and each left alone out."""
    run = plain_name(name or f"{recipe.name}_sensitivity")

    from care_compress.pipeline import run_sensitivity
    from care_compress.sweep.cluster import workers_at

    with workers_at(ray) as cluster:
        if cluster is None:
            run_sensitivity(recipe, runs, run, images, Terminal())
            return

        from care_compress.sweep.sites import sites_on

        run_sensitivity(recipe, runs, run, images, Terminal(), sites_on(cluster, runs / run))


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="name of a shipped sweep, or a .yaml file")],
    address: Annotated[
        str | None,
        typer.Option(help="of a Ray cluster, or auto; RAY_ADDRESS, or here, if left out"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="name the trials, run none")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="make again what was damaged since it was written")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="folder in runs; the sweep's if left out")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Run many recipes on Ray and show the best; exit code 0 if one is within every budget."""
    from care_compress.sweep.sections import read_sweep

    asked = read_sweep(file)
    if name is not None:
        asked = asked.model_copy(update={"name": plain_name(name)})

    from care_compress.pipeline import run_recipe
    from care_compress.sweep.driver import SweepOptions, run_sweep

    options = SweepOptions(address, dry_run, repair)
    sys.exit(run_sweep(asked, runs, options, run_recipe, Terminal()))


@app.command()
@on_a_recipe("method", "images", "ckpt", "arch", "data", "res", "crop")
def select(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(help="the list to write, for quantize.calibrate.list")],
) -> None:
    """Choose calibration images of the training split and write them down."""
    from care_compress.quantize.selection import select_calibration

    select_calibration(recipe, out, Terminal())


@app.command()
def tune(
    target: Annotated[str, typer.Argument(help="openvino-cpu, onnxruntime-cpu")],
    run: Annotated[str, typer.Option(help="the run whose export is tuned")] = "int8_qat",
    images: Annotated[int, typer.Option(min=1, help="training images for the drop")] = 512,
    max_drop: MaxDrop = None,
    again: Annotated[bool, typer.Option("--again", help="measure, whatever is known")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Find the placement that is fastest on this processor, and export it."""
    from care_compress.export.tune import TuneOptions, run_tune

    options = TuneOptions(images, max_drop, again)
    run_tune(runs, plain_name(run), target, options, Terminal())


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
def publish(
    run: GivenRun,
    folder: Annotated[Path, typer.Argument(help="a new folder, ready for hf upload")],
    license_: Annotated[
        str, typer.Option("--license", help="apache-2.0, mit, ... as the Hub names it; other:NAME")
    ],
    license_file: Annotated[
        Path | None, typer.Option(help="the licence's text; known for apache-2.0")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="owner/name of the float model; that of hf-hub: is known")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="owner/name of the images; that of hf: is known")
    ] = None,
    targets: Targets = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write a run's files and a model card into a folder for the Hugging Face Hub."""
    from care_compress.export.publish import PublishOptions
    from care_compress.export.publish import publish as write_folder

    wanted = None if targets is None else tuple(targets.split(","))
    options = PublishOptions(license_, license_file, base_model, dataset, wanted)
    write_folder(runs, plain_name(run), folder, options, Terminal())


@app.command()
def doctor(json: AsJson = False) -> None:
    """Show what this machine can export, build, run and measure."""
    from care_compress.runtime.doctor import run_doctor

    run_doctor(as_json=json)


@app.command()
def init(
    ckpt: Annotated[str | None, typer.Option(help="file or builtin:NAME")] = None,
    data: Annotated[str | None, typer.Option(help="folder, zip, hf:, wds:")] = None,
    res: Annotated[int | None, typer.Option(help="input resolution")] = None,
    base: Annotated[str | None, typer.Option(help="the shipped recipe to start from")] = None,
    target: Annotated[str | None, typer.Option(help="openvino-cpu, onnxruntime-cpu, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="the recipe to write")] = None,
    crop: Annotated[float | None, typer.Option(help="crop ratio; 0.9 if left out")] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="of images that are not divided; 0.1 if left out")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="file with the model's classes, one per line")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="ask nothing, take what is suggested")] = False,
    force: Annotated[bool, typer.Option("--force", help="write over the file")] = False,
) -> None:
    """Ask for checkpoint, images and target, try them, and write a recipe of your own."""
    from care_compress.newrecipe import Given, write_recipe

    given = Given(ckpt, data, res, base, target, out, crop, val_fraction, classes)
    write_recipe(given, yes, force, Terminal())


@app.command()
def recipes(
    check: Annotated[bool, typer.Option(help="only validate every recipe and target")] = False,
    copy: Annotated[
        Path | None, typer.Option(help="copy recipes and targets to this folder, as a start")
    ] = None,
) -> None:
    """List the recipes that ship."""
    if copy is not None:
        from care_compress.newrecipe import copy_recipes

        copy_recipes(copy, Terminal())
        return

    from care_compress.recipe.target import all_targets

    loaded = [load_recipe(str(path)) for path in recipe_files()]
    targets = all_targets()
    console = Terminal()
    if not loaded:
        raise CareError(
            f"no recipe found in {RECIPES_DIR}.", f"install it again: {install_command()}"
        )
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


@app.command()
def accuracy(
    artifact: Annotated[
        str, typer.Argument(help="checkpoint, builtin:, hf-hub:, .onnx, .xml, .engine")
    ],
    data: Annotated[str, typer.Option(help="folder, zip, hf:, wds: or builtin: source")],
    res: Annotated[int, typer.Option(help="input resolution")],
    crop: Annotated[float, typer.Option(help="crop ratio; 1.0 for no crop")] = 0.875,
    images: ImagesOnly = None,
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
    ray: OnRay = None,
) -> None:
    """Measure the accuracy of one artifact on the validation images of a source."""
    values = {
        "source": data,
        "resolution": res,
        "crop_pct": crop,
        "skip_bad_images": skip_bad_images,
    }
    section = parse_section(DataSection, values, set_ or [], "the command line")

    from care_compress.evaluate.scoring import measure_artifact
    from care_compress.sweep.cluster import workers_at

    with workers_at(ray) as cluster:
        shared = None
        if cluster is not None:
            from care_compress.sweep.scores import scores_on

            shared = scores_on(cluster)
        measure_artifact(artifact, section, images, batch, json, Terminal(), shared)


@app.command()
def latency(
    artifact: Annotated[
        str, typer.Argument(help=".onnx, .xml, .engine, checkpoint, builtin:, hf-hub:")
    ],
    batch: Annotated[str, typer.Option(help="images at once, separated by commas")] = "1,8",
    threads: Annotated[
        str | None, typer.Option(help="separated by commas; one and all if left out")
    ] = None,
    precision: Annotated[
        Literal["f32", "bf16", "f16"] | None,
        typer.Option(help="what OpenVINO may round floats to; its own choice"),
    ] = None,
    res: Annotated[
        int | None, typer.Option(min=32, max=4096, help="where the file leaves it open")
    ] = None,
    json: JsonFile = None,
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
    targets: Targets = None,
    images: ImagesOnly = None,
    json: JsonFile = None,
    max_drop: MaxDrop = None,
    min_speedup: Annotated[float | None, typer.Option(min=0, help="over the first model")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=100, help="percent of answers as the first model's")
    ] = None,
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
    options = CompareOptions(wanted, images, json, max_drop, min_speedup, min_agreement, section)
    found = run_compare(models, runs, options, run_recipe, Terminal())
    if report and found.models[-1].run is not None:
        write_report(found.models[-1].run, Terminal())
    sys.exit(0 if found.holds else 1)


@app.command()
def gate(
    run: GivenRun,
    baseline: Annotated[Path, typer.Option(help="the compare.json it is held against")],
    max_drop: Annotated[
        float | None, typer.Option(min=0, help="points of top-1, mIoU or mAP50; 0.3 if left out")
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option(min=0, help="percent of latency beside the float model's; 10 if left out"),
    ] = None,
    max_size: Annotated[
        float | None, typer.Option(min=0, help="percent of bytes; 2 if left out")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="also write the checks here, as XML")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Hold a compared run against a stored comparison; exit code 1 if it became worse."""
    from care_compress.evaluate.gate import GateOptions, run_gate

    given = {"max_drop": max_drop, "max_slowdown": max_slowdown, "max_size": max_size}
    options = GateOptions(**{key: value for key, value in given.items() if value is not None})
    sys.exit(run_gate(runs, plain_name(run), baseline, options, junit, Terminal()))


@app.command()
def fidelity(
    run: GivenRun,
    targets: Targets = None,
    images: Annotated[int, typer.Option(min=1, help="N evenly spaced validation images")] = 16,
    json: JsonFile = None,
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
    ray: OnRay = None,
) -> None:
    """Check that recipes still give the accepted top-1 and size; exit code 1 if one drifted."""
    from care_compress.evaluate.reference import REFERENCE_FILE, one_by_one, run_reference
    from care_compress.pipeline import run_recipe
    from care_compress.sweep.cluster import workers_at

    with workers_at(ray) as cluster:
        make_runs = one_by_one(run_recipe)
        if cluster is not None:
            from care_compress.sweep.runs import runs_on

            make_runs = runs_on(cluster, run_recipe)
        code = run_reference(recipes or [], accepted or REFERENCE_FILE, runs, make_runs, Terminal())
    sys.exit(code)


@app.command()
def report(run: GivenRun = "int8_qat", runs: Runs = Path("runs")) -> None:
    """Write report.html and report.md of a finished run."""
    from care_compress.report.write import write_report

    write_report(runs / plain_name(run), Terminal())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's error is one clear line and exit code 2."""
    settle_libraries()
    given = list(sys.argv[1:] if arguments is None else arguments)
    wanted = [argument for argument in given if argument != "--debug"]
    debug = wanted != given
    for place in reversed(range(len(wanted))):  # its address may be left out
        if wanted[place] == "--ray" and (wanted[place + 1 :] or ["-"])[0].startswith("-"):
            wanted.insert(place + 1, "local")
    errors = Terminal(stderr=True, soft_wrap=True)
    try:
        with stops_in_order(errors), full_disks_named():
            # Alone on the line it prints its help, with --debug its own traceback is no use.
            code = app(wanted, standalone_mode=not wanted)
    except (CareError, DeployError, UsageError) as error:
        told = str(error)
        if isinstance(error, UsageError):  # typer's messages do not say where to look it up
            context = getattr(error, "ctx", None)
            verb = context.command_path if context is not None else "care-compress"
            told = f"{error.format_message()} Fix: see {verb} --help"  # type: ignore[attr-defined]
        elif debug:
            raise
        errors.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        # Names in the message come from files; they are shown, never read as markup.
        errors.print(shortened(one_line(told), LONGEST_LINE), markup=False, highlight=False)
        sys.exit(2)
    sys.exit(code or 0)  # typer's own is 130, after Ctrl-C
