"""Options that several verbs of the command line share."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from care_compress.errors import CareError
from care_compress.terminal import shortened

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
