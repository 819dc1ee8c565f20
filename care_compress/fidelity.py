"""``care-compress fidelity RUN``: where, on the way to each file, fidelity is lost."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from care_compress.boards import measured_on_boards
from care_compress.data.loader import BadImages
from care_compress.data.sources import check_classes, open_samples
from care_compress.evaluate.images import hold_images
from care_compress.evaluate.ladder import climb
from care_compress.evaluate.ladder_tables import rung_table, site_table
from care_compress.figures import json_text
from care_compress.finished import find_run
from care_compress.progress import step_line
from care_compress.run import sha256_file, write_text
from care_compress.rungs import Ladder
from care_compress.target import load_target
from care_compress.terminal import Terminal

WIDTH = 150  # of the tables
DEVICE_HAS_NO_SITES = "a device gives logits only"


def run_fidelity(
    runs: Path,
    name: str,
    targets: tuple[str, ...] | None,
    images: int,
    json_file: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Climb, print, write ``fidelity.json``."""
    run = find_run(runs, name)
    for target in targets or ():
        load_target(target)  # a misspelt one is an error
    samples = open_samples(run.recipe.data, "val")
    with step_line(console) as notify:
        notify("loading every form of the model")
        ladder = Ladder(run, targets)
        ladder.build()
        check_classes(samples, ladder.classes)
        held = hold_images(samples, run.recipe.data, images, BadImages())
        steps = climb(ladder.rungs, held.batches(1), notify)
    value = {
        "run": name,
        "results_sha256": sha256_file(run.path / "results.json"),
        "images": len(held.labels),
        "data": {**run.recipe.data.model_dump(mode="json"), "samples": samples.fingerprint()},
        "rungs": [
            *(step.as_json() for step in steps),
            *_boards(ladder),
            *(absent.as_json() for absent in ladder.gone),
        ],
    }
    wide = Terminal(file=console.file, width=max(console.width, WIDTH), quiet=console.quiet)
    wide.print(rung_table(value))
    wide.print(site_table(value))
    for absent in ladder.gone:
        text = f"{absent.name}: {absent.why}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for path in filter(None, (run.path / "fidelity.json", json_file)):
        write_text(path, json_text(value, indent=1))
        console.print(f"written to {escape(str(path))}", soft_wrap=True)
    return value


def _boards(ladder: Ladder) -> list[dict[str, Any]]:
    """What devices measured on the samples of their bundles, beside their simulation's logits."""
    before = {target: rung.before for rung in ladder.rungs for target in rung.targets}
    precision = ladder.run.recipe.precision
    rows = []
    for board in measured_on_boards(ladder.run.path):
        target = board["target"]
        of = f"engine of {target}" if load_target(target).is_engine else f"file for {target}"
        accuracy = board["models"].get(precision, {}).get("accuracy")
        if accuracy is not None and target in before:
            rows.append(
                {
                    "rung": f"{of} on {board['board']['name']}",
                    "before": before[target],
                    "targets": [target],
                    "sqnr_db": accuracy["sqnr_db"],
                    "to_float_db": None,
                    "same_percent": accuracy["agreement"],
                    "same_as_float_percent": None,
                    "parts_at": None,
                    "sites": {},
                    "note": f"{DEVICE_HAS_NO_SITES}; on {accuracy['images']} images, by the board",
                }
            )
    return rows
