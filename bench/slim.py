"""What pruning loses and gains: every measure of importance, and top-1 over latency (`WHAT=slim`).

First a table in float without any healing: each way of choosing channels at several budgets, with
the refit and without it. Then INT8 files of the cut networks, timed in turns beside those of the
whole one, for each kind of processor. On the included model, or with ``--ckpt --data --res`` on any
other. ``--train RECIPE``, the one that trained the whole network, trains smaller ones from fresh
weights, too: what pruning has to beat. What is finished is kept in ``runs/bench`` and not made
again; the page is docs/RESULTS.md, the pictures lie beside it.
"""

import argparse
import json
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from performance_page import said_of_class
from rich.console import Console

from care_compress import machine
from care_compress.console import progress_bar
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.samples import spread_indices
from care_compress.data.sources import open_samples
from care_compress.evaluate.latency import LatencyPlan, measure_latency
from care_compress.files import fingerprint, sha256_file, write_text
from care_compress.model.care import Care
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.quantize.plots import save_figure
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.recipe.slim import SlimSection
from care_compress.run.finished import SLIM_CUT
from care_compress.runtime.on_openvino import unasked_precision
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.runtime.runners import open_runner
from care_compress.slim.cut import cut
from care_compress.slim.plan import cost_of, make_plan
from care_compress.slim.refit import refit
from care_compress.slim.stage import REFIT_BATCH, watched
from care_compress.tasks.classification import collect_answers

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- begin: written by make bench WHAT=slim -->", "<!-- end: slim -->"
# How channels are chosen: a measure of importance, and whether hidden numbers are held, too.
WAYS: dict[str, dict[str, object]] = {
    "magnitude": {"importance": "magnitude"},
    "module_aware": {"importance": "module_aware"},
    "taylor": {"importance": "taylor"},
    "reconstruct": {"importance": "reconstruct"},
    "reconstruct, hidden": {"importance": "reconstruct", "hidden": 0.9},
}
SHARES = (0.8, 0.7, 0.5, 0.35)
# Whose INT8 files are timed, at which shares, and how the picture shows them.
FILE_SHARES = (0.7, 0.5, 0.35)
FILES = {
    "reconstruct": ("#2a7f4f", "o-"),
    "reconstruct, hidden": ("#c0762c", "^-"),
    "magnitude": ("#999999", "s--"),
}
FRESH = (0.5,)  # whose widths are trained from fresh weights, too
FRESH_NAME, FRESH_LOOK = "trained so narrow", ("#8a4f9e", "v")
FLOAT = "whole, FP32"
CPU = torch.device("cpu")
TARGET = "openvino-cpu"


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default="builtin:care_nano_shapes")
    parser.add_argument("--data", default="builtin:shapes")
    parser.add_argument("--res", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000, help="validation images to score")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--train", help="recipe that trains smaller networks, too")
    parser.add_argument("--no-files", action="store_true", help="only the table in float")
    options = parser.parse_args()
    console = Console()
    name = Path(options.ckpt.removeprefix("builtin:")).stem
    root = options.runs / "bench" / f"slim_{name}_{options.res}"
    values: dict[str, object] = {
        "model.checkpoint": options.ckpt,
        "data.source": options.data,
        "data.resolution": options.res,
        "data.crop_pct": 1.0,
        "evaluate.images": options.images,
        "export.targets": [TARGET],
        "export.images": 64,
    }
    store = root / "slim.json"
    recipe = load_recipe("slim_int8_ptq", [], values)
    key = fingerprint(
        [values, sha256_file(resolve_checkpoint(options.ckpt)), machine.installed_versions()]
    )
    page = DOCS / "performance" / f"slim_{name}.json"
    published = json.loads(page.read_text())["files"] if page.is_file() else {}
    kept: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
    if kept.get("key") != key:
        kept = {"key": key, "name": name, "resolution": options.res, "float": {}, "files": {}}
    missing = [
        (way, share)
        for way, share in product(WAYS, SHARES)
        if f"{way} {share} refitted" not in kept["float"].get("rows", {})
    ]
    if missing:
        found = in_float(recipe, missing, console)
        found["rows"] = kept["float"].get("rows", {}) | found["rows"]
        kept |= {"date": str(datetime.now(UTC).date()), "float": found}
        write_text(store, json.dumps(kept, indent=1) + "\n")
    cpu = machine.read_machine().cpu
    kind = "without" if machine.dot_products_in("openvino") is False else "with"
    timed = kept["files"].get(kind, {})
    # Asked for or not, a network that was trained once stays in the table.
    train = options.train or timed.get("train")
    about = {"cpu": cpu.name, "train": train, "shares": list(FILE_SHARES)}
    if any(timed.get(name) != value for name, value in about.items()) and not options.no_files:
        about["date"] = str(datetime.now(UTC).date())
        kept["files"][kind] = about | {"rows": files(values, root, train, console)}
        write_text(store, json.dumps(kept, indent=1) + "\n")
    # What was measured on processors of the other kind stays beside it.
    told = kept | {"files": published | kept["files"]}
    write_text(page, json.dumps(told, indent=1) + "\n")
    write_page()


