"""A plan as a person reads it, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from care_compress.console import say, widened
from care_compress.quantize.spec import ENERGY_PJ, Plan
from care_compress.recipe.quantize import RuleSection

WIDTH = 132


def print_plan(
    plan: Plan, rules: tuple[RuleSection, ...], said_by: Sequence[str], console: Console
) -> None:
    """Every site with the rule that decided it, then the sums; `said_by` names each rule's file."""
    for number, (rule, file) in enumerate(zip(rules, said_by, strict=True), 1):
        say(f"rule {number}: {rule_text(rule)}  # {file}", console)
    target = plan.target or "none: simulated, no runtime's limits"
    table = Table(title=f"target {target}, {plan.resolution}x{plan.resolution}")
    table.title_justify = "left"
    for column in ("site", "role", "input", "weight", "rule"):
        table.add_column(column, no_wrap=True)
    for column in ("MACs (M)", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for decision in plan.decisions:
        site = decision.site
        numbers = {decision.input_rule, *([decision.weight_rule] if site.weighted else [])}
        table.add_row(
            site.name,
            site.role,
            str(decision.input),
            "" if decision.weight is None else str(decision.weight),
            ", ".join(sorted(str(number) if number else "-" for number in numbers)),
            f"{site.macs / 1e6:.3f}" if site.macs else "",
            f"{100 * site.macs / plan.macs:.2f} %" if site.macs else "",
        )
    # A site's name is what rules select by: it must be whole even where a terminal is narrow.
    widened(console, WIDTH).print(table)
    for kept in plan.kept:
        console.print(f"float by nature: {kept.what} ({kept.count}): {kept.why}", highlight=False)
    total = plan.macs
    parts = [
        f"{name} {macs / 1e6:.2f} M ({100 * macs / total:.1f} %)"
        for name, macs in plan.macs_by_precision().items()
    ]
    console.print(f"[bold]MACs[/]: {', '.join(parts)}, together {total / 1e6:.2f} M")
    # Without quantization there is nothing to rotate.
    in_float = (total - plan.kept_macs) * sum(ENERGY_PJ["float"]) * 1e-9
    console.print(
        f"[bold]energy[/] of the products (45 nm estimate): {plan.energy_mj:.4f} mJ an image, "
        f"{in_float / plan.energy_mj:.1f}x below the {in_float:.4f} mJ of float32"
    )


def rule_text(rule: RuleSection) -> str:
    """A rule as it stands in the recipe, without what it leaves out."""
    said = rule.model_dump(exclude_none=True, exclude_defaults=True)
    for key, value in said.items():
        if isinstance(value, dict):
            said[key] = value["bits"] if len(value) == 1 else str(value).replace("'", "")
    return ", ".join(f"{key}: {value}" for key, value in said.items())


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """A plan as programs read it."""
    return {
        "target": plan.target,
        "resolution": plan.resolution,
        "sites": [
            {
                "name": decision.site.name,
                "role": decision.site.role,
                "branch": decision.site.branch,
                "macs": decision.site.macs,
                "share": decision.site.macs / plan.macs,
                "parameters": decision.site.parameters,
                "input": asdict(decision.input),
                "weight": None if decision.weight is None else asdict(decision.weight),
                "input_rule": decision.input_rule,
                "weight_rule": decision.weight_rule,
                "precision": decision.precision,
            }
            for decision in plan.decisions
        ],
        "kept_in_float": [asdict(kept) for kept in plan.kept],
        "macs": plan.macs_by_precision(),
        "energy_mj": plan.energy_mj,
    }
