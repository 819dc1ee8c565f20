"""What NVIDIA's compiler makes of every graph for TensorRT (`make bench WHAT=engines`), no GPU.

CARE at 224 with random weights, float16 and INT8 in every placement, compiled by TensorRT for RTX
for compute capability 8.6: its listing tells kernels and bytes (care_compress/device/kernels.py).
With ``--ckpt --data --res`` the same of a trained checkpoint, with what every placement loses. The
tables stand in docs/DEPLOY.md.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from material import Scale, finished, recipe_for
from rich.console import Console

from care_compress import machine
from care_compress.data.loader import BadImages
from care_compress.data.sources import open_samples
from care_compress.device.build import BuildOptions, build_engine
from care_compress.device.library import load_library
from care_compress.evaluate.agreement import compare_logits, hold_images
from care_compress.export.placements import place_models
from care_compress.export.result import About, Preprocessing
from care_compress.export.variants import Variants
from care_compress.files import temporary_folder, write_text
from care_compress.model.checkpoint import load_checkpoint
from care_compress.model.rewrite import rewrite
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.recipe.target import load_target
from care_compress.run.finished import read_run
from care_compress.runtime.on_onnxruntime import OnnxPredictor

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- begin: written by make bench WHAT=engines -->", "<!-- end: engines -->"
ARCHS = ("care_nano", "care_s0")
RESOLUTION = 224
CAPABILITY = "8.6"
TARGET = "tensorrt-jetson-orin"


def main() -> None:
    """Compile everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--res", type=int)
    parser.add_argument("--images", type=int, default=500, help="that placements are scored on")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    console, root = Console(), options.runs / "bench" / "engines"
    if options.ckpt is None:
        for arch in ARCHS:
            recipe = recipe_for("int8_ptq", Scale(arch, RESOLUTION), root, ["export.targets=[]"])
            run = finished(recipe, root / arch, "int8_ptq", console).path
            keep(arch, recipe, run, console, trained=False)
    else:
        values: dict[str, object] = {
            "model.checkpoint": str(options.ckpt),
            "data.source": options.data,
            "data.resolution": options.res,
            "data.crop_pct": 1.0,
            "evaluate.images": options.images,
            "export.images": options.images,
            "export.targets": [],
        }
        recipe = load_recipe("int8_ptq", [], values)
        name = f"{options.ckpt.stem}_{options.res}"
        console.print(f"running {recipe.name} into {root / name}", soft_wrap=True)
        run_recipe(recipe, root / name, "int8_ptq", Console(quiet=True))
        keep(name, recipe, root / name / "int8_ptq", console, trained=True)
    write_page()


def keep(name: str, recipe: Recipe, run: Path, console: Console, trained: bool) -> None:
    """Compile one network's graphs; their figures go to docs/performance."""
    found = {
        "name": name,
        "trained": trained,
        "resolution": recipe.data.resolution,
        "images": recipe.export.images,
        "library": f"TensorRT for RTX {machine.installed_versions()['tensorrt-rtx']}",
        "rows": rows_of(recipe, run, console),
    }
    write_text(DOCS / "performance" / f"engines_{name}.json", json.dumps(found, indent=1) + "\n")


def rows_of(recipe: Recipe, run: Path, console: Console) -> list[dict[str, Any]]:
    """One row for float16 and one for each placement."""
    target, data = load_target(TARGET), recipe.data
    samples = open_samples(data, "val")
    held = hold_images(samples, data, recipe.export.images, BadImages())
    about = About(recipe.name, "", tuple(samples.classes), Preprocessing.of(data))
    read = read_run(run)
    model = load_checkpoint(read.checked_checkpoint(), recipe.model.arch)
    rows: list[dict[str, Any]] = []
    with temporary_folder(run / "placements") as folder:

        def notify(text: str) -> None:
            console.print(f"{recipe.model.checkpoint}: {text}", markup=False, soft_wrap=True)

        network = rewrite(model, recipe.rewrite)
        variants = Variants(model, network, None, lambda: held, data, recipe.export)
        notify("float16")
        path = folder / "fp16.onnx"
        variants.baseline.write(path, about)
        near = compare_logits(variants.baseline.logits, held.logits(OnnxPredictor(path)))
        rows.append({"name": "fp16", "sqnr_db": near.sqnr_db, "drop": None, "edges": None,
                     **compiled(path, "fp16")})  # fmt: skip
        pixels = held.pixels_BCHW.numpy()
        for name, one in place_models(read, target, pixels, about, folder, notify).items():
            drop = [one.drop.value, one.drop.low, one.drop.high]
            rows.append({"name": name, "sqnr_db": one.agreement.sqnr_db, "drop": drop,
                         "edges": asdict(one.edges), **compiled(one.path, "int8")})  # fmt: skip
    return rows


def compiled(path: Path, precision: str) -> dict[str, Any]:
    """What the compiler says of a graph."""
    library = load_library("tensorrt_rtx")
    options = BuildOptions(precision, compute_capabilities=(CAPABILITY,))
    built = build_engine(library, path, options, lambda phase, done: None)
    assert built.moved is not None
    convolutions = [row for row in built.layers if row.type in ("correlation", "runtime_fusion")]
    wanted = [row for row in convolutions if row.precision == precision.upper()]
    return {
        "size_bytes": path.stat().st_size,
        "traffic": asdict(built.moved),
        "convolutions": len(wanted),
        "give": dict(sorted(Counter(row.output for row in wanted).items())),
    }


def write_page() -> None:
    """Put every network's table between the markers of docs/DEPLOY.md."""
    page = DOCS / "DEPLOY.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    stored = sorted((DOCS / "performance").glob("engines_*.json"))
    tables = [table_of(json.loads(path.read_text(encoding="utf-8"))) for path in stored]
    write_text(page, f"{before}{BEGIN}\n\n" + "\n".join(tables) + f"\n{END}{after}")


def table_of(found: dict[str, Any]) -> str:
    """One network's graphs as a Markdown table."""
    said = f", drop on {found['images']:,} validation images" if found["trained"] else ""
    drop_head = " drop [95 %] |" if found["trained"] else ""
    lines = [
        f"{found['name']} at {found['resolution']}, {found['library']}, compute capability "
        f"{CAPABILITY}{said}:",
        "",
        "| graph | file, MB | SQNR with its model, dB | kernels | constants, MB | activations, MB "
        "| convolutions in its type, and what they give | INT8 to INT8 | quantizers alone "
        f"| products move, MB |{drop_head}",
        "|---" * (11 if found["trained"] else 10) + "|",
    ]
    for row in found["rows"]:
        moved, edges = row["traffic"], row["edges"]
        gives = ", ".join(f"{count} {kind}" for kind, count in row["give"].items())
        cells = [
            f"`{row['name']}`",
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['sqnr_db']:.1f}",
            str(moved["kernels"]),
            f"{moved['constant_bytes'] / 1e6:.1f}",
            f"{moved['activation_bytes'] / 1e6:.1f}",
            f"{row['convolutions']}: {gives}",
            *(["", "", ""] if edges is None else [str(edges["integer"]), str(edges["alone"]),
              f"{edges['product_bytes'] / 1e6:.1f}"]),
        ]  # fmt: skip
        if found["trained"]:
            drop = row["drop"]
            cells.append("" if drop is None else f"{drop[0]:.2f} [{drop[1]:.2f}, {drop[2]:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
