"""How wide each place becomes: the least loss that a budget allows."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from care_compress.slim.places import Place
from care_compress.slim.rank import Ranking

# What all widths cost is held against the budget in this many steps, rounded up at each place: with
# the places of CARE-S2 a budget is underrun by 0.6 % at most.
STEPS = 8000


def choose_widths(
    rankings: Mapping[Place, Ranking],
    options: Mapping[Place, Sequence[int]],
    cost: Callable[[Place, int], float],
    budget: float,
) -> dict[Place, int]:
    """One width of each place's `options`, so that their losses together are least.

    A knapsack with one choice from each place, solved exactly up to the rounding of costs. The
    caller has checked that the narrowest widths fit; where nothing else does, they are the answer.
    """
    unit = budget / STEPS
    best: NDArray[np.float64] = np.zeros(STEPS + 1)  # least loss with at most this many units spent
    chosen: list[tuple[Place, NDArray[np.int64]]] = []
    for place, ranking in rankings.items():
        table = np.full((len(options[place]), STEPS + 1), np.inf)
        for row, width in enumerate(options[place]):
            units = int(np.ceil(cost(place, width) / unit - 1e-9))
            if units <= STEPS:
                loss = ranking.loss[place.channels - width]
                table[row, units:] = best[: STEPS + 1 - units] + loss
        chosen.append((place, table.argmin(axis=0)))
        best = table.min(axis=0)
    if not np.isfinite(best[-1]):
        return {place: min(options[place]) for place in rankings}
    left, widths = STEPS, {}
    for place, rows in reversed(chosen):
        widths[place] = options[place][int(rows[left])]
        left -= int(np.ceil(cost(place, widths[place]) / unit - 1e-9))
    return {place: widths[place] for place in rankings}
