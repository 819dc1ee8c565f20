"""Automatic mixed precision: bits per site, cheapest within an accuracy budget.

Each site alone is measured at every precision on offer, which gives it a noise and a cost. From
all-float, the step (one site to its next lower precision) with the most cost saved per noise added
comes first, so a prefix of that sequence is a candidate network. Its accuracy falls with its
length, up to noise, so bisection finds the longest prefix within the budget; what trials are left
try single further steps. Given a cost to reach, the shortest prefix that reaches it comes first,
and if its drop is within the budget the search is over. Every trial is a whole PTQ run with its
real drop, bounded in number and minutes, and the best so far is what it ends with.
"""

import bisect
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from care_compress.errors import RecipeError
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import PtqJob, Quantized, first_images, planned, quantize_network
from care_compress.quantize.sensitivity import logits_of, only
from care_compress.quantize.spec import Plan
from care_compress.recipe.quantize import QuantizeSection, RuleSection, SearchSection, TensorSection
from care_compress.recipe.target import load_target

NOISE_IMAGES = 96  # that a site's noise is measured on
BATCH = 32
LADDER = ("float", "w8a8", "w4a8", "w4a4")  # from dear to cheap
TENSORS: dict[str, tuple[TensorSection, TensorSection]] = {  # (weight, input)
    "float": (TensorSection(bits="float"), TensorSection(bits="float")),
    "w8a8": (TensorSection(bits=8), TensorSection(bits=8)),
    "w4a8": (TensorSection(bits=4, range="mse"), TensorSection(bits=8)),
    "w4a4": (TensorSection(bits=4, range="mse"), TensorSection(bits=4, range="mse")),
}
DEPTHWISE = ("dwconv1", "dwconv2", "dwconvatt_1", "dwconvatt_2", "inter1_conv", "inter2_conv")

# A quantized network in, its drop in points out.
Judge = Callable[[QuantizedCare], float]


@dataclass(frozen=True)
class Trial:
    """One network that was tried."""

    steps: int
    cost: float
    drop: float
    within: bool


@dataclass
class Found:
    """What a search ends with."""

    quantized: Quantized
    cost: float
    section: QuantizeSection  # with a rule for every searched site, so that it can be run again
    trials: list[Trial]

    def trail(self) -> list[dict[str, float | int | bool]]:
        """Every trial, in order, as plain data."""
        return [asdict(trial) for trial in self.trials]


@dataclass(frozen=True)
class Step:
    """One site to one lower precision."""

    site: str
    precision: str


def search_bits(
    job: PtqJob,
    section: QuantizeSection,
    max_drop: float,
    judge: Judge,
    report: Callable[[Trial], None],
) -> Found:
    """Search as ``quantize.search`` says."""
    assert section.search is not None
    steps = _ordered_steps(job, section)
    deadline = time.monotonic() + 60 * section.search.minutes
    hunt = _Hunt(job, section, steps, max_drop, judge, report)

    def may_go_on() -> bool:
        assert section.search is not None
        left = len(hunt.trials) < section.search.trials and time.monotonic() < deadline
        return left and not hunt.reached(section.search.max_cost)

    # low steps hold the budget; all steps down may, or as much of it as is asked for.
    low, high = 0, hunt.steps_to_reach(section.search.max_cost)
    if hunt.try_steps(range(high)):
        return hunt.found()
    while high - low > 1 and may_go_on():
        middle = (low + high) // 2
        low, high = (middle, high) if hunt.try_steps(range(middle)) else (low, middle)
    chosen = set(range(low))
    for number in range(low + 1, len(steps)):
        if not may_go_on():
            break
        if hunt.try_steps(sorted(chosen | {number})):
            chosen.add(number)
    return hunt.found()


class _Hunt:
    """Tries networks and remembers the best."""

    def __init__(
        self,
        job: PtqJob,
        section: QuantizeSection,
        steps: Sequence[Step],
        max_drop: float,
        judge: Judge,
        report: Callable[[Trial], None],
    ) -> None:
        self.job = job
        self.section = section
        self.steps = steps
        self.max_drop = max_drop
        self.judge = judge
        self.report = report
        self.trials: list[Trial] = []
        self._best: tuple[float, Quantized, QuantizeSection] | None = None

    def steps_to_reach(self, max_cost: float | None) -> int:
        """The fewest steps, in order, that cost no more than this; all of them if none do."""
        if max_cost is None:
            return len(self.steps)
        counts = range(len(self.steps))
        return bisect.bisect_left(counts, True, key=lambda n: self._cost_of(n) <= max_cost)

    def reached(self, max_cost: float | None) -> bool:
        """Whether the best so far costs no more than this."""
        return max_cost is not None and self._best is not None and self._best[0] <= max_cost

    def _cost_of(self, count: int) -> float:
        section = _with_steps(self.section, self.steps, range(count))
        assert self.section.search is not None
        plan = planned(self.job.network, section, self.job.resolution)[1]
        return _cost(plan, self.section.search)

    def try_steps(self, numbers: Sequence[int]) -> bool:
        """Quantize with these steps taken; whether the drop is within the budget."""
        section = _with_steps(self.section, self.steps, numbers)
        made = quantize_network(self.job, section)
        assert self.section.search is not None
        cost = _cost(made.model.plan, self.section.search)
        drop = self.judge(made.model)
        trial = Trial(len(numbers), cost, drop, drop <= self.max_drop)
        self.trials.append(trial)
        self.report(trial)
        if trial.within and (self._best is None or cost < self._best[0]):
            self._best = (cost, made, section)
        return trial.within

    def found(self) -> Found:
        """The cheapest network within the budget; if there is none, 8 bits, and then float."""
        first = [n for n, step in enumerate(self.steps) if step.precision == LADDER[1]]
        for steps in (first, []):
            if self._best is None:
                self.try_steps(steps)
        if self._best is None:
            raise RecipeError(
                f"what the search may not change already loses {self.trials[-1].drop:.2f} points, "
                f"more than budget.max_top1_drop {self.max_drop}.",
                "leave attention, residual_add and fp16 sites in float, or raise the budget",
            )
        cost, made, section = self._best
        return Found(made, cost, section, self.trials)


