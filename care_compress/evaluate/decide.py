"""What a comparison means: a verdict for each target and candidate, and the budgets."""

from collections.abc import Iterator

from care_compress.evaluate.comparison import BF16, CompareOptions, Comparison
from care_compress.evaluate.device_measurements import device_verdict
from care_compress.evaluate.resolve import NamedModel
from care_compress.evaluate.verdicts import Budget, Verdict, judge
from care_compress.files import size_of
from care_compress.recipe.sections import BudgetSection


def decide(found: Comparison, options: CompareOptions) -> None:
    """A verdict for each target and candidate, and the budgets of the candidates."""
    for candidate in found.models[1:]:
        budget = candidate.recipe.budget if candidate.recipe else BudgetSection()
        limit = budget.max_top1_drop if options.max_drop is None else options.max_drop
        for target in found.targets:
            found.verdicts += _verdicts(found, candidate, target, limit)
            least = options.min_speedup or (budget.min_speedup or {}).get(target)
            if least is not None and found.entry(target, candidate.name):
                over = dict(_speedups(found, target, candidate.name)).get(found.baseline.name)
                value = None if over is None else over[0]
                found.budgets.append(_at_least(f"min_speedup on {target}", least, value))
        if limit is not None:
            drops = [found.drop(target, candidate.name) for target in found.targets]
            worst = max((drop.value for drop in drops if drop is not None), default=None)
            found.budgets.append(_at_most(f"max_top1_drop of {candidate.name}", limit, worst))
        if budget.max_size is not None:
            size = max((size_of(p) for p in candidate.files.values()), default=0) / 1e6
            name = f"max_size of {candidate.name} (MB)"
            found.budgets.append(_at_most(name, budget.max_size, size))


def _at_most(name: str, limit: float, value: float | None) -> Budget:
    return Budget(name, limit, value, value is not None and value <= limit)


def _at_least(name: str, limit: float, value: float | None) -> Budget:
    return Budget(name, limit, value, value is not None and value >= limit)


def _verdicts(
    found: Comparison, candidate: NamedModel, target: str, limit: float | None
) -> Iterator[Verdict]:
    drop, fault = found.drop(target, candidate.name), found.fault(target, candidate.name)
    if drop is not None or fault:
        speedups = dict(_speedups(found, target, candidate.name))
        timed = found.latency.get((1, 1), {})
        noisy = any(one.is_noisy for key, one in timed.items() if key.startswith(f"{target}/"))
        yield judge(target, candidate.name, speedups, drop, limit, noisy, fault)
    for board in found.boards.get((target, candidate.name), ()):
        assert candidate.recipe is not None  # a run's
        said = device_verdict(candidate.name, candidate.recipe.precision, board)
        if said is not None:
            yield said


def _speedups(
    found: Comparison, target: str, name: str
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Over each of the baseline's settings, batch 1, one thread."""
    timed = found.latency.get((1, 1), {})
    candidate = timed.get(f"{target}/{name}")
    for other in (found.baseline.name, found.baseline.name + BF16):
        baseline = timed.get(f"{target}/{other}")
        if candidate is not None and baseline is not None:
            yield other, candidate.speedup_over(baseline)
