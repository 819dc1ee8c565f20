"""Learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math

from care_compress.sections import TrainSection

ONE_CYCLE_START = 1 / 25  # where one-cycle begins, as a fraction of its peak


def learning_rate(step: int, steps_per_epoch: int, plan: TrainSection) -> float:
    """The rate of one step: warm-up, then a cosine down to ``final_lr_fraction`` of the peak.

    `cosine` warms up on a line from zero; `one_cycle` on a cosine from 1/25 of the peak.
    """
    peak, final = plan.learning_rate, plan.learning_rate * plan.final_lr_fraction
    warmup = round(plan.warmup_epochs * steps_per_epoch)
    total = plan.total_steps(steps_per_epoch)
    if step < warmup:
        if plan.schedule == "one_cycle":
            return _cosine(peak * ONE_CYCLE_START, peak, step / warmup)
        return peak * (step + 1) / warmup
    return _cosine(peak, final, (step - warmup) / max(1, total - 1 - warmup))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