def _with_steps(
    section: QuantizeSection, steps: Sequence[Step], numbers: Sequence[int]
) -> QuantizeSection:
    """The section with a rule for every searched site, after these steps."""
    reached = {step.site: "float" for step in steps}
    for number in numbers:
        step = steps[number]
        if LADDER.index(step.precision) > LADDER.index(reached[step.site]):
            reached[step.site] = step.precision
    rules = []
    for site, precision in reached.items():
        weight, input_ = TENSORS[precision]
        if precision == "w4a4" and site.endswith(DEPTHWISE):
            input_ = TensorSection(bits=4)  # per channel, where clipping only loses
        rules.append(RuleSection(site=site, weight=weight, input=input_))
    return section.model_copy(update={"rules": (*section.rules, *rules), "search": None})


def _cost(plan: Plan, search: SearchSection) -> float:
    if search.cost == "energy":
        return plan.energy_mj
    return float(sum(decision.bit_operations for decision in plan.decisions))


def _ordered_steps(job: PtqJob, section: QuantizeSection) -> list[Step]:
    """Every site's way down the precisions, most saving for the least noise first."""
    plan = planned(job.network, section, job.resolution)[1]
    precisions = _precisions(section)
    sites = [
        decision.site.name
        for decision in plan.decisions
        if decision.site.weighted and decision.input.is_integer
    ]
    noise = {precision: _noises(job, section, sites, precision) for precision in precisions[1:]}
    costs = {precision: _site_costs(job, section, sites, precision) for precision in precisions}

    def price(site: str, level: int) -> float:
        """Noise added per cost saved by going from the level above to this one."""
        above, here = precisions[level - 1], precisions[level]
        before = noise[above][site] if level > 1 else 0.0
        saved = max(costs[above][site] - costs[here][site], 1e-30)
        return max(noise[here][site] - before, 0.0) / saved

    waiting = [(price(site, 1), site, 1) for site in sites]
    heapq.heapify(waiting)
    steps = []
    while waiting:
        _, site, level = heapq.heappop(waiting)
        steps.append(Step(site, precisions[level]))
        if level + 1 < len(precisions):
            heapq.heappush(waiting, (price(site, level + 1), site, level + 1))
    return steps


def _precisions(section: QuantizeSection) -> list[str]:
    """The precisions that the target executes."""
    if section.target is None:
        return list(LADDER)
    return [
        name
        for name in LADDER
        if TENSORS[name][1].bits in ("float", 8)
        and TENSORS[name][0].bits in ("float", *load_target(section.target).weights.bits)
    ]


def _all_at(section: QuantizeSection, sites: Sequence[str], precision: str) -> QuantizeSection:
    steps = [Step(site, precision) for site in sites]
    return _with_steps(section, steps, range(len(steps)))


@torch.inference_mode()
def _noises(
    job: PtqJob, section: QuantizeSection, sites: Sequence[str], precision: str
) -> dict[str, float]:
    """Squared logit error of each site alone at this precision."""
    quick = {"reconstruct": None, "bias_correction": False, "norm_reestimation": False}
    plain = _all_at(section, sites, precision).model_copy(update=quick)
    model = quantize_network(job, plain).model
    images: Sequence[Tensor] = torch.split(first_images(job.batches, NOISE_IMAGES), BATCH)
    model.enable(False)
    wanted = logits_of(model, images)
    found = {}
    for site in sites:
        only(model, {site})
        found[site] = float((logits_of(model, images) - wanted).double().square().mean())
    return found


def _site_costs(
    job: PtqJob, section: QuantizeSection, sites: Sequence[str], precision: str
) -> dict[str, float]:
    assert section.search is not None
    plan = planned(job.network, _all_at(section, sites, precision), job.resolution)[1]
    energy = section.search.cost == "energy"
    decisions = {decision.site.name: decision for decision in plan.decisions}
    return {
        site: decisions[site].energy_pj if energy else float(decisions[site].bit_operations)
        for site in sites
    }
