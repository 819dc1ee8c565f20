"""What compare drew of the answers that changed, on the page: images, and both answers to each."""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from care_compress.evaluate.differences import FOLDER, KINDS, SHOWN
from care_compress.files import read_whole
from care_compress.report.blocks import Block, Panel, Panels, SideBySide
from care_compress.tasks.task import Task

MOST = 8_000_000  # bytes of one picture, which is of 640 pixels
QUALITY = 82  # of the JPEG that the page holds: a picture is some 50 kB


@dataclass(frozen=True)
class ChangedImage:
    """One image with both answers, as data URIs in the order of `KINDS`."""

    name: str
    agreement: float
    pictures: tuple[str, ...]


def read_pictures(run_dir: Path, compare: dict[str, Any]) -> list[ChangedImage]:
    """Read the pictures that compare.json names; one that is not what was drawn is left out.

    They are decoded and written anew: a file that somebody put there gets no further.
    """
    found = []
    for one in (compare.get("pictures") or {}).get("images", [])[:SHOWN]:
        try:
            pictures = tuple(_embedded(run_dir, one["pictures"][kind]) for kind in KINDS)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        found.append(ChangedImage(str(one["name"]), float(one["agreement"]), pictures))
    return found


def _embedded(run_dir: Path, about: dict[str, str]) -> str:
    path = run_dir / FOLDER / Path(about["file"]).name
    content = read_whole(path, MOST)
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError("another picture")
    with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
        written = io.BytesIO()
        picture.convert("RGB").save(written, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


def differences(task: Task, compare: dict[str, Any], images: Sequence[ChangedImage]) -> list[Block]:
    """Show them, the most changed first."""
    about = compare["pictures"]
    before, after = about["baseline"], about["candidate"]
    pair = next(
        pair
        for pair in compare["pairs"]
        if (pair["target"], pair["candidate"]) == (about["target"], after)
    )
    shown = []
    for one in images:
        note = f"{one.agreement:.1f} % of {task.same.things} the same"
        labels = "image", before, after
        told = (
            one.name,
            f"{one.name} as {before} answers",
            f"{one.name} as {after} answers: {note}",
        )
        panels = [Panel(*each) for each in zip(labels, one.pictures, told, strict=True)]
        shown.append(Panels(one.name, note, panels))
    every = pair["changed_in_all"]
    caption = f"Where {after} differs most from {before} on {about['target']}"
    note = f"{len(shown)} of {every:,} images to which the answers are not the same."
    legend = {
        name: swatch(colour)
        for name, colour in about["legend"].items()
        if re.fullmatch("#[0-9a-f]{6}", colour)
    }
    return [SideBySide(caption, shown, legend, note)]


def swatch(colour: str) -> Markup:
    """Draw a colour as it stands in a legend."""
    return Markup(  # nosec B704 # the colour was checked to be one
        '<svg class="key" width="14" height="14" aria-hidden="true">'
        f'<rect width="14" height="14" rx="3" fill="{colour}"/></svg>'
    )
