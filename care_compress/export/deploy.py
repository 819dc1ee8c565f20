"""From a finished run to a device and back: bundles, engines built in place, results imported."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape

from care_compress.console import step_line
from care_compress.data.samples import spread_indices
from care_compress.device.answers import ANSWERS
from care_compress.device.cpu_app import FLOAT
from care_compress.errors import ExportError, RunError, TargetError
from care_compress.evaluate.agreement import (
    MOST_DB,
    TWICE_DB,
    HeldImages,
    compare_answers,
)
from care_compress.evaluate.device_measurements import counted_threads, import_results
from care_compress.evaluate.readback import answers_beside
from care_compress.export.bundle import BundleContent, Model, unpack_bundle, write_bundle
from care_compress.export.placements import PlacedModel, place_models, show_placements
from care_compress.export.result import About, Preprocessing
from care_compress.export.to_onnx import FIX, FREE, INPUT, OUTPUT
from care_compress.export.variants import CPU, Variants
from care_compress.files import digest_of, model_files, read_json, sha256_file, temporary_folder
from care_compress.model.checkpoint import load_checkpoint
from care_compress.model.predictor import answers
from care_compress.model.rewrite import rewrite
from care_compress.recipe.sections import RewriteSection
from care_compress.recipe.target import Target, load_target
from care_compress.run.finished import FinishedRun, as_written, find_run
from care_compress.runtime.artifact import open_predictor
from care_compress.shipped import QUANTIZE

# The least of any file on a CPU, where floats may run in bfloat16.
LEAST_SQNR_DB = 20.0
# An engine may have twice the noise of what its file promised.
ENGINE_DB = 3.0
SYSTEM_PYTHON = "/usr/bin/python3"


def make_bundle(runs: Path, run: str, target_name: str, console: Console) -> Path:
    """Pack what a device needs into ``runs/<run>/bundles/``."""
    find_run(runs, run)  # it may bring a target of its own
    target = load_target(target_name)
    if not target.is_bundled:
        raise TargetError(
            f"no bundle is made for {target_name}: its files run where OpenVINO has that device.",
            "use openvino-cpu, onnxruntime-cpu or a tensorrt target, or copy runs/RUN/exports",
        )
    content = bundle_content(runs / run, run, target)
    path = runs / run / "bundles" / f"{run}-{target.name}.tar.gz"
    finished = find_run(runs, run)
    if target.is_engine and target.placements and finished.kept is not None:
        with temporary_folder(path) as folder:
            with step_line(console) as notify:
                found = placed(content, finished, target, folder, notify)
                write_bundle(with_placements(content, found).fitting, path)
        show_placements(found, console)
    elif target.is_engine or FLOAT in content.models:
        write_bundle(content.fitting, path)
    else:
        with temporary_folder(path) as folder, step_line(console) as notify:
            notify("exporting the float model, which the other has to beat")
            write_bundle(with_float(content, finished, target, folder).fitting, path)
    console.print(f"{escape(str(path))}  {path.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
    console.print(f"sha256 {sha256_file(path)}", highlight=False)
    verbs = "tune (or build, verify, bench)" if target.is_engine else "verify, bench"
    console.print(
        f"On the device: tar xf, then python3 care_deploy.py {verbs}; then here: "
        "care-compress import-results results.json"
    )
    return path


def make_engine(runs: Path, run: str, target_name: str, console: Console) -> int:
    """Build the engines of a target on this machine, verify them and return the exit code.

    By the bundle's own script, so that what is proven here is what goes to other boards.
    """
    find_run(runs, run)
    target = load_target(target_name)
    if not target.is_engine:
        raise TargetError(
            f"{target_name} needs no engine: its file runs as it is.",
            "use tensorrt-jetson-orin, tensorrt-jetson-thor, tensorrt-gpu or tensorrt-rtx",
        )
    bundle = make_bundle(runs, run, target_name, console)
    folder = unpack_bundle(bundle, runs / run / "engines")
    python = _python_with(target.runtime)
    for verb in ("build", "verify"):
        code = subprocess.call([python, str(folder / "care_deploy.py"), verb])
        if code:
            return code
    console.print(f"engines: {escape(str(folder))}", soft_wrap=True)
    return 0


def take_results(file: Path, runs: Path, run: str | None, console: Console) -> None:
    """Merge what a device measured into the run it belongs to."""
    if not run:
        run = _parsed(file).get("run")
        if not isinstance(run, str) or Path(run).name != run or not run:
            raise RunError(f"{file} names no run.", "give results.json of a device, or --run")
    where = runs / run
    if not os.path.isdir(where):  # Path.is_dir raises for a name that is too long
        raise RunError(f"there is no run {where}.", "name it with --run, or its folder with --runs")
    results = import_results(file, where)
    board = results["board"]["name"]
    for name, engine in results["models"].items():
        speed, accuracy = engine["speed"], engine["accuracy"]
        parts = [] if speed is None else [f"p50 {speed['latency_ms']['p50']:.3f} ms"]
        if speed is not None and "threads" in speed:
            parts[0] += f" on {counted_threads(speed['threads'])}"
        if accuracy is not None:
            verdict = "" if accuracy["passed"] else " (FAILED verify)"
            parts.append(f"{accuracy['agreement']:.1f} % of answers as exported{verdict}")
        console.print(
            f"{name} on {board}: {', '.join(parts) or 'built'}", markup=False, highlight=False
        )
    console.print(f"merged into {escape(str(where / 'measured'))}", soft_wrap=True)


def bundle_content(run_dir: Path, run: str, target: Target) -> BundleContent:
    """What a bundle of this run for this target holds."""
    folder = run_dir / "exports" / target.name
    if not (folder / "export.json").is_file():
        raise RunError(
            f"run {run} has no export for {target.name}.",
            f"make one with {QUANTIZE}, which says why if it leaves a target out, or name "
            "another with --run",
        )
    export = _parsed(folder / "export.json")
    with as_written(folder / "export.json"):
        preprocessing, classes = export["preprocessing"], tuple(export["classes"])
        batch = FREE if export["batch"] == "dynamic" else export["batch"]
        size = preprocessing["resolution"]
        takes_bytes = export.get("input") == "uint8"
        needs = str(export.get("needs") or "")
        task = answers(export.get("task"))
        models = {
            name: promised(checked_files(folder, entry), entry, task, target.is_engine, needs)
            for name, entry in export["models"].items()
        }
        pixels = _array(folder.parent / "samples" / "pixels.npy")
        # A CPU's file has answers to every check image, of which the samples are some.
        expected = {name: _array(answers_beside(folder / name, name)) for name in models}
        return BundleContent(
            run=run,
            recipe=export["recipe"],
            target=target.name,
            device=target.device,
            fingerprint=export["fingerprint"],
            classes=classes,
            resolution=size,
            crop_pct=preprocessing["crop_pct"],
            mean=tuple(preprocessing["mean"]),
            std=tuple(preprocessing["std"]),
            input_name=INPUT,
            input_shape=(batch, size, size, 3) if takes_bytes else (batch, 3, size, size),
            input_type="uint8" if takes_bytes else "float32",
            output_name=OUTPUT,
            output_shape=(batch, *next(iter(expected.values())).shape[1:]),
            requirement=target.needs.packages[0],
            models=models,
            pixels=pixels,
            labels=_array(folder.parent / "samples" / "labels.npy"),
            logits={
                name: rows[spread_indices(len(rows), len(pixels))]
                for name, rows in expected.items()
            },
            exif_rotate=preprocessing["exif_rotate"],
            task=task,
            letterbox=preprocessing.get("letterbox", False),
        )


def placed(
    content: BundleContent,
    run: FinishedRun,
    target: Target,
    folder: Path,
    notify: Callable[[str], None],
) -> dict[str, PlacedModel]:
    """The run's model in every placement of an engine target."""
    return place_models(run, target, content.pixels, said_of(content, run), folder, notify)


