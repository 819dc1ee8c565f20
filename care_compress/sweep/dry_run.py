"""``care-compress sweep --dry-run``: the trials and what each takes; nothing runs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from care_compress.console import say, shortened
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.preflight import model_of
from care_compress.quantize.process_memory import RUN, ProcessMemory, memory_of
from care_compress.sweep.sections import Sweep
from care_compress.sweep.trials import Search, axes_of

LISTED = 200  # trials that a plan names


def show_plan(sweep: Sweep, search: Search, console: Console) -> None:
    """Name the trials; nothing is written and no worker starts."""
    varied = [key for key, axis in axes_of(sweep).items() if key == "recipe" or len_of(axis) != 1]
    memory = f"memory: at most about {heaviest(search)} for a trial"
    if search.waits:
        say(f"{sweep.name}: {search.total:,} trials, each chosen by those before it", console)
        say(memory, console)
        return
    table = Table("run", *varied, title=f"{sweep.name}: {search.total:,} trials")
    for trial in search.shown[:LISTED]:
        table.add_row(trial.name, *(shortened(str(trial.point[key]), 40) for key in varied))
    console.print(table, markup=False)
    if search.total > LISTED:
        say(f"and {search.total - LISTED:,} more", console)
    if search.shown:
        say(f"the first alone: {search.shown[0].command}", console)
        say(memory, console)


def len_of(axis: Any) -> int:
    """How many values an axis has; a range has any number of them."""
    return len(axis) if isinstance(axis, Sequence) else 0


def heaviest(search: Search) -> ProcessMemory:
    """What the trial takes that takes most, of those that are named."""
    networks: dict[str, CompactCare] = {}
    found = []
    for trial in search.shown[:LISTED]:
        recipe = trial.recipe
        said = recipe.model_dump_json(include={"task", "model", "rewrite"})
        if said not in networks:
            networks[said] = rewrite(model_of(recipe), recipe.rewrite)
        found.append(memory_of(recipe, networks[said])[RUN])
    return max(found, key=lambda one: one.total)
