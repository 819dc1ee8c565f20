"""Stages that are done once: what one left is taken over while nothing it came from has changed.

`manifest.json` holds a record of every stage that came to its end: digests of what it was made
from, by name, and of the files it wrote. A rerun compares them; so a killed run goes on where it
was, and a changed recipe redoes the stages that the change reaches and no other.

Runs of a sweep share: where a run's folder has a `SHARED` folder beside it, a stage that one run
made is copied by the others that would make it from the same things.
"""

import contextlib
import fcntl
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.markup import escape

from care_compress.errors import DamagedRunError, RunError
from care_compress.files import (
    atomic_file,
    fingerprint,
    json_text,
    read_json,
    sha256_file,
    write_text,
)
from care_compress.machine import LIBRARIES, installed_versions
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import WATCHING
from care_compress.run.context import RunContext
from care_compress.run.directory import REPAIR

SHARED = ".stages"  # beside runs that share: which of them made what, by digest
Json = Any  # what JSON has: dicts with text keys, lists, texts, numbers, None
# What the numbers of a stage depend on beside our own code. A stage that a runtime takes part in
# names all of them.
COMPUTING = ("numpy", "pillow", "torch", "torchao")
EVERYTHING = tuple(sorted({*COMPUTING, *LIBRARIES}))
# Decoding processes and where to cut an evaluated image change no trained weight.
NOT_LEARNED_FROM = {"workers", "crop_pct"}
# Every stage sees images, though some are handed them; how they are found and decoded counts.
READS_IMAGES = "care_compress.data.sources"
# Found by pattern: to parse the package would take a second of every run. A test parses it.
_IMPORT = re.compile(
    r"^\s*(?:from (?P<package>care_compress[\w.]*) import (?P<names>\([^)]*\)|[^\n(]*)"
    r"|import (?P<plain>care_compress[\w.]*))",
    re.MULTILINE,
)


