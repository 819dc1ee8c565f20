"""How wide each place becomes: the least loss that a budget allows, or two of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from care_compress.slim.places import Place
from care_compress.slim.rank import Ranking

# What all widths cost is held against the budget in this many steps, rounded up at each place: with
# the places of CARE-S2 a budget is underrun by 0.6 % at most.
STEPS = 8000
# The price of a second budget is found to a hundredth; steps between widths are coarser.
NEAR = 1.01


@dataclass(frozen=True)
class Limit:
    """What widths take, and how much of it there is."""

    of: Callable[[Place, int], float]  # one place at one width
    most: float  # all of them together

    def left(self, widths: Mapping[Place, int]) -> float:
        """What widths leave over; less than nothing if they take too much."""
        return self.most - sum(self.of(place, width) for place, width in widths.items())


def choose_widths(
    rankings: Mapping[Place, Ranking], options: Mapping[Place, Sequence[int]], budget: Limit
) -> dict[Place, int]:
    """One width of each place's `options`, so that their losses together are least.

    A knapsack with one choice from each place, solved exactly up to the rounding of costs. The
    caller has checked that the narrowest widths fit; where nothing else does, they are the answer.
    """
    unit = budget.most / STEPS
    best: NDArray[np.float64] = np.zeros(STEPS + 1)  # least loss with at most this many units spent
    chosen: list[tuple[Place, NDArray[np.int64]]] = []
    for place, ranking in rankings.items():
        table = np.full((len(options[place]), STEPS + 1), np.inf)
        for row, width in enumerate(options[place]):
            units = int(np.ceil(budget.of(place, width) / unit - 1e-9))
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
        left -= int(np.ceil(budget.of(place, widths[place]) / unit - 1e-9))
    return {place: widths[place] for place in rankings}


def choose_within_both(
    rankings: Mapping[Place, Ranking],
    options: Mapping[Place, Sequence[int]],
    budget: Limit,
    second: Limit,
) -> dict[Place, int]:
    """The same within two budgets, both of which wider places take more of.

    What the second counts is charged as a loss, at the lowest price that keeps it (Lagrange). That
    meets it in leaps, so what is left of both goes where it wins most, one place after the other.
    """

    def at(price: float) -> dict[Place, int]:
        return choose_widths(_charged(rankings, second, price), options, budget)

    chosen = at(0.0)
    if second.left(chosen) >= 0:
        return chosen
    # From a price that hardly any loss gives way to, up to one that leaves the narrowest of all.
    narrowest = {place: min(options[place]) for place in rankings}
    everything = sum(ranking.loss[-1] for ranking in rankings.values())
    low = high = max(everything / second.most, 1e-6) * 1e-12
    while second.left(chosen := at(high)) < 0:
        if chosen == narrowest:
            return chosen
        low, high = high, 10 * high
    while high > NEAR * low:
        middle = (low * high) ** 0.5
        found = at(middle)
        if second.left(found) < 0:
            low = middle
        else:
            high, chosen = middle, found
    while wider := _widened(chosen, rankings, options, budget, second):
        chosen = chosen | wider
    return chosen


def _charged(
    rankings: Mapping[Place, Ranking], second: Limit, price: float
) -> dict[Place, Ranking]:
    """Rankings whose losses pay for what the second budget counts."""
    return {
        place: replace(
            ranking,
            loss=tuple(
                loss + price * second.of(place, place.channels - gone)
                for gone, loss in enumerate(ranking.loss)
            ),
        )
        for place, ranking in rankings.items()
    }


def _widened(
    chosen: Mapping[Place, int],
    rankings: Mapping[Place, Ranking],
    options: Mapping[Place, Sequence[int]],
    budget: Limit,
    second: Limit,
) -> dict[Place, int]:
    """The wider place that both budgets allow and that wins most of the second; {} if none does."""
    best: dict[Place, int] = {}
    most = 0.0
    for place, width in chosen.items():
        for wider in (one for one in options[place] if one > width):
            changed = {**chosen, place: wider}
            if budget.left(changed) < 0 or second.left(changed) < 0:
                continue
            loss = rankings[place].loss
            won = loss[place.channels - width] - loss[place.channels - wider]
            rate = won / (second.of(place, wider) - second.of(place, width))
            if rate > most:
                best, most = {place: wider}, rate
    return best