def said_of(content: BundleContent, run: FinishedRun) -> About:
    """What a further file of the bundle says of itself."""
    prepared = Preprocessing.of(run.recipe.data, content.letterbox)
    name, classes = content.fingerprint, content.classes
    return About(content.recipe, name, classes, prepared, task=content.task)


def with_placements(content: BundleContent, found: Mapping[str, PlacedModel]) -> BundleContent:
    """The content and every placement that is not in it yet."""
    further = {name: one for name, one in found.items() if name not in content.models}
    models = {}
    for name, one in further.items():
        entry = {**one.agreement.as_json(), "sha256": digest_of(one.path)}
        models[name] = promised((one.path,), entry, content.task, True)
    logits = {name: one.logits.float().numpy() for name, one in further.items()}
    return replace(
        content, models={**content.models, **models}, logits={**content.logits, **logits}
    )


def with_float(
    content: BundleContent, run: FinishedRun, target: Target, folder: Path
) -> BundleContent:
    """The content and the float model as its runtime is fastest: every exact rewrite, its form.

    Runs do not export it, because only a bundle needs it and it takes as long as everything else.
    It is read back and compared on the images of the bundle.
    """
    recipe = run.recipe
    model = load_checkpoint(run.checked_checkpoint(), recipe.model.arch)
    labels, pixels = torch.from_numpy(content.labels), torch.from_numpy(content.pixels)
    images = HeldImages(pixels, labels, recipe.data)
    network = rewrite(model, RewriteSection())
    variants = Variants(model, network, None, lambda: images, recipe.data, recipe.export)
    variant = variants.of(target)
    about = replace(said_of(content, run), input=recipe.export.input)
    path = folder / f"{FLOAT}{'.xml' if target.runtime == 'openvino' else '.onnx'}"
    variant.write(path, about)
    near = compare_answers(
        variants.task, variant.logits, images.logits(open_predictor(str(path), CPU))
    )
    if not near.holds:
        raise ExportError(f"{path.name} does not compute what the float model does ({near}).", FIX)
    entry = {**near.as_json(), "sha256": digest_of(path)}
    added = promised(model_files(path), entry, content.task, False)
    return replace(
        content,
        models={**content.models, FLOAT: added},
        logits={**content.logits, FLOAT: variant.logits.numpy()},
    )


