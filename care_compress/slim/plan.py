"""What a slim section makes of a network: the width of every interaction, and which budget said so.

plan = make_plan(model, section, data, statistics, cost_of_macs(model, 224))
slim = cut(model, plan.kept)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from care_compress.console import widened
from care_compress.errors import RecipeError
from care_compress.model.care import Care
from care_compress.model.cost import measure_cost
from care_compress.recipe.slim import SlimSection
from care_compress.slim.allocate import Limit, choose_widths, choose_within_both
from care_compress.slim.places import Place, bottleneck_at, find_places, layer_behind
from care_compress.slim.rank import (
    Ranking,
    by_reconstruction,
    by_scores,
    magnitude,
    module_aware,
)
from care_compress.slim.statistics import HiddenStatistics, head_weight

NAMES = {"macs": "multiply-accumulates", "parameters": "parameters", "latency": "latency"}


@dataclass(frozen=True)
class Cost:
    """What widths cost: the whole network with some of its widths narrowed."""

    unit: str  # of the numbers, for people
    total: float  # of the network as it is
    of: Callable[[Place, int], float]  # one place at one width
    places: tuple[Place, ...]

    @property
    def fixed(self) -> float:
        """What no width changes."""
        return self.total - sum(self.of(place, place.channels) for place in self.places)


@dataclass(frozen=True)
class PlaceWidth:
    """What becomes of one place."""

    place: Place
    kept: tuple[int, ...]
    rule: int | None  # the number of the rule that limited it
    least: int
    loss: float  # by the measure of importance

    @property
    def width(self) -> int:
        """Channels that stay."""
        return len(self.kept)


@dataclass(frozen=True)
class SlimPlan:
    """Every place, and what the whole comes to."""

    section: SlimSection
    widths: tuple[PlaceWidth, ...]
    wanted: float  # what the budget leaves, in its unit
    before: float
    after: float  # as added up over places
    unit: str

    @property
    def kept(self) -> dict[Place, tuple[int, ...]]:
        """The channels of every place that stay."""
        return {one.place: one.kept for one in self.widths}

    @property
    def hidden(self) -> float:
        """The share of the hidden numbers that stays."""
        return hidden_share({one.place: one.width for one in self.widths})

    @property
    def hidden_wanted(self) -> float | None:
        """What slim.hidden leaves of them."""
        return hidden_limit(self.section)

    def as_json(self) -> dict[str, Any]:
        """The plan as programs read it."""
        budget = self.section.budget
        return {
            "importance": self.section.importance,
            "budget": {"kind": budget.kind, "share": budget.share, "unit": self.unit},
            "before": self.before,
            "after": self.after,
            "hidden": {"left": self.hidden, "allowed": self.hidden_wanted},
            "places": [
                {
                    **asdict(one.place),
                    "name": one.place.name,
                    "width": one.width,
                    "kept": list(one.kept),
                    "least": one.least,
                    "rule": one.rule,
                    "loss": one.loss,
                }
                for one in self.widths
            ],
        }


def check_slim(model: Care, section: SlimSection) -> None:
    """Refuse what cannot be slimmed as asked, before anything is measured."""
    if model.is_slimmed:
        raise RecipeError(
            f"the checkpoint is a {model.arch} that was slimmed already.",
            "slim the network that it was made of, with a smaller budget; or leave slim out "
            "(--set slim=null) to quantize it as it is",
        )
    places = find_places(model)
    for number, rule in enumerate(section.rules, 1):
        if not any(_matches(rule, place) for place in places):
            said = rule.model_dump(exclude_none=True)
            raise RecipeError(
                f"slim.rules: rule {number} ({said}) matches no interaction of {model.arch}.",
                "stages and blocks count from 0; branches are inter1 and inter2",
            )


def cost_of(model: Care, kind: str, resolution: int) -> Cost:
    """Costs that are counted: multiply-accumulates of one image, or parameters."""
    places, whole = tuple(find_places(model)), measure_cost(model, resolution)
    if kind == "macs":
        return Cost(
            "MACs",
            whole.macs,
            lambda place, width: width * place.macs_of_channel(resolution, model),
            places,
        )
    return Cost(
        "parameters",
        whole.parameters,
        lambda place, width: width * place.parameters_of_channel(model),
        places,
    )


def widths_allowed(section: SlimSection, place: Place) -> tuple[tuple[int, ...], int | None]:
    """The widths that a place may have, and the number of the rule that limits it."""
    least, rule = section.multiple, None
    for number, one in enumerate(section.rules, 1):
        if _matches(one, place):
            rule = number
            least = math.ceil(one.least * place.channels)
    # Nothing at all, the whole interaction taken out, only where a rule says so.
    first = 0 if least == 0 and not place.last else section.multiple
    multiples = range(first, place.channels, section.multiple)
    return (*(width for width in multiples if width >= least), place.channels), rule


def check_budget(section: SlimSection, cost: Cost) -> None:
    """Refuse a budget that even the narrowest widths overrun."""
    narrowest = cost.fixed + sum(
        min(cost.of(place, width) for width in widths_allowed(section, place)[0])
        for place in cost.places
    )
    share, budget = narrowest / cost.total, section.budget
    rules = " and slim.rules" if section.rules else ""
    if share > budget.share:
        raise RecipeError(
            f"slim.budget.{budget.kind} {budget.share:g} cannot be met: with every interaction at "
            f"its narrowest, {share:.3f} of the {NAMES[budget.kind]} is left.",
            "raise it"
            + (f" to {share + 0.01:.2f} or more" if share < 0.98 else "")
            + f", or lower slim.multiple{rules}",
        )
    least = {place: min(widths_allowed(section, place)[0]) for place in cost.places}
    hidden = hidden_budget(section, cost.places)
    if hidden is not None and hidden.left(least) < 0:
        reached = hidden_share(least) / budget.share
        needed = math.ceil(100 * reached) / 100
        raise RecipeError(
            f"slim.hidden {section.hidden:g} cannot be met: with every interaction at its "
            f"narrowest it is {reached:.4f}.",
            (f"raise it to {needed:g}" if needed <= 1 else "raise the budget")
            + f", lower slim.multiple{rules}, or let the budget alone decide (slim.hidden null)",
        )


def hidden_limit(section: SlimSection) -> float | None:
    """The share of the hidden numbers that may stay.

    Parameters say nothing about them, and a latency budget measures time itself.
    """
    if section.hidden is None or section.budget.macs is None:
        return None
    return section.hidden * section.budget.macs


def hidden_budget(section: SlimSection, places: Sequence[Place]) -> Limit | None:
    """The same, as what widths are held against."""
    share = hidden_limit(section)
    if share is None:
        return None
    whole = sum(place.hidden_numbers(place.channels) for place in places)
    return Limit(Place.hidden_numbers, share * whole)


def hidden_share(widths: Mapping[Place, int]) -> float:
    """The share of the hidden numbers of all interactions that widths leave."""
    left = sum(place.hidden_numbers(width) for place, width in widths.items())
    return left / sum(place.hidden_numbers(place.channels) for place in widths)


def make_plan(
    model: Care,
    section: SlimSection,
    statistics: Mapping[Place, HiddenStatistics],
    cost: Cost,
) -> SlimPlan:
    """Choose a width for every place, and which of its channels stay."""
    check_budget(section, cost)
    rankings = {
        place: rank(model, section.importance, place, statistics.get(place))
        for place in cost.places
    }
    allowed = {place: widths_allowed(section, place) for place in cost.places}
    wanted = section.budget.share * cost.total
    options = {place: widths for place, (widths, _) in allowed.items()}
    budget, hidden = Limit(cost.of, wanted - cost.fixed), hidden_budget(section, cost.places)
    if hidden is None:
        chosen = choose_widths(rankings, options, budget)
    else:
        chosen = choose_within_both(rankings, options, budget, hidden)
    planned = tuple(
        PlaceWidth(
            place,
            tuple(rankings[place].kept(width)),
            allowed[place][1],
            min(options[place]),
            rankings[place].loss[place.channels - width],
        )
        for place, width in chosen.items()
    )
    after = cost.fixed + sum(cost.of(one.place, one.width) for one in planned)
    return SlimPlan(section, planned, wanted, cost.total, after, cost.unit)


def rank(
    model: Care, importance: str, place: Place, statistics: HiddenStatistics | None
) -> Ranking:
    """The channels of one place by one measure of importance."""
    half = bottleneck_at(model, place)
    behind = layer_behind(model, place)
    readers = head_weight(model) if behind is None else behind.weight.detach().flatten(1)
    if importance == "magnitude":
        return by_scores(magnitude(half, readers))
    if importance == "module_aware":
        return by_scores(module_aware(half, readers))
    assert statistics is not None
    if importance == "taylor":
        return by_scores(statistics.taylor_H)
    return by_reconstruction(readers, statistics.covariance_HH, statistics.importance_O)


def needs_images(section: SlimSection) -> bool:
    """Whether the measure of importance looks at images."""
    return section.importance in ("reconstruct", "taylor")


def print_slim_plan(plan: SlimPlan, console: Console) -> None:
    """Show the widths before and after, and which budget decided."""
    budget = plan.section.budget
    said = "{:.3g}".format if budget.kind == "latency" else "{:,.0f}".format
    table = Table(title=f"slim: {budget.kind} to {budget.share:g}, by {plan.section.importance}")
    table.title_justify = "left"
    table.add_column("interaction", no_wrap=True)
    for column in ("channels", "stay", "share", "least", "rule", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in plan.widths:
        table.add_row(
            one.place.name,
            str(one.place.channels),
            str(one.width),
            f"{100 * one.width / one.place.channels:.0f} %",
            str(one.least),
            "-" if one.rule is None else str(one.rule),
            f"{one.loss:.3g}",
        )
    widened(console, 100).print(table)
    console.print(
        f"[bold]{plan.unit}[/]: {said(plan.before)} before, {said(plan.after)} after "
        f"({plan.after / plan.before:.3f}); the budget leaves {said(plan.wanted)}",
        highlight=False,
    )
    if plan.hidden_wanted is not None:
        console.print(
            f"[bold]hidden numbers[/] (channels times positions): {plan.hidden:.3f} stay; "
            f"slim.hidden leaves {plan.hidden_wanted:.3f}",
            highlight=False,
        )


def _matches(rule: Any, place: Place) -> bool:
    wanted = (rule.stage, rule.block, rule.branch)
    found = (place.stage, place.block, place.branch)
    return all(one is None or one == own for one, own in zip(wanted, found, strict=True))
