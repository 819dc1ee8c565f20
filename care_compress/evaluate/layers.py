"""``care-compress layers FILE``: where one file spends its time, in which precision."""

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from care_compress.console import widened
from care_compress.errors import TargetError
from care_compress.files import json_text, write_text
from care_compress.runtime.layer_times import GROUPS, Profile
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.probe import probe
from care_compress.runtime.profile import profile_layers, read_engine_profile

SHOWN = 25
USUAL_SIZE = 224  # of images, where a file takes any
WIDTH = 150


def show_layers(
    path: Path, resolution: int | None, precision: str, json_file: Path | None, console: Console
) -> Profile:
    """Profile a file on one image and one thread; print its slowest layers and the sums."""
    if not os.path.isfile(path):
        raise TargetError(f"{path} is not a file.", "give an .onnx, an .xml or an .engine file")
    probe(path, resolution)
    if path.suffix == ".engine":
        profile = read_engine_profile(path)
    else:
        size = resolution or _size_of(path)
        image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        profile = profile_layers(path, image, 1, precision)
    shown = sorted(profile.layers, key=lambda layer: -(layer.ms or 0.0))[:SHOWN]
    count = len(profile.layers)
    title = f"The {len(shown)} slowest of {count} layers of {path.name}, batch 1, 1 thread"
    if not profile.is_timed:
        title = f"The first {len(shown)} of {count} layers of {path.name}"
    table = Table(title=escape(title), title_justify="left")
    for column in ("layer", "kind", "enters as"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in shown:
        name = layer.sites[0] if layer.sites else layer.name
        share = profile.share(layer)
        table.add_row(
            *map(escape, (name, layer.kind, layer.precision)),
            "" if layer.ms is None else f"{layer.ms:.3f}",
            "" if share is None else f"{100 * share:.1f} %",
        )
    wide = widened(console, WIDTH)
    wide.print(table)
    sums = {path.name: {**profile.as_json(), "available": True}}
    wide.print(kind_table(f"By kind, {path.name}", sums))
    if (moved := profile.traffic) is not None:
        activations, constants = moved["activation_bytes"] / 1e6, moved["constant_bytes"] / 1e6
        console.print(
            f"{moved['kernels']} kernels; {activations:.1f} MB of activations read and written, "
            f"{constants:.1f} MB of constants read, for one run",
            highlight=False,
        )
    if not profile.is_timed:
        console.print("precisions only: an engine's layers are timed on its own GPU, not here")
    if json_file is not None:
        value = {"file": str(path), "floats_in": precision, **profile.as_json()}
        write_text(json_file, json_text(value, indent=1))
    return profile


def _size_of(path: Path) -> int:
    """Return the height that the file was exported for."""
    if path.suffix == ".xml":
        height = OpenVinoPredictor(path).shape[2]
        return USUAL_SIZE if height.is_dynamic else int(height.get_length())
    if path.suffix != ".onnx":
        raise TargetError(f"{path} is no file of a runtime.", "give an .onnx, .xml or .engine file")
    found = OnnxPredictor(path).input.shape[2]
    return found if isinstance(found, int) else USUAL_SIZE


def kind_table(title: str, models: dict[str, dict[str, Any]]) -> Table:
    """Show sums by kind, each model beside the others; of those that tell."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("kind", no_wrap=True)
    told = {name: one for name, one in models.items() if one.get("by_kind")}
    for name in told:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for group in GROUPS:
        cells = []
        for one in told.values():
            ms, share, layers = (one["by_kind"][group][key] for key in ("ms", "share", "layers"))
            cells.append(f"{layers} layers" if ms is None else f"{ms:.3f} ms {100 * share:3.0f} %")
        table.add_row(group, *cells)
    whole = [one["layers_ms"] for one in told.values()]
    table.add_row("all", *("" if ms is None else f"{ms:.3f} ms" for ms in whole), style="bold")
    return table
