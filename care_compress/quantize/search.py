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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from care_compress.errors import RecipeError
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import PtqJob, Quantized, first_images, planned, quantize_network
from care_compress.quantize.sensitivity import logits_of, only
from care_compress.quantize.spec import Plan
from care_compress.recipe.quantize import QuantizeSection, RuleSection, SearchSection, TensorSection
from care_compress.recipe.sections import DROPS
from care_compress.recipe.target import load_target
from care_compress.tasks.known import task_called

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
# A quantized network, the section it was made by, images and sites; the noise of each comes back.
MeasureNoises = Callable[
    [QuantizedCare, QuantizeSection, Sequence[Tensor], Sequence[str]], Mapping[str, float]
]


@dataclass(frozen=True)
class Trial:
    """One network that was tried."""

    steps: int
    cost: float
    drop: float
    within: bool


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    quantized: Quantized
    cost: float
    section: QuantizeSection  # with a rule for every searched site, so that it can be run again
    trials: list[Trial]


@dataclass(frozen=True)
class Step:
    """One site to one lower precision."""

    site: str
    precision: str


def noises_here(
    model: QuantizedCare,
    section: QuantizeSection,
    images: Sequence[Tensor],
    sites: Sequence[str],
) -> dict[str, float]:
    """Measure every site in this process."""
    model.enable(False)
    wanted = logits_of(model, images)
    return {site: noise_of(model, images, wanted, site) for site in sites}


@torch.inference_mode()
def noise_of(model: QuantizedCare, images: Sequence[Tensor], wanted: Tensor, site: str) -> float:
    """Squared error of the answers with this site quantized and no other."""
    task = task_called(model.task)
    only(model, {site})
    error = task.weighed(logits_of(model, images), wanted) - task.weighed(wanted, wanted)
    return float(error.double().square().mean())


def search_bits(
    job: PtqJob,
    section: QuantizeSection,
    max_drop: float,
    judge: Judge,
    report: Callable[[Trial], None],
    measure: MeasureNoises = noises_here,
) -> Found:
    """Search as ``quantize.search`` says.

    `measure` may spread the sites over processes: each is measured by itself.
    """
    search = section.search
    assert search is not None
    steps = _ordered_steps(job, section, search, measure)
    deadline = time.monotonic() + 60 * search.minutes
    hunt = _Hunt(job, section, search, steps, max_drop, judge, report)

    def may_go_on() -> bool:
        left = len(hunt.trials) < search.trials and time.monotonic() < deadline
        reached = (
            search.max_cost is not None
            and hunt.best is not None
            and hunt.best.cost <= search.max_cost
        )
        return left and not reached

    # low steps hold the budget; all steps down may, or as much of it as is asked for.
    low, high = 0, hunt.steps_to_reach()
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


@dataclass
class _Hunt:
    """Tries networks and remembers the best."""

    job: PtqJob
    section: QuantizeSection
    search: SearchSection
    steps: Sequence[Step]
    max_drop: float
    judge: Judge
    report: Callable[[Trial], None]
    trials: list[Trial] = field(default_factory=list)
    best: Found | None = None

    def after(self, numbers: Iterable[int]) -> QuantizeSection:
        """The section after these steps."""
        reached = {step.site: "float" for step in self.steps}
        for number in numbers:
            step = self.steps[number]
            if LADDER.index(step.precision) > LADDER.index(reached[step.site]):
                reached[step.site] = step.precision
        return _with_precisions(self.section, reached)

    def steps_to_reach(self) -> int:
        """The fewest steps, in order, that cost no more than asked for; all if none do."""
        max_cost = self.search.max_cost
        if max_cost is None:
            return len(self.steps)

        def cheap_enough(count: int) -> bool:
            plan = planned(self.job.network, self.after(range(count)), self.job.resolution)[1]
            return _cost(plan, self.search) <= max_cost

        return bisect.bisect_left(range(len(self.steps)), True, key=cheap_enough)

    def try_steps(self, numbers: Sequence[int]) -> bool:
        """Quantize with these steps taken; whether the drop is within the budget."""
        section = self.after(numbers)
        made = quantize_network(self.job, section)
        cost = _cost(made.model.plan, self.search)
        drop = self.judge(made.model)
        trial = Trial(len(numbers), cost, drop, drop <= self.max_drop)
        self.trials.append(trial)
        self.report(trial)
        if trial.within and (self.best is None or cost < self.best.cost):
            self.best = Found(made, cost, section, self.trials)
        return trial.within

    def found(self) -> Found:
        """The cheapest network within the budget; if there is none, 8 bits, and then float."""
        first = [n for n, step in enumerate(self.steps) if step.precision == LADDER[1]]
        for steps in (first, []):
            if self.best is None:
                self.try_steps(steps)
        if self.best is None:
            raise RecipeError(
                f"what the search may not change already loses {self.trials[-1].drop:.2f} points, "
                f"more than budget.{DROPS[task_called(self.job.network.task).name]} "
                f"{self.max_drop}.",
                "leave attention, residual_add and fp16 sites in float, or raise the budget",
            )
        return self.best


def _with_precisions(section: QuantizeSection, precisions: Mapping[str, str]) -> QuantizeSection:
    """The section with a rule for every searched site."""
    rules = []
    for site, precision in precisions.items():
        weight, input_ = TENSORS[precision]
        if precision == "w4a4" and site.endswith(DEPTHWISE):
            input_ = TensorSection(bits=4)  # per channel, where clipping only loses
        rules.append(RuleSection(site=site, weight=weight, input=input_))
    return section.model_copy(update={"rules": (*section.rules, *rules), "search": None})


def _cost(plan: Plan, search: SearchSection) -> float:
    if search.cost == "energy":
        return plan.energy_mj
    return float(sum(decision.bit_operations for decision in plan.decisions))


def _ordered_steps(
    job: PtqJob, section: QuantizeSection, search: SearchSection, measure: MeasureNoises
) -> list[Step]:
    """Every site's way down the precisions, most saving for the least noise first."""
    # The precisions that the target executes.
    precisions = list(LADDER)
    if section.target is not None:
        able = load_target(section.target).weights.bits
        precisions = [
            name
            for name, (weight, input_) in TENSORS.items()
            if input_.bits in ("float", 8) and weight.bits in ("float", *able)
        ]
    decisions = planned(job.network, section, job.resolution)[1].decisions
    sites = [d.site.name for d in decisions if d.site.weighted and d.input.is_integer]
    noise = {
        precision: _noises(job, section, sites, precision, measure) for precision in precisions[1:]
    }
    costs: dict[str, dict[str, float]] = {}
    for precision in precisions:
        alike = _with_precisions(section, dict.fromkeys(sites, precision))
        costs[precision] = {
            d.site.name: d.energy_pj if search.cost == "energy" else float(d.bit_operations)
            for d in planned(job.network, alike, job.resolution)[1].decisions
        }

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


@torch.inference_mode()
def _noises(
    job: PtqJob,
    section: QuantizeSection,
    sites: Sequence[str],
    precision: str,
    measure: MeasureNoises,
) -> Mapping[str, float]:
    """Squared error of the answers of each site alone at this precision."""
    quick = {"reconstruct": None, "bias_correction": False, "norm_reestimation": False}
    alike = _with_precisions(section, dict.fromkeys(sites, precision))
    plain = alike.model_copy(update=quick)
    model = quantize_network(job, plain).model
    images = torch.split(first_images(job.batches, NOISE_IMAGES), BATCH)
    return measure(model, plain, images, sites)
