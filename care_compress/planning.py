"""What a recipe would do, told and checked before anything is written or trained."""

from functools import partial
from pathlib import Path

from rich.console import Console

from care_compress.data.sources import open_samples
from care_compress.errors import RecipeError, TrainingError
from care_compress.exporting import check_targets, chosen_targets, placed
from care_compress.model.care import build_model
from care_compress.model.checkpoint import load_checkpoint
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantization_sections import QuantizeSection
from care_compress.quantize.openvino_library import load_nncf
from care_compress.quantize.plan import make_plan
from care_compress.quantize.plan_table import plan_as_json, print_plan
from care_compress.quantize.ptq import planned
from care_compress.quantize.selection import read_list
from care_compress.quantize.spec import Plan
from care_compress.recipe import Recipe
from care_compress.space import Size, Space, needed_space
from care_compress.target import Target, load_target
from care_compress.train.distributed import World
from care_compress.train.network import check_batch_size
from care_compress.variants import export_rules


def check_recipe(recipe: Recipe, world: World) -> Plan | None:
    """Refuse what cannot work before anything is written or trained; the plan, if it is ours."""
    section = recipe.quantize
    qat = None if section is None else section.qat
    trainings = [plan for plan in (recipe.train, qat) if plan is not None]
    if trainings or (section and section.calibrate.list):
        samples = open_samples(recipe.data, "train")
        for plan in trainings:
            check_batch_size(plan, len(samples), world)
        if section and section.calibrate.list:
            read_list(Path(section.calibrate.list), samples)
    return None if section is None else check_plan(recipe, section, world)


def check_exportable(recipe: Recipe, console: Console) -> list[Target]:
    """Refuse export targets that do not exist or cannot run the recipe; those that may be made."""
    targets = chosen_targets(recipe)
    section = recipe.quantize
    # What a search finds, and what NNCF places, is known only afterwards.
    if section is not None and section.backend == "torchao" and section.search is None:
        network, plan = planned(network_of(recipe), section, recipe.data.resolution)
        wanted = partial(plan_for, recipe, network, plan)
        return check_targets(recipe, wanted, console)
    nncf = section is not None and section.backend == "nncf"
    return [target for target in targets if target.runtime == "openvino" or not nncf]


def space_of(recipe: Recipe, plan: Plan | None, targets: list[Target]) -> Space:
    """The disk that a run takes; a search finds out later what its plan is."""
    size = Size.of_network(network_of(recipe)) if plan is None else Size.of_plan(plan)
    return needed_space(recipe, size, plan, targets)


def check_plan(recipe: Recipe, section: QuantizeSection, world: World) -> Plan | None:
    """Refuse rules that no site or target can follow."""
    if section.backend == "torchao":
        return plan_recipe(recipe)
    load_nncf()  # there are no rules; what can be missing is NNCF
    if section.qat is not None and world.size > 1:
        raise TrainingError("NNCF's model cannot be shared out.", "train it in one process")
    if section.target is not None and load_target(section.target).runtime != "openvino":
        raise RecipeError(
            f"backend nncf makes a file for OpenVINO, quantize.target is {section.target}.",
            "use backend: torchao for it",
        )
    return None


def plan_recipe(recipe: Recipe, target: Target | None = None) -> Plan:
    """The plan of a recipe, or of its export to a target; needs its network's shape, no data."""
    assert recipe.quantize is not None
    network, plan = planned(network_of(recipe), recipe.quantize, recipe.data.resolution)
    return plan if target is None else plan_for(recipe, network, plan, target)


def plan_for(recipe: Recipe, network: CompactCare, made_by: Plan, target: Target) -> Plan:
    """The plan of an export to a target, of the network in the form that is quantized by a plan."""
    assert recipe.quantize is not None
    rules = export_rules(recipe, recipe.quantize, target)
    return make_plan(network, rules, target, recipe.data.resolution, made_by)


def network_of(recipe: Recipe) -> CompactCare:
    """The rewritten network that a recipe starts from."""
    if recipe.model.checkpoint is not None:
        model = load_checkpoint(recipe.model.checkpoint, recipe.model.arch)
    else:
        assert recipe.model.arch is not None
        model = build_model(recipe.model.arch)
    return rewrite(model, recipe.rewrite)


def show_plan(recipe: Recipe, exported_to: str | None, as_json: bool, console: Console) -> None:
    """Print the plan of a recipe."""
    section = own_section(recipe)
    target = None
    if exported_to is not None:
        target = placed(load_target(exported_to, recipe.full_range), recipe)
    plan = plan_recipe(recipe, target)
    targets = check_exportable(recipe, Console(quiet=True)) if target is None else [target]
    space = space_of(recipe, plan, targets)
    if as_json:
        console.print_json(data={**plan_as_json(plan), "disk_bytes": space.as_json()})
    else:
        rules = section.rules if target is None else export_rules(recipe, section, target)
        print_plan(plan, rules, console)
        if target is not None and target.placements:
            console.print(f"[bold]placement[/]: {target.placement}", highlight=False)
        console.print(f"[bold]disk[/] of a run: {space}", highlight=False, soft_wrap=True)


def own_section(recipe: Recipe) -> QuantizeSection:
    """The quantize section of a recipe whose sites are ours to place."""
    if recipe.quantize is None or recipe.quantize.backend != "torchao":
        raise RecipeError(
            f"{recipe.name} has no plan of ours: it is a float recipe, or NNCF places by itself.",
            "name one with quantize.rules, such as int8_qat",
        )
    return recipe.quantize
