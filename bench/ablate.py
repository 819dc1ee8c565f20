"""What each method buys: every one added and removed, on one checkpoint (`make bench WHAT=ablate`).

Each row is a recipe with overrides, run through the ordinary pipeline. Finished rows are kept in
``runs/ablate/<model>.json`` with their revision and not run again, so the table can be
interrupted; ``--report`` writes it into docs/RESULTS.md. On the included model, or with ``--ckpt
--data --res`` on any other; ``--set evaluate.images=4000`` makes it shorter, ``--ray [ADDRESS]``
makes rows side by side on Ray's workers.
"""

import argparse
import contextlib
import json
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from care_compress.evaluate.reference import MakeRuns
from care_compress.files import fingerprint, sha256_file, write_text
from care_compress.machine import git_revision
from care_compress.model.checkpoint import resolve_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.sweep.cluster import workers_at
from care_compress.sweep.runs import runs_on

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "RESULTS.md"
FOLDED = "rewrite.fold_norms=true"
PLAIN = (
    "quantize.prescale=trained",
    "quantize.equalize='off'",
    "quantize.bias_correction=false",
    "quantize.norm_reestimation=false",
)
NO_ROUNDING = "quantize.reconstruct=null"
UNTURNED = "quantize.hadamard=false"
TENSOR = "quantize.rules=[{weight: 8, input: {bits: 8, granularity: tensor}}, "
FLOATS = (
    "{role: residual_add, input: float}, {role: attention.kv, input: float}, "
    "{role: attention.out, input: float}"
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    what: str
    recipe: str
    overrides: tuple[str, ...] = ()


ROWS = (
    Row("W8A8", "control: norms folded, everything in 8 bits, min-max", "int8_naive"),
    Row("W8A8", "norms folded, attention and sums in float", "int8_ptq", (FOLDED, *PLAIN)),
    Row("W8A8", "norms kept as scale site, nothing else", "int8_ptq", PLAIN),
    Row("W8A8", "+ rescaling searched", "int8_ptq", PLAIN[2:]),
    Row("W8A8", "+ bias correction", "int8_ptq", PLAIN[3:]),
    Row("W8A8", "+ norm re-estimation = `int8_ptq`", "int8_ptq"),
    Row("W8A8", "the same, weights of all 8 bits", "int8_ptq", ("quantize.full_range=true",)),
    Row("W8A8", "without the scale site's rescaling", "int8_ptq", PLAIN[:1]),
    Row("W8A8", "without depthwise -> fc2 equalization", "int8_ptq", PLAIN[1:2]),
    Row("W8A8", "without bias correction", "int8_ptq", PLAIN[2:3]),
    Row("W8A8", "depthwise inputs per tensor", "int8_ptq", (f"{TENSOR}{FLOATS}]",)),
    Row("W8A8", "symmetric, one scale per tensor (TensorRT)", "int8_ptq",
        ("quantize.target=tensorrt-jetson-orin",)),
    Row("W8A8", "attention quantized, plain kv", "int8_ptq",
        ("quantize.rules=[{weight: 8, input: 8}, {role: residual_add, input: float}]",
         "quantize.covariance=false")),
    Row("W8A8", "attention quantized, covariance form", "int8_ptq",
        ("quantize.rules=[{weight: 8, input: 8}, {role: residual_add, input: float}]",)),
    Row("W8A8", "residual sums quantized too", "int8_ptq",
        ("quantize.rules=[{weight: 8, input: 8}, {role: 'attention.[ko]*', input: float}]",)),
    Row("W8A8", "random instead of stratified calibration images", "int8_ptq",
        ("quantize.calibrate.method=random",)),
    Row("W8A8", "diverse calibration images", "int8_ptq", ("quantize.calibrate.method=diverse",)),
    Row("W8A8", "64 calibration images", "int8_ptq", ("quantize.calibrate.images=64",)),
    Row("W8A8", "NNCF", "int8_ptq_nncf"),
    Row("W4A8", "norms folded, nothing tuned", "w4a8_ptq", (FOLDED, *PLAIN, NO_ROUNDING)),
    Row("W4A8", "norms kept, nothing else", "w4a8_ptq", (*PLAIN, NO_ROUNDING)),
    Row("W4A8", "+ rescaling, corrections", "w4a8_ptq", (NO_ROUNDING,)),
    Row("W4A8", "+ learned rounding = `w4a8_ptq`", "w4a8_ptq"),
    Row("W4A4", "norms folded, nothing tuned", "w4a4_ptq",
        (FOLDED, *PLAIN, NO_ROUNDING, UNTURNED)),
    Row("W4A4", "norms kept, nothing else", "w4a4_ptq", (*PLAIN, NO_ROUNDING, UNTURNED)),
    Row("W4A4", "+ rescaling, corrections", "w4a4_ptq", (NO_ROUNDING, UNTURNED)),
    Row("W4A4", "+ Hadamard rotation", "w4a4_ptq", (NO_ROUNDING,)),
    Row("W4A4", "+ learned rounding = `w4a4_ptq`", "w4a4_ptq"),
    Row("W4A4", "without Hadamard rotation", "w4a4_ptq", (UNTURNED,)),
    Row("trained", "`int8_qat`", "int8_qat"),
    Row("trained", "`w4a8_qat`", "w4a8_qat"),
    Row("trained", "`w4a4_qat`", "w4a4_qat"),
)  # fmt: skip


def main() -> None:
    """Run what is missing, then write the table if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt")
    parser.add_argument("--data")
    parser.add_argument("--res", type=int)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--group", action="append", help="only these groups of rows")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--report", action="store_true", help="write docs/RESULTS.md")
    parser.add_argument("--finished", action="store_true", help="run nothing more")
    parser.add_argument(
        "--ray", nargs="?", const="local", help="rows on Ray's workers: local, or an address"
    )
    options = parser.parse_args()
    given = {
        "model.checkpoint": options.ckpt,
        "data.source": options.data,
        "data.resolution": options.res,
    }
    values = {key: value for key, value in given.items() if value is not None}
    console = Console()
    name = Path(options.ckpt).stem if options.ckpt else "care_nano_shapes"
    store = options.runs / "ablate" / f"{name}.json"
    asked = [
        (row, load_recipe(row.recipe, (*row.overrides, *options.overrides), values))
        for row in ROWS
        if not options.group or row.group in options.group
    ]
    if options.finished:
        known = _done(store)
        asked = [(row, recipe) for row, recipe in asked if _key(recipe) in known]
    with workers_at(options.ray) as cluster:
        make_runs = in_one_folder if cluster is None else in_their_own(runs_on(cluster, run_recipe))
        found = measured(asked, store, make_runs, console)
    console.print(_table(found), markup=False, soft_wrap=True)
    if options.report:
        _write(name, found, asked[-1][1])


def measured(
    asked: Sequence[tuple[Row, Recipe]], store: Path, make_runs: MakeRuns, console: Console
) -> list[tuple[Row, dict[str, Any]]]:
    """Make the rows that are missing and keep each as it comes; return all that were asked for."""
    done, keyed = _done(store), [(row, recipe, _key(recipe)) for row, recipe in asked]
    missing = {f"row-{key}": recipe for _, recipe, key in keyed if key not in done}
    with contextlib.closing(make_runs(missing, store.parent)) as made:
        for row, _, key in keyed:
            if key not in done:
                console.print(f"{row.group}: {row.what}", markup=False)
                done[key] = _kept(next(made)[1])
                write_text(store, json.dumps(done, indent=1) + "\n")
    return [(row, done[key]) for row, _, key in keyed]


def in_one_folder(wanted: Mapping[str, Recipe], runs: Path) -> Generator[tuple[str, Any]]:
    """Make every row over the one before it: what does not differ is taken over."""
    for name, recipe in wanted.items():
        yield name, run_recipe(recipe, runs, "row", Console(quiet=True))


def in_their_own(make_runs: MakeRuns) -> MakeRuns:
    """Rows that are made at once have a folder each, until they are handed over."""

    def make(wanted: Mapping[str, Recipe], runs: Path) -> Generator[tuple[str, Any]]:
        with contextlib.closing(make_runs(wanted, runs)) as made:
            for name, results in made:
                shutil.rmtree(runs / name)
                yield name, results

    return make


def _done(store: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    return known


def _key(recipe: Recipe) -> str:
    """Everything that decides a row."""
    without: dict[str, Any] = {"name": True, "claim": True, "budget": True, "data": {"workers"}}
    content = recipe.model_dump(mode="json", exclude=without)
    assert recipe.model.checkpoint is not None
    return fingerprint([content, sha256_file(resolve_checkpoint(recipe.model.checkpoint))])


def _kept(results: dict[str, Any]) -> dict[str, Any]:
    seconds = results["seconds"]
    return {
        "float": results["float"]["top1"],
        **results["candidates"][results["kept"]],
        "kept": results["kept"],
        "date": str(datetime.now(UTC).date()),
        "revision": git_revision() or "unknown",
        "seconds": {name: seconds[name] for name in ("select", "ptq", "qat") if name in seconds},
    }


def _table(rows: list[tuple[Row, dict[str, Any]]]) -> str:
    lines = [
        "| | method | top-1 | drop [95 %] | same answer | logit SQNR | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, found in rows:
        low, high = found["drop_ci95"]
        noise = "exact" if found["sqnr_db"] is None else f"{found['sqnr_db']:.1f} dB"
        note = " (PTQ weights kept)" if row.group == "trained" and found["kept"] == "ptq" else ""
        lines.append(
            f"| {row.group} | {row.what}{note} | {found['top1']:.2f} % "
            f"| {found['drop']:.2f} [{low:.2f}, {high:.2f}] | {found['agreement']:.2f} % "
            f"| {noise} | {sum(found['seconds'].values()):.0f} |"
        )
    return "\n".join(lines)


def _write(name: str, rows: list[tuple[Row, dict[str, Any]]], recipe: Recipe) -> None:
    """Put this model's table into docs/RESULTS.md, in place of an older one of as many images."""
    first = rows[0][1]
    size = recipe.data.resolution
    heading = f"## {name}, {size}x{size}, {first['images']:,} images\n"
    dates = ", ".join(sorted({found["date"] for _, found in rows}))
    revisions = ", ".join(sorted({found["revision"][:7] for _, found in rows}))
    section = (
        f"{heading}\nFloat: {first['float']:.2f} % top-1. Measured {dates} at {revisions}; seconds "
        f"are those of selecting, PTQ and QAT.\n\n{_table(rows)}\n"
    )
    text = RESULTS.read_text(encoding="utf-8")
    before, _, rest = text.partition(heading)
    after = rest[rest.index("\n## ") + 1 :] if "\n## " in rest else ""
    RESULTS.write_text(before.rstrip() + "\n\n" + section + ("\n" + after if after else ""))


if __name__ == "__main__":
    main()
