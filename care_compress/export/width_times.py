"""What a hidden channel costs in time: a latency budget asks the clock of the target.

The whole network is exported at a few widths, as the recipe will export it, and every file is
profiled in turns on one image and one thread. An interaction's time is that of the layers that were
made of it; between the widths it is interpolated. Times of single layers do not add up to a latency
to the last percent: `compare` measures what came out.
"""

import statistics
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from care_compress import machine
from care_compress.console import progress_bar
from care_compress.data.loader import BadImages
from care_compress.errors import RecipeError
from care_compress.evaluate.agreement import HeldImages, hold_images
from care_compress.export.result import About, Preprocessing
from care_compress.export.stage import placed
from care_compress.export.variants import Variants
from care_compress.files import fingerprint, json_text, read_json, temporary_folder, write_text
from care_compress.model.care import Care
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import save_quantized
from care_compress.quantize.ptq import PtqJob, quantize_network
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.slim import SlimSection
from care_compress.recipe.target import Target, load_target
from care_compress.run.stages import code_digest
from care_compress.runtime.on_openvino import unasked_precision
from care_compress.runtime.profile import profile_layers
from care_compress.slim.cut import cut
from care_compress.slim.places import Place, find_places
from care_compress.slim.plan import Cost, check_budget
from care_compress.tasks.known import labelled

SHARES = (1.0, 0.75, 0.5, 0.25)  # of every width; and the narrowest one
TURNS = 5  # of profiles; the median counts
SECONDS = 0.3  # of each
IMAGES = 8
FOLDER = ".width_times"  # in the folder of runs


def check_timed(recipe: Recipe, section: SlimSection) -> None:
    """Refuse a clock that is not here, and a network that another backend will make."""
    name = section.target
    target = load_target(name)
    if recipe.quantize is not None and recipe.quantize.backend == "nncf":
        raise RecipeError(
            "slim.budget.latency times our own INT8 network, and backend nncf makes another.",
            "give a budget of macs",
        )
    if target.device != "cpu" or target.runtime not in ("openvino", "onnxruntime"):
        raise RecipeError(
            f"slim.budget.latency asks for times on {name}, which cannot be measured here.",
            "give slim.target openvino-cpu or onnxruntime-cpu, or a budget of macs",
        )


def timing(recipe: Recipe, runs: Path, console: Console) -> Callable[[Care], Cost]:
    """Return what measures the widths of a network; `runs` is where times are kept."""

    def latency(model: Care) -> Cost:
        return width_times(recipe, runs, console, model)

    return latency


def width_times(recipe: Recipe, runs: Path, console: Console, model: Care) -> Cost:
    """Measure what every width costs in milliseconds; what was measured here before is kept."""
    section = recipe.slim
    assert section is not None
    places = tuple(find_places(model))
    key = _key(recipe, section, model)
    file = runs / FOLDER / f"{model.arch}-{section.target}-{key[:12]}.json"
    if file.is_file():
        kept = read_json(file)
    else:
        kept = _measured(recipe, section, model, places, runs, console)
        write_text(file, json_text(kept, indent=1))
    table = {
        name: [(0, 0.0), *((int(width), float(ms)) for width, ms in row)]
        for name, row in kept["places"].items()
    }
    cost = Cost("ms", kept["total_ms"], lambda place, width: _at(table[place.name], width), places)
    check_budget(section, cost)
    return cost


def _measured(
    recipe: Recipe,
    section: SlimSection,
    model: Care,
    places: tuple[Place, ...],
    runs: Path,
    console: Console,
) -> dict[str, Any]:
    target = placed(load_target(section.target, recipe.full_range), recipe)
    samples = labelled(recipe, "train")
    held = hold_images(samples, recipe.data, IMAGES, BadImages())
    shares = (*SHARES, 0.0)
    widths = [
        {place: _narrowed(place, share, section.multiple) for place in places} for share in shares
    ]
    with (
        temporary_folder(runs / FOLDER / recipe.name) as folder,
        progress_bar(console, f"timing widths on {section.target}", len(shares) * 2) as advance,
    ):
        files = []
        for number, one in enumerate(widths):
            narrow = cut(model, {place: range(width) for place, width in one.items()})
            files.append(_exported(narrow, recipe, target, held, folder / f"{number}"))
            advance(1)
        image, precision = next(held.batches(1)), unasked_precision()
        times: list[list[dict[str, float]]] = [[] for _ in files]
        for _ in range(TURNS):
            for found, path in zip(times, files, strict=True):
                found.append(_by_place(path, image, precision, places))
        advance(len(shares))
    totals = [statistics.median(one["all"] for one in found) for found in times]
    table = {
        place.name: sorted(
            {
                one[place]: statistics.median(turn[place.name] for turn in found)
                for one, found in zip(widths, times, strict=True)
            }.items()
        )
        for place in places
    }
    return {"total_ms": totals[0], "places": table}


