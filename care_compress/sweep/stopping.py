"""Early stopping: trainings that cannot win end before they are through.

Asynchronous successive halving (ASHA; Li et al. 2018, arXiv:1810.05934): after `first`, `first` *
`factor`, `first` * factor^2, ... validations a training goes on only if it is, by then, among the
best 1 / `factor` of all that came so far. Nobody waits for the others; who comes first goes on.
"""

import math

from care_compress.errors import CareError


class StoppedEarly(CareError):
    """A training that is not among the best after so many validations."""


class Rungs:
    """What every training of a sweep had reached after so many validations."""

    def __init__(self, first: int, factor: int) -> None:
        self.first, self.factor = first, factor
        self._reached: dict[tuple[str, int], dict[str, float]] = {}

    def goes_on(self, group: str, trial: str, validations: int, accuracy: float) -> bool:
        """Note what a trial reached; whether it goes on. Groups are compared each by itself."""
        if not self._is_rung(validations):
            return True
        rung = self._reached.setdefault((group, validations), {})
        rung[trial] = accuracy  # the same one again, if the trial resumed below this rung
        better = sum(other > accuracy for other in rung.values())
        return better < math.ceil(len(rung) / self.factor)

    def _is_rung(self, validations: int) -> bool:
        rung = self.first
        while rung < validations:
            rung *= self.factor
        return rung == validations
