"""The verbs that measure: accuracy, latency, comparison, fidelity, layers, reference, report."""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from care_compress.errors import CareError
from care_compress.recipe import parse_section
from care_compress.sections import DataSection
from care_compress.terminal import Terminal
from care_compress.verb_options import (
    Precision,
    Runs,
    plain_name,
)

app = typer.Typer()


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

    from care_compress.evaluate.speed import SpeedOptions, measure_speed

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

    from care_compress.comparing import run_compare
    from care_compress.comparison import CompareOptions

    wanted = None if targets is None else tuple(targets.split(","))
    options = CompareOptions(wanted, images, json, max_drop, min_speedup, section, report=report)
    sys.exit(run_compare(models, runs, options, Terminal()))


@app.command()
def fidelity(
    run: Annotated[str, typer.Argument(help="a run's name")],
    targets: Annotated[str | None, typer.Option(help="names, separated by commas")] = None,
    images: Annotated[int, typer.Option(min=1, help="N evenly spaced validation images")] = 16,
    json: Annotated[Path | None, typer.Option(help="also write the numbers here")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Follow a run from the float model to each file: what every step loses, and where."""
    from care_compress.fidelity import run_fidelity

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
    from care_compress.reference import REFERENCE_FILE, run_reference

    sys.exit(run_reference(recipes or [], accepted or REFERENCE_FILE, runs, Terminal()))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="a run's name")] = "int8_qat",
    runs: Runs = Path("runs"),
) -> None:
    """Write report.html and report.md of a finished run."""
    from care_compress.report.write import write_report

    write_report(runs / plain_name(run), Terminal())
