"""Stages that are done once: what one left is taken over while nothing it came from has changed.

`manifest.json` holds a record of every stage that came to its end: digests of what it was made
from, by name, and of the files it wrote. A rerun compares them; so a killed run goes on where it
was, and a changed recipe redoes the stages that the change reaches and no other.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.markup import escape

from care_compress.errors import DamagedRunError
from care_compress.files import fingerprint, sha256_file
from care_compress.machine import LIBRARIES
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import WATCHING
from care_compress.run.context import Workshop, share_bad
from care_compress.run.directory import REPAIR

Json = Any  # what JSON has: dicts with text keys, lists, texts, numbers, None
# What the numbers of a stage depend on beside our own code. A stage that a runtime takes part in
# names all of them.
COMPUTING = ("numpy", "pillow", "torch", "torchao")
EVERYTHING = tuple(sorted({*COMPUTING, *LIBRARIES}))
# Decoding processes and where to cut an evaluated image change no trained weight.
NOT_LEARNED_FROM = {"workers", "crop_pct"}


def recipe_parts(recipe: Recipe) -> dict[str, dict[str, object]]:
    """What of a recipe decides each stage; the stages after it follow by its files' digests.

    Sections are taken whole but for what is named here, so a new key is never overlooked.
    """
    said = recipe.model_dump(mode="json")
    data, quantize = _without(said["data"], {"workers"}), said["quantize"] or {}
    learned = {"seed": said["seed"], "data": _without(data, NOT_LEARNED_FROM)}
    seen = {"seed": said["seed"], "data": data, "rewrite": said["rewrite"]}
    searched = recipe.quantize is not None and recipe.quantize.searches
    judged = {"budget": said["budget"], "evaluate": said["evaluate"]} if searched else {}
    return {
        "train": {
            **learned,
            "name": said["name"],
            "model": said["model"],
            "train": _without(said["train"] or {}, WATCHING),
        },
        "calibration": {**seen, "quantize.calibrate": quantize.get("calibrate")},
        "ptq": {**seen, "quantize": _without(quantize, {"qat"}), **judged},
        "qat": {
            **learned,
            "rewrite": said["rewrite"],
            "quantize.qat": _without(quantize.get("qat") or {}, WATCHING),
            "quantize.nncf": quantize.get("nncf"),
        },
        "evaluate": {"data": data, "rewrite": said["rewrite"], "evaluate": said["evaluate"]},
        "export": {
            "data": data,
            "rewrite": said["rewrite"],
            "name": said["name"],
            "precision": said["precision"],
            "export": _without(said["export"], {"targets"}),  # each target is a stage of its own
        },
    }


def _without(section: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in names}


def once(
    shop: Workshop,
    stage: str,
    made_from: Mapping[str, object],
    make: Callable[[], Json],
    together: bool = False,
) -> Json:
    """Do a stage, or take over what it left; the value that `make` returned then or returns now.

    Stages are the main process's, unless all work on them `together`: then its word counts.
    """
    digests = {name: fingerprint(value) for name, value in {**_surroundings(), **made_from}.items()}
    record = _current(shop, stage, digests) if shop.world.is_main else None
    if together:
        record = shop.world.gathered(record)[0]
    if record is None:
        record = _done(shop, stage, digests, make, together)
    else:
        shop.console.print(f"{escape(stage)}: unchanged, taken over", highlight=False)
    for name, seconds in record["seconds"].items():
        shop.spend(name, seconds)
    shop.bad.reasons.update(record["skipped_images"])
    if shop.world.is_main:
        shop.run.record_stage(stage, record)
    return record["value"]


def versions(packages: Collection[str]) -> dict[str, str]:
    """The versions of these packages, of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _surroundings() -> dict[str, object]:
    return {"packages": versions(COMPUTING), "care-compress": _own_code()}


@cache
def _own_code() -> str:
    """Digest of the package: what older code made may not pass for what this code makes."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _current(shop: Workshop, stage: str, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """The record of the stage if it need not be done again; says why where it must."""
    record = shop.run.stage(stage)
    if record is None:
        return None
    why = _changed(record, digests) or _damaged(shop, stage, record)
    if why:
        shop.console.print(f"{escape(stage)}: {escape(why)}, made again", highlight=False)
        return None
    return record


def _changed(record: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    known = record.get("made_from", {})
    names = [name for name in {**known, **digests} if known.get(name) != digests.get(name)]
    return f"{', '.join(sorted(names))} changed" if names else ""


def _damaged(shop: Workshop, stage: str, record: Mapping[str, Any]) -> str:
    """What is missing; what is there and is not what was written is an error, unless repaired."""
    damaged = []
    if record.get("seal") != _seal(record):
        damaged.append("manifest.json")
    else:
        for name, digest in record["outputs"].items():
            path = shop.run.path / name
            if not path.is_file():
                return f"{name} is gone"
            if sha256_file(path) != digest:
                damaged.append(name)
    if damaged and not shop.repair:
        raise DamagedRunError(
            f"{shop.run.path / damaged[0]} is not what {stage} wrote: it was cut short, "
            "damaged or edited.",
            REPAIR,
        )
    return f"{', '.join(damaged)} was damaged" if damaged else ""


def _done(
    shop: Workshop,
    stage: str,
    digests: dict[str, str],
    make: Callable[[], Json],
    together: bool,
) -> dict[str, Any]:
    """Do the stage; its record, once everything it writes is in place."""
    if shop.world.is_main:
        shop.run.forget_stage(stage)
    with shop.apart(), shop.run.noting() as notes:
        value = make()
        if together:
            share_bad(shop)
        record: dict[str, Any] = {
            "made_from": digests,
            "inputs": notes.inputs,
            "outputs": notes.outputs,
            "seconds": shop.seconds,
            "skipped_images": shop.bad.reasons,
            "value": value,
        }
    return {**record, "seal": _seal(record)}


def _seal(record: Mapping[str, Any]) -> str:
    """Digest of a record itself: the values in it are results too."""
    return fingerprint({key: value for key, value in record.items() if key != "seal"})