def recipe_parts(recipe: Recipe) -> dict[str, dict[str, object]]:
    """Return what of a recipe decides each stage; later stages follow by its files' digests.

    Sections are taken whole but for what is named here, so a new key is never overlooked.
    """
    said = recipe.model_dump(mode="json")
    data, quantize = _without(said["data"], {"workers"}), said["quantize"] or {}
    learned = {"task": said["task"], "seed": said["seed"], "data": _without(data, NOT_LEARNED_FROM)}
    seen = {
        "task": said["task"],
        "seed": said["seed"],
        "data": data,
        "rewrite": said["rewrite"],
    }
    searched = recipe.quantize is not None and recipe.quantize.searches
    judged = {"budget": said["budget"], "evaluate": said["evaluate"]} if searched else {}
    return {
        "train": {
            **learned,
            "model": said["model"],
            "train": _without(said["train"] or {}, WATCHING),
        },
        "slim": {
            "task": said["task"],
            "seed": said["seed"],
            "data": data,
            "slim": _without(said["slim"] or {}, {"heal"}),
        },
        # What it heals by is added by the stage, which may take QAT's settings.
        "heal": learned,
        "calibration": {**seen, "quantize.calibrate": quantize.get("calibrate")},
        "ptq": {**seen, "quantize": _without(quantize, {"qat"}), **judged},
        "qat": {
            **learned,
            "rewrite": said["rewrite"],
            "quantize.qat": _without(quantize.get("qat") or {}, WATCHING),
            "quantize.nncf": quantize.get("nncf"),
        },
        "evaluate": {
            "task": said["task"],
            "data": data,
            "rewrite": said["rewrite"],
            "evaluate": said["evaluate"],
        },
        "export": {
            "task": said["task"],
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
    context: RunContext,
    stage: str,
    made_from: Mapping[str, object],
    make: Callable[[], Json],
    together: bool = False,
    handed_in: Sequence[Callable[..., object]] = (),
) -> Json:
    """Do a stage, or take over what it left; the value that `make` returned then or returns now.

    Stages are the main process's, unless all work on them `together`: then its word counts.
    What `make` calls without importing it is `handed_in`: a change of that code counts, too.
    """
    modules = [function.__module__ for function in (make, *handed_in)]
    assert "functools" not in modules, "a partial does not say whose code it calls"
    everything = {
        "packages": installed_versions(COMPUTING),
        "care-compress": code_digest(READS_IMAGES, *modules),
        **made_from,
    }
    digests = {name: fingerprint(value) for name, value in everything.items()}
    with contextlib.ExitStack() as held:
        record = _current(context, stage, digests) if context.world.is_main else None
        from_where = "unchanged, taken over"
        share = context.run.path.parent / SHARED
        if record is None and context.world.is_main and share.is_dir():
            # Who is second waits until the first has made it.
            entry = held.enter_context(_held(share / fingerprint([stage, digests])))
            record, from_where = _of_sibling(context, stage, digests, entry)
        else:
            entry = None
        if together:
            record = context.world.gathered(record)[0]
        if record is not None:
            context.console.print(f"{escape(stage)}: {escape(from_where)}", highlight=False)
        else:
            if context.world.is_main:
                context.run.forget_stage(stage)
            with context.apart(), context.run.noting() as notes:
                value = make()
                # The main process reports what any of them left out.
                for reasons in context.world.gathered(context.bad.reasons) if together else ():
                    context.bad.reasons.update(reasons)
                record = {
                    "made_from": digests,
                    "inputs": notes.inputs,
                    "outputs": notes.outputs,
                    "seconds": context.seconds,
                    "skipped_images": context.bad.reasons,
                    "value": value,
                }
            record["seal"] = _seal(record)
        for name, seconds in record["seconds"].items():
            context.spend(name, seconds)
        context.bad.reasons.update(record["skipped_images"])
        if context.world.is_main:
            context.run.record_stage(stage, record)
            if entry is not None:
                write_text(entry, json_text({"stage": stage, "run": context.run.name}))
        return record["value"]


@contextlib.contextmanager
def _held(entry: Path) -> Iterator[Path]:
    """Hold what the runs beside this one know of a stage, so that only one of them makes it."""
    with entry.with_suffix(".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # lockf: see `Run`; it holds on NFS, too
        yield entry.with_suffix(".json")


def _of_sibling(
    context: RunContext, stage: str, digests: Mapping[str, str], entry: Path
) -> tuple[dict[str, Any] | None, str]:
    """Copy what a run beside this one made from the same things; nothing where it is not whole."""
    try:
        sibling = context.run.path.parent / read_json(entry)["run"]
        record: dict[str, Any] = read_json(sibling / "manifest.json")["stages"][stage]
        if record["made_from"] != digests or record["seal"] != _seal(record):
            return None, ""
        for name, digest in record["outputs"].items():
            with atomic_file(context.run.path / name) as temporary:
                shutil.copyfile(sibling / name, temporary)
                if sha256_file(temporary) != digest:
                    raise ValueError(f"{name} was damaged")  # there: it is made here
    except (OSError, ValueError, LookupError, TypeError, RunError):
        return None, ""
    return record, f"taken over from {sibling.name}"


def code_digest(*modules: str) -> str:
    """Digest of all our code that these modules can reach: what older code made may not pass.

    A change elsewhere, of the report or the command line, makes no stage again.
    """
    reached, digests = reached_modules(*modules), _digests()
    counted = set(reached)
    for name in reached:  # and the packages whose ``__init__`` an import of it runs
        parts = name.split(".")
        counted |= {".".join(parts[:depth]) for depth in range(1, len(parts))}
    return fingerprint({name: digests[name] for name in counted})


def reached_modules(*modules: str) -> dict[str, Path]:
    """These modules of ours and all that they may import, by name."""
    reached, ahead = set[str](), set(modules)
    while ahead:
        name = ahead.pop()
        if name in _modules() and name not in reached:
            reached.add(name)
            # The package's own names are for users: no module of ours goes by way of them.
            ahead |= _imports(name) if "." in name else set()
    return {name: _modules()[name] for name in sorted(reached)}


@cache
def _digests() -> dict[str, str]:
    """Digest every module when the first stage asks; what is edited later is not what runs."""
    return {name: sha256_file(path) for name, path in _modules().items()}


@cache
def _modules() -> dict[str, Path]:
    """Every file of the package, by the name that it is imported by."""
    package = Path(__file__).resolve().parent.parent
    found = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _imports(module: str) -> set[str]:
    """Name all that a module of ours may import, wherever in it: modules, and names in them."""
    imported = set[str]()
    for found in _IMPORT.finditer(_modules()[module].read_text(encoding="utf-8")):
        package, names = found["package"] or found["plain"], found["names"] or ""
        # Either may be the module: ``from care_compress import machine``.
        imported |= {package, *(f"{package}.{name}" for name in re.findall(r"\w+", names))}
    return imported


def _current(context: RunContext, stage: str, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """The record of the stage if it need not be done again; says why where it must."""
    record = context.run.stage(stage)
    if record is None:
        return None
    known = record.get("made_from", {})
    names = [name for name in {**known, **digests} if known.get(name) != digests.get(name)]
    why = f"{', '.join(sorted(names))} changed" if names else _damaged(context, stage, record)
    if why:
        context.console.print(f"{escape(stage)}: {escape(why)}, made again", highlight=False)
        return None
    return record


def _damaged(context: RunContext, stage: str, record: Mapping[str, Any]) -> str:
    """Say what is missing; a file that is not what was written is an error, unless repaired."""
    damaged = []
    if record.get("seal") != _seal(record):
        damaged.append("manifest.json")
    else:
        for name, digest in record["outputs"].items():
            path = context.run.path / name
            if not path.is_file():
                return f"{name} is gone"
            if sha256_file(path) != digest:
                damaged.append(name)
    if damaged and not context.repair:
        raise DamagedRunError(
            f"{context.run.path / damaged[0]} is not what {stage} wrote: it was cut short, "
            "damaged or edited.",
            REPAIR,
        )
    return f"{', '.join(damaged)} was damaged" if damaged else ""


def _seal(record: Mapping[str, Any]) -> str:
    """Digest of a record itself: the values in it are results too."""
    return fingerprint({key: value for key, value in record.items() if key != "seal"})