def _narrowed(place: Place, share: float, multiple: int) -> int:
    """A width that the plan may choose, near a share of the whole."""
    if share == 1.0:
        return place.channels
    return min(place.channels, max(multiple, round(share * place.channels / multiple) * multiple))


def _exported(narrow: Care, recipe: Recipe, target: Target, held: HeldImages, folder: Path) -> Path:
    """The network as the recipe exports it, but hardly tuned: that changes no time."""
    folder.mkdir()
    compact, kept = rewrite(narrow, recipe.rewrite), None
    resolution, quantize = recipe.data.resolution, recipe.quantize
    if quantize is not None and quantize.backend == "torchao":
        quick = _quick(quantize)
        job = PtqJob(compact, resolution, recipe.seed, lambda: held.batches(IMAGES))
        kept = folder / "model.safetensors"
        save_quantized(quantize_network(job, quick).model, quick, recipe.rewrite, kept)
    variants = Variants(narrow, compact, kept, lambda: held, recipe.data, recipe.export)
    path = folder / f"model{'.xml' if target.runtime == 'openvino' else '.onnx'}"
    prepared = Preprocessing.of(recipe.data)
    about = About(recipe.name, "", (), prepared, input=recipe.export.input)
    variants.of(target).write(path, about)
    return path


def _quick(section: QuantizeSection) -> QuantizeSection:
    """The same operations without what only accuracy asks for."""
    off = {"norm_reestimation": False, "bias_correction": False, "reconstruct": None}
    plain = {"qat": None, "search": None, "prescale": 0.5, "equalize": 0.5}
    return section.model_copy(update={**off, **plain})


def _by_place(
    path: Path, image_BCHW: torch.Tensor, precision: str, places: tuple[Place, ...]
) -> dict[str, float]:
    """Milliseconds of every place, and of all layers."""
    prefixes = {
        f"stages.{place.stage}.blocks.{place.block}.inter_layer.{place.branch}": place.name
        for place in places
    }
    profile = profile_layers(path, image_BCHW, 1, precision, seconds=SECONDS)
    found = dict.fromkeys(prefixes.values(), 0.0)
    latest: dict[str, str] = {}  # the place under way, by its block
    for layer in profile.layers:  # in the order they run
        site = layer.sites[0] if layer.sites else layer.name
        prefix = next((prefix for prefix in prefixes if prefix in site), None)
        inter = site.partition("inter_layer.")[0]
        if prefix is not None:
            latest[inter] = prefixes[prefix]
            found[prefixes[prefix]] += layer.ms or 0.0
        elif "inter_layer.activation" in site and inter in latest:
            # Both halves share one GELU, which runs behind the first 1x1 of its own.
            found[latest[inter]] += layer.ms or 0.0
    return {**found, "all": profile.total_ms}


def _at(row: list[tuple[int, float]], width: int) -> float:
    """Milliseconds at a width, between those that were measured."""
    place = bisect_left([known for known, _ in row], width)
    if place < len(row) and row[place][0] == width:
        return row[place][1]
    (low, before), (high, after) = row[max(0, place - 1)], row[min(place, len(row) - 1)]
    if low == high:
        return before
    return before + (after - before) * (width - low) / (high - low)


def _key(recipe: Recipe, section: SlimSection, model: Care) -> str:
    """Equal only where measuring again would find the same."""
    quantize = recipe.quantize and recipe.quantize.model_dump(mode="json", exclude={"qat"})
    return fingerprint(
        {
            "task": model.task,
            "arch": model.arch,
            "classes": model.num_classes,
            "resolution": recipe.data.resolution,
            "rewrite": recipe.rewrite.model_dump(mode="json"),
            "quantize": quantize,
            "export": recipe.export.model_dump(mode="json", exclude={"targets", "images"}),
            "target": load_target(section.target).model_dump(mode="json"),
            "multiple": section.multiple,
            "processor": machine.read_machine().cpu.kind,
            "libraries": dict(machine.installed_versions()),
            "care-compress": code_digest(__name__),
        }
    )
