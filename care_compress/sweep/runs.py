"""Whole runs on Ray's workers: what `reference` and `make bench WHAT=ablate` make before they read.

A run is a trial of nobody's sweep: it lies where one made here would lie, and has its bits. One
that was killed, or whose node was lost, goes on from what it left.
"""

import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from care_compress.evaluate.reference import MakeRuns
from care_compress.files import temporary_folder, write_text
from care_compress.recipe.recipe import Recipe
from care_compress.sweep.cluster import Cluster
from care_compress.sweep.pieces import in_pieces
from care_compress.sweep.tasks import MARK, Place, Work, patiently, pipeline_digest

Wanted = tuple[str, Recipe]


def runs_on(cluster: Cluster, work: Work) -> MakeRuns:
    """Return what makes runs on the workers of a cluster and hands them back in order."""

    def make(wanted: Mapping[str, Recipe], runs: Path) -> Generator[tuple[str, Any]]:
        runs, left, early = runs.absolute(), iter(wanted), dict[str, Mapping[str, Any]]()
        with temporary_folder(runs / "trials") as folder:
            mark = uuid.uuid4().hex
            write_text(folder / MARK, mark)
            place = Place(folder, Path.cwd(), mark, pipeline_digest())
            name = next(left, None)
            for (made, _), results in in_pieces(
                cluster, make_run, (place, runs, work), wanted.items(), lambda one: one[0]
            ):
                early[made] = results
                while name in early:
                    yield name, early.pop(name)
                    name = next(left, None)

    return make


def make_run(place: Place, runs: Path, work: Work, wanted: Wanted) -> Mapping[str, Any]:
    """Make one run, on a node; its results, as they stand in ``results.json``."""
    place.enter()
    name, recipe = wanted
    return patiently(lambda: work(recipe, runs, name, Console(quiet=True), False, None))