def in_float(
    recipe: Recipe, combinations: list[tuple[str, float]], console: Console
) -> dict[str, Any]:
    """Top-1 lost by ways of choosing at shares of the multiply-accumulates, nothing healed."""
    assert recipe.slim is not None and recipe.model.checkpoint is not None
    model, data = load_checkpoint(recipe.model.checkpoint), recipe.data
    train, val = open_samples(data, "train"), open_samples(data, "val")
    bad = BadImages()
    seen = watched(recipe, recipe.slim, model, train, CPU, bad, console)
    means = {place: one.mean_H for place, one in seen.items()}
    indices = spread_indices(len(train), recipe.slim.images)
    loaded = prepared_batches(train, data, REFIT_BATCH, bad=bad, indices=indices)
    images = [batch.images for batch in loaded]
    models: dict[str, torch.nn.Module] = {"whole": model}
    cost = cost_of(model, "macs", data.resolution)
    with progress_bar(console, "cutting", len(combinations)) as advance:
        for way, share in combinations:
            asked = {"budget": {"macs": share}, **WAYS[way]}
            section = SlimSection.model_validate_json(json.dumps(asked))
            plan = make_plan(model, section, seen, cost)
            models[f"{way} {share} cut"] = cut(model, plan.kept, means)
            narrow = cut(model, plan.kept, means)
            refit(narrow, model, images, lambda blocks: None)
            models[f"{way} {share} refitted"] = narrow
            advance(1)
    predict = {name: TorchPredictor(one, model.num_classes, CPU) for name, one in models.items()}
    indices = spread_indices(len(val), recipe.evaluate.images)
    batches = prepared_batches(val, data, 64, bad=bad, indices=indices)
    with progress_bar(console, "scoring", len(indices)) as advance:
        baseline = dict.fromkeys(predict, "whole")
        found = collect_answers(predict, baseline, batches, advance).answers
    rows = {}
    for name, answers in found.items():
        drop = found["whole"].drop_to(answers)
        rows[name] = {"top1": answers.top1, "drop": [drop.value, drop.low, drop.high]}
    return {"images": len(found["whole"].right), "rows": rows}


def files(
    values: dict[str, object], root: Path, train: str | None, console: Console
) -> list[dict[str, Any]]:
    """Accuracy of INT8 files, and their latency beside each other."""
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {
        FLOAT: ("fp32", ()),
        "whole, INT8": ("int8_ptq", ()),
    }
    for way, share in product(FILES, FILE_SHARES):
        chosen = {"hidden": None, **WAYS[way]}
        changed = (f"slim.{name}={json.dumps(value)}" for name, value in chosen.items())
        wanted[f"{way} {share}"] = ("slim_int8_ptq", (f"slim.budget.macs={share}", *changed))
    found, paths = {}, {}

    def make(name: str, recipe: Recipe) -> None:
        console.print(f"making {name}", markup=False)
        run = folder_of(name)
        made = run_recipe(recipe, root, run, Console(quiet=True))
        found[name] = made
        export = made["exports"][TARGET]["models"][made["precision"]]
        paths[name] = root / run / "exports" / TARGET / export["file"]

    for name, (recipe, settings) in wanted.items():
        make(name, load_recipe(recipe, settings, values))
    for share, recipe in product(FRESH, (train,) if train else ()):
        console.print(f"training {share} from fresh weights", markup=False)
        slimmed = root / folder_of(f"reconstruct {share}") / SLIM_CUT
        trained = train_narrow(load_checkpoint(slimmed), recipe, values, root, share)
        narrow = values | {"model.checkpoint": str(trained)}
        make(f"{FRESH_NAME} {share}", load_recipe("int8_ptq", (), narrow))
    size = int(str(values["data.resolution"]))
    image, precision = torch.randn(1, 3, size, size), unasked_precision()
    runs = {
        name: open_runner(path, image, 1, "f32" if name == FLOAT else precision).run
        for name, path in paths.items()
    }
    if precision != "f32":  # the same file, as OpenVINO runs it here unasked
        name = f"whole, {precision.upper()}"
        found[name] = found[FLOAT]
        runs[name] = open_runner(paths[FLOAT], image, 1, precision).run
    console.print("timing in turns")
    timed = measure_latency(runs, 1, LatencyPlan(seconds=1.0, least_runs=40, warmup=3))
    return [
        {
            "name": name,
            "top1": made["accuracy"]["top1"],
            "macs": made["rewrites"][0]["macs"],
            "ms": timed[name].percentiles()["p50"],
            "over_int8": timed[name].speedup_over(timed["whole, INT8"]),
        }
        for name, made in found.items()
    ]


