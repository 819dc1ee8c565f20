"""What a recipe would do, told and checked before anything is written or trained."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console

from care_compress.console import say
from care_compress.data.loader import BadImages
from care_compress.data.sources import check_classes
from care_compress.errors import RecipeError, RunError, TrainingError
from care_compress.export.stage import check_targets, chosen_targets, placed
from care_compress.export.width_times import check_timed, timing
from care_compress.libraries import load_nncf
from care_compress.model.care import Care, build_model
from care_compress.model.checkpoint import load_checkpoint
from care_compress.model.compact import CompactCare
from care_compress.model.hub import pinned
from care_compress.model.rewrite import rewrite
from care_compress.quantize.plan import make_plan
from care_compress.quantize.plan_table import plan_as_json, print_plan, rule_text
from care_compress.quantize.process_memory import RUN, memory_of
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import export_rules
from care_compress.quantize.selection import read_list
from care_compress.quantize.spec import Plan
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import TrainSection
from care_compress.recipe.slim import SlimSection
from care_compress.recipe.target import Target, load_target
from care_compress.run.processes import World
from care_compress.slim.cut import cut
from care_compress.slim.plan import (
    SlimPlan,
    check_budget,
    check_slim,
    cost_of,
    print_slim_plan,
)
from care_compress.slim.plan import (
    make_plan as make_slim_plan,
)
from care_compress.slim.stage import cost_by, watched
from care_compress.tasks.known import check_task, labelled, task_called
from care_compress.train.stage import LoadedModel, check_batch_size

# Measured (LOG.md): what a file holds beside its weights grows with the number of sites. Unasked, a
# full disk would be found after hours, in the middle of a training.
# Bytes for each site: of a quantized model, a graph, OpenVINO's text.
MODEL_SITE, GRAPH_SITE, TEXT_SITE = 2_900, 2_700, 6_500
# An engine's own code, and what it makes of each parameter.
ENGINE_BYTES, ENGINE_PARAMETER = 7_000_000, 2.7
STATES = 2  # of a training: the newest and the one before it
ADAM = 2  # moments of every weight
RECORDS = 200_000  # recipe, manifest, results, histories
IMAGE_RECORD = 180  # of the calibration list
SAMPLES = 64  # images that travel to a device
STEP = 250  # of the training curves
SPARE = 0.1  # of the estimate, which must be free beyond it
WEIGHT, HALF = 4, 2


@dataclass(frozen=True)
class Space:
    """Bytes that a run leaves, by folder, and that it needs on the way."""

    folders: dict[str, int]
    temporary: int  # at once, in the system's folder for temporary files

    @property
    def total(self) -> int:
        """What the run directory will take."""
        return sum(self.folders.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_megabytes(n)}" for name, n in self.folders.items() if n)
        return (
            f"about {_megabytes(self.total)} in the run directory ({parts}), and "
            f"{_megabytes(self.temporary)} in {tempfile.gettempdir()} for a while"
        )


@dataclass(frozen=True)
class Size:
    """What decides the size of a network's files."""

    parameters: int
    sites: int
    classes: int

    @classmethod
    def of_plan(cls, plan: Plan) -> "Size":
        """Return the size of a quantized network; what has no site, its norms, hardly counts."""
        sites = [decision.site for decision in plan.decisions]
        heads = [s.parameters // (s.channels + 1) for s in sites if s.role == "head"]
        return cls(sum(site.parameters for site in sites), len(sites), max(heads))


def needed_space(recipe: Recipe, size: Size, plan: Plan | None, targets: Sequence[Target]) -> Space:
    """Estimate the space for a run of a recipe with exports to these targets."""
    parameters, sites, classes = size.parameters, size.sites, size.classes
    section, floats = recipe.quantize, WEIGHT * parameters
    model = floats + (MODEL_SITE * sites if section else 0)
    weights = floats if section is None else parameters  # a search takes eight bits at most
    if plan is not None:
        # Runtimes keep four bits in bytes of eight, unless their file packs them.
        stored = [
            (decision.site.parameters, max(8, decision.weight.width))
            for decision in plan.decisions
            if decision.weight is not None
        ]
        weights = sum(count * bits // 8 for count, bits in stored)
        weights += WEIGHT * max(0, parameters - sum(count for count, _ in stored))
    folders = {"float": 0, "slim": 0, "ptq": 0, "qat": 0, "exports": 0, "records": RECORDS}
    if recipe.train is not None:
        folders["float"] = floats + _states(recipe.train, floats)
    if recipe.slim is not None:
        course = recipe.slim.heal or (section and section.qat)
        healed = 0 if recipe.slim.heal is None else floats + _states(recipe.slim.heal, floats)
        folders["slim"] = floats + healed
        folders["slim"] += floats + _states(course, floats) if course else 0
    if section is not None:
        kept = model if section.backend == "torchao" else weights + TEXT_SITE * sites
        folders["ptq"] = kept
        folders["records"] += IMAGE_RECORD * section.calibrate.images
        if section.qat is not None:
            folders["qat"] = kept + _states(section.qat, model)
    graph, text = weights + GRAPH_SITE * sites, weights + TEXT_SITE * sites
    for target in targets:
        file = text if target.runtime == "openvino" else graph
        if target.is_engine:
            file += HALF * parameters + GRAPH_SITE * sites + 2 * SAMPLES * classes * WEIGHT
        else:
            file += recipe.export.images * classes * WEIGHT
        if target.builds_without_device:
            file += 2 * (ENGINE_BYTES + int(ENGINE_PARAMETER * parameters) + GRAPH_SITE * sites)
        folders["exports"] += file
    if any(target.is_bundled for target in targets):
        folders["exports"] += SAMPLES * (3 * recipe.data.resolution**2 + 8)
    return Space(folders, graph + text if targets or section else 0)


def _states(section: TrainSection, model: int) -> int:
    """The states of a training, and its curves where their length is known."""
    copies = 1 + ADAM + (section.ema_decay is not None)
    return STATES * copies * model + STEP * (section.max_steps or 0)


def check_space(space: Space, run: Path) -> None:
    """Refuse to begin what cannot end; what an earlier run left there is written over."""
    held = 0
    for path in chain.from_iterable((run / name).rglob("*") for name in space.folders):
        # Another process may be at work there, and what is gone takes nothing.
        with contextlib.suppress(OSError):
            found = path.lstat()
            held += found.st_size if stat.S_ISREG(found.st_mode) else 0
    wanted: dict[int, tuple[Path, int]] = {}  # by file system
    for path, size in ((run, space.total - held), (Path(tempfile.gettempdir()), space.temporary)):
        whole = path.absolute()
        there = next(place for place in (whole, *whole.parents) if place.exists())
        device = os.stat(there).st_dev
        wanted[device] = (there, wanted.get(device, (there, 0))[1] + size)
    for there, size in wanted.values():
        free = shutil.disk_usage(there).free
        if size * (1 + SPARE) > free:
            raise RunError(
                f"the run needs {space}; {there} has {_megabytes(free)} free.",
                "make room there, choose another place (--runs, TMPDIR), or name fewer "
                "export.targets",
            )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Ready:
    """What a recipe works on and will make, found out before anything is written or trained."""

    start: LoadedModel | None  # none where the model is trained first
    space: Space


def preflight(recipe: Recipe, world: World, console: Console) -> Ready:
    """Refuse what cannot work; the checkpoint is read and the plan made once, here."""
    section = recipe.quantize
    listed = None if section is None else section.calibrate.list
    qat = None if section is None else section.qat
    heal = None if recipe.slim is None else recipe.slim.heal
    trainings = [one for one in (recipe.train, heal, qat) if one is not None]
    if trainings or listed or recipe.slim:
        samples = labelled(recipe, "train")
        for training in trainings:
            task_called(recipe.task).check_training(training)
            check_batch_size(training, len(samples), world)
        if listed:
            read_list(Path(listed), samples)

    if section is not None and section.backend == "nncf":  # it has no rules that could be checked
        load_nncf()
        if section.qat is not None and world.size > 1:
            raise TrainingError("NNCF's model cannot be shared out.", "train it in one process")
        if section.target is not None and load_target(section.target).runtime != "openvino":
            raise RecipeError(
                f"backend nncf makes a file for OpenVINO, quantize.target is {section.target}.",
                "use backend: torchao for it",
            )

    start = None if recipe.train else LoadedModel.of(recipe.model)
    whole = start.model if start else model_of(recipe)
    check_task(whole, recipe)
    if recipe.slim is not None:
        if start is None and recipe.model.arch is not None:  # of the data's own classes
            whole = model_of(recipe, len(samples.classes))
        _check_slim(recipe, recipe.slim, whole)
    # Sites are those of the whole network; what is cut has as many, or narrower ones.
    network = rewrite(whole, recipe.rewrite)
    targets = chosen_targets(recipe)
    if section is not None and section.backend == "torchao":
        network, plan = planned(network, section, recipe.data.resolution)
        targets = able_targets(recipe, network, plan, console)
        return Ready(start, needed_space(recipe, Size.of_plan(plan), plan, targets))
    if section is not None:
        targets = tuple(target for target in targets if target.runtime == "openvino")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    leaves = sum(not any(module.children()) for module in network.modules())
    size = Size(parameters, leaves, network.num_classes)
    return Ready(start, needed_space(recipe, size, None, targets))


def with_pinned_checkpoint(recipe: Recipe) -> Recipe:
    """The recipe whose checkpoint on the Hub is named by its commit.

    All that goes on from a run reads its recipe: it finds these weights, whatever the branch does.
    """
    if recipe.model.checkpoint is None:
        return recipe
    model = recipe.model.model_copy(update={"checkpoint": pinned(recipe.model.checkpoint)})
    return recipe.model_copy(update={"model": model})


def model_of(recipe: Recipe, num_classes: int = 1000) -> Care:
    """The float model that a recipe starts from; an architecture alone gives its shape."""
    if recipe.model.checkpoint is not None:
        model = load_checkpoint(recipe.model.checkpoint, recipe.model.arch)
        check_task(model, recipe)
        return model
    assert recipe.model.arch is not None
    return build_model(recipe.model.arch, num_classes, kind=task_called(recipe.task).kind)


def able_targets(
    recipe: Recipe, network: CompactCare, plan: Plan, console: Console
) -> tuple[Target, ...]:
    """Return the targets that can run the recipe; a named one that cannot is an error."""
    assert recipe.quantize is not None
    if recipe.quantize.search is not None:
        return chosen_targets(recipe)  # what a search finds is known only afterwards
    return check_targets(recipe, partial(plan_for, recipe, network, plan), console)


def plan_for(recipe: Recipe, network: CompactCare, made_by: Plan, target: Target) -> Plan:
    """Plan an export to a target, of the network in the form that `made_by` quantizes."""
    assert recipe.quantize is not None
    rules = export_rules(recipe.export, recipe.quantize, target)
    return make_plan(network, rules, target, recipe.data.resolution, made_by)


def show_plan(recipe: Recipe, exported_to: str | None, as_json: bool, console: Console) -> None:
    """Print the plan of a recipe, or of its export to a target; only widths need images."""
    model, widths = model_of(recipe), None
    if recipe.slim is not None:
        widths = _planned_widths(recipe, recipe.slim, model, console)
        model = cut(model, widths.kept)
        if not as_json:
            print_slim_plan(widths, console)
        if recipe.quantize is None:
            if as_json:
                console.print_json(data={"slim": widths.as_json()})
            return
    section = own_section(recipe)
    whole = rewrite(model, recipe.rewrite)
    network, plan = planned(whole, section, recipe.data.resolution)
    rules, target = section.rules, None
    if exported_to is None:
        targets = able_targets(recipe, network, plan, Console(quiet=True))
    else:
        target = placed(load_target(exported_to, recipe.full_range), recipe)
        rules, targets = export_rules(recipe.export, section, target), (target,)
        plan = plan_for(recipe, network, plan, target)
    space = needed_space(recipe, Size.of_plan(plan), plan, targets)
    memory = memory_of(recipe, whole)
    chain = recipe.origins.chain(recipe.name)
    # A target's own rules come behind those of the recipe.
    said_by = [recipe.origins.said("quantize", "rules") or recipe.name] * len(section.rules)
    said_by += [f"{exported_to}.yaml"] * (len(rules) - len(section.rules))
    if as_json:
        about: dict[str, object] = {
            "recipe": {"chain": chain, "said_by": recipe.origins.as_json()},
            "rules": [
                {"rule": rule_text(rule), "said_by": file}
                for rule, file in zip(rules, said_by, strict=True)
            ],
            "disk_bytes": {**space.folders, "total": space.total, "temporary": space.temporary},
            "memory_bytes": {
                name: {**one.parts, "total": one.total} for name, one in memory.items()
            },
            **({"slim": widths.as_json()} if widths else {}),
        }
        console.print_json(data={**plan_as_json(plan), **about})
        return
    say(f"recipe: {' over '.join(chain)}", console)
    print_plan(plan, rules, said_by, console)
    if target is not None and target.placements:
        console.print(f"[bold]placement[/]: {target.placement}", highlight=False)
    console.print(f"[bold]disk[/] of a run: {space}", highlight=False, soft_wrap=True)
    workers = ", ".join(
        f"{name} {_megabytes(one.total)}" for name, one in memory.items() if name != RUN
    )
    console.print(
        f"[bold]memory[/]: a run at most about {memory[RUN]}; a worker of --ray: {workers}",
        highlight=False,
        soft_wrap=True,
    )


def _planned_widths(
    recipe: Recipe, section: SlimSection, model: Care, console: Console
) -> SlimPlan:
    """Choose widths as the slim stage will, with its images and its clock."""
    if recipe.model.checkpoint is None:
        raise RecipeError(
            "widths are chosen by trained weights, and this recipe trains its own first.",
            "run it, or give a checkpoint (--ckpt)",
        )
    _check_slim(recipe, section, model)
    samples, device = labelled(recipe, "train"), torch.device("cpu")
    check_classes(samples, model.num_classes)
    quiet = Console(quiet=True)
    seen = watched(recipe, section, model, samples, device, BadImages(), quiet)
    latency = timing(recipe, Path("runs"), quiet)
    return make_slim_plan(model, section, seen, cost_by(recipe, section, model, latency))


def _check_slim(recipe: Recipe, section: SlimSection, whole: Care) -> None:
    """Refuse what cannot be slimmed as asked; what a latency budget allows is known later."""
    check_slim(whole, section)
    if section.budget.kind == "latency":
        check_timed(recipe, section)
    else:
        check_budget(section, cost_of(whole, section.budget.kind, recipe.data.resolution))


def own_section(recipe: Recipe) -> QuantizeSection:
    """The quantize section of a recipe whose sites are ours to place."""
    if recipe.quantize is None or recipe.quantize.backend != "torchao":
        raise RecipeError(
            f"{recipe.name} has no plan of ours: it is a float recipe, or NNCF places by itself.",
            "name one with quantize.rules, such as int8_qat",
        )
    return recipe.quantize