def _python_with(library: str) -> str:
    """An interpreter that has the library; JetPack's is not visible from a virtual environment."""
    known = [python for python in (sys.executable, SYSTEM_PYTHON) if Path(python).exists()]
    for python in known:
        tried = subprocess.run([python, "-c", f"import {library}"], capture_output=True)
        if tried.returncode == 0:
            return python
    return sys.executable  # where the script says what is missing


def _parsed(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}.", "copy it again") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no results.", "give results.json of a device")
    return value


def promised(
    files: tuple[Path, ...], entry: dict[str, Any], task: str, is_engine: bool, needs: str = ""
) -> Model:
    """A model with how near its answers on a device must come, by what its file was found to do.

    Answers that turn grow with the noise, from what the file has to what a device may have.
    """
    least = promised_db(entry, is_engine)
    reached = least if entry["sqnr_db"] is None else float(entry["sqnr_db"])
    louder = 10 ** (max(0.0, reached - least) / 20)
    agreement = ANSWERS[task].least_agreement(float(entry["agreement"]), louder)
    return Model(files, str(entry["sha256"]), least, needs, agreement)


def promised_db(entry: dict[str, Any], is_engine: bool) -> float:
    """How near a device's answers must come to the model's, by what its file was found to do.

    An engine is one more exact implementation of the model, as its file is: `ENGINE_DB` below what
    the file reached, or what exact implementations that round as the target does reach among each
    other, where that is less. `MOST_DB` suffices, as for any file: a float16 file is read back with
    its sums in float32, which a GPU does not do.
    """
    least = float(entry["least_sqnr_db"])
    if not is_engine:
        return min(LEAST_SQNR_DB, least)
    reached = least + TWICE_DB
    if entry["sqnr_db"] is not None:  # else it is exact, or nothing that is bundled
        reached = min(reached, float(entry["sqnr_db"]))
    return round(min(MOST_DB, reached - ENGINE_DB), 1)


def checked_files(folder: Path, entry: dict[str, Any]) -> tuple[Path, ...]:
    """Return an exported model's files; RunError unless they are those that were compared."""
    path = folder / str(entry["file"])
    if not entry["holds"]:
        raise RunError(
            f"{path} does not compute what its model does: {QUANTIZE} said so.",
            "take a run whose exports passed",
        )
    files = model_files(path)
    if not all(file.is_file() for file in files) or digest_of(path) != entry["sha256"]:
        raise RunError(f"{path} is not the file that was exported.", f"export again: {QUANTIZE}")
    return files


def _array(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}.", f"export again: {QUANTIZE}") from error