def folder_of(name: str) -> str:
    """The run of a row."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def train_narrow(
    narrow: Care, train: str, values: dict[str, object], root: Path, share: float
) -> Path:
    """Train a network of the widths of a slimmed one from fresh weights, as the whole was."""
    run, start = folder_of(f"fresh {share}"), root / f"fresh_{share}.safetensors"
    torch.manual_seed(0)
    fresh = Care(narrow.arch, narrow.num_classes, widths=narrow.widths)
    save_checkpoint(fresh, start, {})
    data = {name: value for name, value in values.items() if name.startswith("data.")}
    recipe = load_recipe(train, (), {**data, "model.checkpoint": str(start)})
    run_recipe(recipe, root, run, Console(quiet=True))
    return root / run / "float" / "model.safetensors"


def write_page() -> None:
    """Put every checkpoint's tables between the markers of docs/RESULTS.md."""
    page = DOCS / "RESULTS.md"
    text = page.read_text(encoding="utf-8")
    parts = []
    for path in sorted((DOCS / "performance").glob("slim_*.json")):
        found = json.loads(path.read_text())
        parts.append(table_of(found))
        for kind, timed in sorted(found["files"].items()):
            picture = path.with_name(f"{path.stem}_{kind}_dot_products.svg")
            plot(timed["rows"], picture)
            parts += [
                files_table(timed, kind),
                f"![top-1 over latency](performance/{picture.name})\n",
            ]
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(page, f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}")


def table_of(found: dict[str, Any]) -> str:
    """What one checkpoint loses in float, as Markdown."""
    table, heads = found["float"], [f"{100 * share:.0f} %" for share in SHARES]
    rows = table["rows"]
    lines = [
        f"### {found['name']} at {found['resolution']}",
        "",
        f"{found['date']}, float, {table['images']:,} validation images, nothing healed; points "
        f"lost against {rows['whole']['top1']:.2f} % with so many of the multiply-accumulates:",
        "",
        f"| chosen by | then | {' | '.join(heads)} |",
        "|---" * (len(SHARES) + 2) + "|",
    ]
    for way, then in product(WAYS, ("cut", "refitted")):
        if f"{way} {SHARES[-1]} {then}" not in rows:  # a way that is newer than what was measured
            continue
        drops = [rows[f"{way} {share} {then}"]["drop"] for share in SHARES]
        cells = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in drops]
        lines.append(f"| {way} | {then} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def files_table(timed: dict[str, Any], kind: str) -> str:
    """The files of one checkpoint, timed on one kind of processor, as Markdown."""
    lines = [
        f"{timed['date']}, files in OpenVINO, one image, one thread, in turns on {timed['cpu']} "
        f"({said_of_class(kind == 'with')}):",
        "",
        "| file | top-1 | MACs (M) | ms (p50) | faster than INT8 of the whole [95 %] |",
        "|---|---|---|---|---|",
    ]
    for one in timed["rows"]:
        value, low, high = one["over_int8"]
        lines.append(
            f"| {one['name']} | {one['top1']:.2f} % | {one['macs'] / 1e6:.1f} "
            f"| {one['ms']:.2f} | {value:.2f}x [{low:.2f}, {high:.2f}] |"
        )
    return "\n".join([*lines, ""])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Top-1 over latency: a curve for each way of choosing, the whole network as points."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for way, (colour, style) in FILES.items():
        names = [f"{way} {share}" for share in SHARES]
        points = [(one["ms"], one["top1"]) for one in rows if one["name"] in names]
        if points:
            label = f"INT8, cut by {way}"
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
    fresh = [(one["ms"], one["top1"]) for one in rows if one["name"].startswith(FRESH_NAME)]
    if fresh:
        colour, marker = FRESH_LOOK
        label = f"INT8, {FRESH_NAME} from fresh weights"
        axes.plot(*zip(*fresh, strict=True), marker, color=colour, label=label)
    for one in rows:
        if one["name"].startswith("whole"):
            axes.plot(one["ms"], one["top1"], "D", color="#3b6ea5")
            # BF16 lies close to INT8: their names go to opposite sides.
            below = not one["name"].endswith("BF16")
            axes.annotate(one["name"], (one["ms"], one["top1"]), xytext=(6, -12 if below else 6),
                          textcoords="offset points")  # fmt: skip
    axes.set_xlabel("ms of one image, one thread, OpenVINO")
    axes.set_ylabel("top-1 %, without healing")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
