"""What whole runs take in memory, beside what ``plan`` says of them (`make bench WHAT=memory`).

Each run is one of a shipped recipe, in a process of its own, on random weights; its memory is that
of it and of all that it starts, pages that they share counted once (PSS), looked at twenty times a
second. ``plan`` promises an upper bound: a ratio over 1 is a bug of its formula.
"""

import argparse
import multiprocessing
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from material import Scale, recipe_for
from rich.console import Console
from rich.table import Table

from care_compress import machine
from care_compress.files import json_text, write_text
from care_compress.libraries import settle_libraries
from care_compress.model.checkpoint import load_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.quantize.process_memory import RUN, memory_of
from care_compress.recipe.recipe import Recipe

EVERY = 0.05  # seconds
STEPS = ("quantize.qat.max_steps=4",)
CASES: tuple[tuple[str, int, str, tuple[str, ...]], ...] = (
    ("care_nano", 64, "int8_ptq", ()),
    ("care_nano", 224, "int8_ptq", ()),
    ("care_nano", 224, "int8_qat", STEPS),
    ("care_s0", 96, "int8_qat", STEPS),
    ("care_s0", 224, "int8_ptq", ()),
    ("care_s2", 224, "int8_ptq", ()),
)


def main() -> None:
    """Run every case, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", help="only cases of this size")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    table = Table(title="memory of whole runs", title_justify="left")
    for column in ("network", "side", "recipe", "plan (MB)", "peak (MB)", "peak / plan"):
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for arch, side, name, overrides in CASES:
        if options.arch and arch not in options.arch:
            continue
        console.print(f"running {name} on {arch} at {side}", markup=False)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            recipe = recipe_for(name, Scale(arch, side), root, overrides)
            assert recipe.model.checkpoint is not None
            planned = memory_of(recipe, load_checkpoint(recipe.model.checkpoint))[RUN].total
            peak = peak_of(recipe, root)
        said = {"arch": arch, "resolution": side, "recipe": name, "planned": planned, "peak": peak}
        rows.append(said)
        sizes = [f"{size / 1e6:,.0f}" for size in (planned, peak)]
        table.add_row(arch, str(side), name, *sizes, f"{peak / planned:.2f}")
    console.print(table)
    if options.json:
        about = {"cpu": machine.describe()["cpu"], "runs": rows}
        write_text(options.json, json_text(about, indent=1))


def peak_of(recipe: Recipe, root: Path) -> int:
    """The most that a run and its processes held at once, in bytes."""
    child = multiprocessing.get_context("spawn").Process(target=quietly, args=(recipe, root))
    child.start()
    assert child.pid is not None
    peak = 0
    while child.is_alive():
        peak = max(peak, held_by(child.pid))
        time.sleep(EVERY)
    if child.exitcode:
        raise SystemExit(f"{recipe.name} ended with exit code {child.exitcode}")
    return peak


def quietly(recipe: Recipe, root: Path) -> None:
    """Be the run, set as a verb sets it."""
    settle_libraries()
    run_recipe(recipe, root, "run", Console(quiet=True))


def held_by(pid: int) -> int:
    """Memory of a process and of all below it; what is shared is divided among them."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(pid)]
        family += family[0].children(recursive=True)
        for one in family:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                total += one.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()
