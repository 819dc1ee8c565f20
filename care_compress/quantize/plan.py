"""From a recipe's ordered rules and a target's limits to a decision for every site.

Pure: no data, no weights, so ``care-compress plan`` answers at once. The same plan then drives
PTQ, QAT and export.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from care_compress.errors import RecipeError
from care_compress.model.compact import CompactCare
from care_compress.quantize.sites import find_sites, kept_in_float
from care_compress.quantize.spec import FLOAT, Decision, Granularity, Plan, Site, TensorSpec
from care_compress.recipe.quantize import RuleSection, TensorSection
from care_compress.recipe.target import Target

RANGES_OF_WEIGHTS = ("min_max", "mse")  # the others choose from a stream of values
ATTENTION_PRODUCTS = ("attention.kv", "attention.out")
NO_FLOAT8_KERNEL = 16  # channels or fewer: TensorRT has none for them, nor for a depthwise conv
CHANNEL_AXIS = 1  # of (B, C, H, W); also the heads of (B, h, d, N)


def make_plan(
    model: CompactCare,
    rules: Sequence[RuleSection],
    target: Target | None,
    resolution: int,
    made_by: Plan | None = None,
) -> Plan:
    """Decide for every site; `RecipeError` if a rule matches nothing or the target cannot.

    `made_by` is the plan that the weights were rounded, corrected and trained by, if there is one:
    in -64..63 there, they stay as they are for a target that takes all 8 bits. Rounded anew in
    finer steps they would no longer fit their corrections (LOG.md).
    """
    made = () if made_by is None else made_by.decisions
    reduce = any(decision.weight is not None and decision.weight.reduced for decision in made)
    reduce = reduce or (target is not None and target.weights.reduce_range)
    sites = find_sites(model, resolution)
    for number, rule in enumerate(rules, 1):
        if not any(matches(rule, site) for site in sites):
            raise _matches_nothing(number, rule, sites)
    decisions = []
    for site in sites:
        input_, weight = FLOAT, FLOAT if site.weighted else None
        input_rule = weight_rule = 0
        for number, rule in enumerate(rules, 1):
            if matches(rule, site):
                input_rule = number if rule.input is not None else input_rule
                weight_rule = number if rule.weight is not None and site.weighted else weight_rule
        # Only the rules that decide must be possible.
        if input_rule and (wanted := rules[input_rule - 1].input):
            input_ = _input_spec(site, wanted, input_rule, target)
        if weight_rule and (wanted := rules[weight_rule - 1].weight):
            weight = _weight_spec(site, wanted, weight_rule, target, reduce)
        if "fp8" in (input_.bits, weight and weight.bits):
            _check_float8(site, input_, weight, max(input_rule, weight_rule), target)
        decisions.append(Decision(site, input_, weight, input_rule, weight_rule))
    return Plan(
        decisions=tuple(decisions),
        kept=kept_in_float(model, resolution),
        target=target.name if target else None,
        resolution=resolution,
    )


def matches(rule: RuleSection, site: Site) -> bool:
    """Whether every selector of the rule fits the site."""
    named = ((rule.role, site.role), (rule.branch, site.branch or ""), (rule.site, site.name))
    if any(wanted is not None and not fnmatchcase(is_, wanted) for wanted, is_ in named):
        return False
    if rule.max_channels is not None and not 0 < site.narrowest <= rule.max_channels:
        return False
    numbered = ((rule.stage, site.stage), (rule.block, site.block))
    return not any(wanted is not None and wanted != is_ for wanted, is_ in numbered)


def _input_spec(
    site: Site, wanted: TensorSection, number: int, target: Target | None
) -> TensorSpec:
    if not isinstance(wanted.bits, int):
        return _float_spec(site, wanted, number, target, "tensor")
    where = f"rule {number} for {site.name}:"
    if target and wanted.bits != 8:
        raise RecipeError(
            f"{where} {target.name} has no {wanted.bits}-bit activations.",
            "use 8, or quantize.target: null to simulate what no runtime executes",
        )
    unasked = target is not None and target.activations.symmetric
    symmetric = unasked if wanted.symmetric is None else wanted.symmetric
    if target and target.activations.symmetric and not symmetric:
        raise RecipeError(
            f"{where} {target.name} takes no zero point other than 0.",
            "set symmetric: true, or leave it out",
        )
    if symmetric and target and target.weights.reduce_range and site.role in ATTENTION_PRODUCTS:
        raise RecipeError(
            f"{where} two symmetric activations fill 8 bits both, and their products overflow on a "
            "processor without integer dot products.",
            "leave symmetric out, keep the attention in float, or set quantize.full_range: true",
        )
    if wanted.group is not None:
        raise RecipeError(f"{where} activations have no groups.", "set group for the weight")
    granularity = _input_granularity(site, wanted, where, target)
    if granularity == "channel" and wanted.range not in ("min_max", "moving_average"):
        raise RecipeError(
            f"{where} a range by {wanted.range} is per tensor.",
            "use range: min_max with granularity: channel (clipping costs 2 dB there)",
        )
    return TensorSpec(
        bits=wanted.bits,
        granularity=granularity,
        axis=CHANNEL_AXIS,
        symmetric=symmetric,
        range=wanted.range,
    )


def _input_granularity(
    site: Site, wanted: TensorSection, where: str, target: Target | None
) -> Granularity:
    """Per channel, or per head, only where the scales can leave the product again."""
    # No runtime multiplies two activations with a scale for each head; the simulation does.
    apart = site.role in ATTENTION_PRODUCTS
    allowed = target is None or (not apart and target.activations.per_channel_depthwise)
    able = site.role == "depthwise" or site.prescaled or apart
    if wanted.granularity is None:
        clips = wanted.range not in ("min_max", "moving_average")
        unasked = (site.role == "depthwise" or apart) and not clips
        return "channel" if unasked and allowed else "tensor"
    if wanted.granularity == "channel" and not able:
        raise RecipeError(
            f"{where} a product over channels needs one input scale.",
            "granularity: channel is for depthwise convs, pre-normed 1x1 convs and attention heads",
        )
    if wanted.granularity == "channel" and target and not allowed and not site.prescaled:
        raise RecipeError(
            f"{where} {target.name} takes one scale per activation tensor.",
            "leave granularity out, and it is per channel only where the target allows it",
        )
    return wanted.granularity


def _weight_spec(
    site: Site, wanted: TensorSection, number: int, target: Target | None, reduce: bool
) -> TensorSpec:
    if not isinstance(wanted.bits, int):
        return _float_spec(site, wanted, number, target, "channel")
    where = f"rule {number} for {site.name}:"
    if target and wanted.bits not in target.weights.bits:
        able = " or ".join(str(bits) for bits in target.weights.bits)
        raise RecipeError(
            f"{where} {target.name} has no {wanted.bits}-bit weights.",
            f"use {able}, or quantize.target: null to simulate what it does not execute",
        )
    if wanted.symmetric is False:
        raise RecipeError(
            f"{where} weights are symmetric on every target.", "drop symmetric: false"
        )
    if wanted.range not in RANGES_OF_WEIGHTS:
        raise RecipeError(
            f"{where} a weight is no stream of values.", "use range: min_max or mse for weights"
        )
    if wanted.group is not None and site.channels % wanted.group:
        raise RecipeError(
            f"{where} its {site.channels} input channels do not divide into groups of "
            f"{wanted.group}.",
            "choose a divisor, or select fewer sites",
        )
    granularity: Granularity = wanted.granularity or "channel"
    return TensorSpec(
        bits=wanted.bits,
        granularity="group" if wanted.group else granularity,
        group=wanted.group,
        range=wanted.range,
        reduced=reduce and wanted.bits == 8,
    )


def _float_spec(
    site: Site,
    wanted: TensorSection,
    number: int,
    target: Target | None,
    granularity: Granularity,
) -> TensorSpec:
    """A float type; 8-bit floats have one scale for a tensor, of weights one for each channel."""
    if wanted.bits == "fp8":
        if len(wanted.model_dump(exclude_defaults=True)) > 1:
            raise RecipeError(
                f"rule {number} for {site.name}: fp8 has one form: scales of the largest magnitude "
                "/ 448, one for an activation and one for each channel of a weight.",
                "say fp8 and nothing else",
            )
        return TensorSpec("fp8", granularity)
    if wanted.bits in ("fp16", "bf16") and target and target.float_type != wanted.bits:
        raise RecipeError(
            f"rule {number} for {site.name}: {target.name} runs floats in {target.float_type}.",
            f"use float, or quantize.target: null to simulate {wanted.bits}",
        )
    assert not isinstance(wanted.bits, int)
    return TensorSpec(wanted.bits)


def _check_float8(
    site: Site, input_: TensorSpec, weight: TensorSpec | None, number: int, target: Target | None
) -> None:
    """Refuse what is no product of two 8-bit floats, or has no kernel for it."""
    where = f"rule {number} for {site.name}:"
    if target and not target.float8:
        raise RecipeError(
            f"{where} {target.name} has no products of 8-bit floats.",
            "use 8, or a target that has: tensorrt-jetson-thor, tensorrt-gpu, tensorrt-rtx",
        )
    if weight is None or input_.bits != weight.bits:
        raise RecipeError(
            f"{where} fp8 is for the input and the weight of one product, both.",
            "give weight: fp8 and input: fp8, or float where there is no weight",
        )
    if target and (site.role == "depthwise" or site.narrowest <= NO_FLOAT8_KERNEL):
        raise RecipeError(
            f"{where} {target.name} has no FP8 kernel for depthwise convolutions, nor for "
            f"{NO_FLOAT8_KERNEL} channels or fewer.",
            f"end the rules with {{max_channels: {NO_FLOAT8_KERNEL}, weight: float, input: float}} "
            "and the same for role: depthwise",
        )


def _matches_nothing(number: int, rule: RuleSection, sites: Sequence[Site]) -> RecipeError:
    given = rule.model_dump(exclude={"weight", "input"}, exclude_none=True)
    fix = "run care-compress plan to see every site"
    for key in ("role", "branch", "site"):
        wanted = given.get(key)
        known = sorted({getattr(site, "name" if key == "site" else key) or "" for site in sites})
        if wanted is None or any(fnmatchcase(name, wanted) for name in known):
            continue
        near = difflib.get_close_matches(wanted, known, n=1)
        fix = f"did you mean {near[0]}?" if near else fix
        if key != "site" and not near:
            fix = f"known {key}s: {', '.join(name for name in known if name)}"
    selector = ", ".join(f"{key}: {value}" for key, value in given.items())
    return RecipeError(f"rule {number} ({selector}) matches no site.", fix)
