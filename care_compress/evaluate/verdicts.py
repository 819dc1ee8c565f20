"""Did it pay? One sentence for each target, and every budget as a number beside its limit."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from care_compress.evaluate.pairs import changes, drop_interval

Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Drop:
    """Top-1 lost against the baseline, in points, with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def between(cls, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> "Drop":
        """Of answers to the same images: whether each was right."""
        lost, gained = changes(before, after)
        images = len(before)
        return cls(100 * (lost - gained) / images, *drop_interval(lost, gained, images))

    def __str__(self) -> str:
        return f"drop {self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate pays on one target, and why."""

    target: str
    candidate: str
    pays: bool | None  # None: it could not be measured
    text: str


@dataclass(frozen=True)
class Budget:
    """One limit and how the candidate stands to it; no value where nothing could be measured."""

    name: str
    limit: float
    value: float | None
    ok: bool

    def __str__(self) -> str:
        found = "not measured" if self.value is None else f"{self.value:.3g}"
        return f"{'ok    ' if self.ok else 'FAILED'} {self.name}: {found}, limit {self.limit:g}"

    def as_json(self) -> dict[str, Any]:
        """As ``compare.json`` holds it."""
        return asdict(self)


def judge(
    target: str,
    candidate: str,
    speedups: dict[str, Interval],
    drop: Drop | None,
    max_drop: float | None,
    noisy: bool,
    fault: str = "",
) -> Verdict:
    """`speedups` are over what a user could run instead: FP32, and BF16 or FP16 where there is.

    `fault` says why the file is not the model it was made from: such a file never pays.
    """
    if fault:
        text = f"{candidate} does not pay, because {fault}"
        return Verdict(target, candidate, False, text)
    if not speedups or drop is None:
        return Verdict(target, candidate, None, "nothing to compare with was measured")
    parts = [f"{value:.2f}x over {name}" for name, (value, _, _) in speedups.items()]
    told = ", ".join([*parts, str(drop)])
    name, (value, low, high) = min(speedups.items(), key=lambda item: item[1][0])
    between = f"{value:.2f} [{low:.2f}, {high:.2f}] times the speed of {name}"
    if max_drop is not None and drop.value > max_drop:
        return Verdict(
            target,
            candidate,
            False,
            f"{candidate} does not pay, because it loses more than {max_drop:g} points: {told}",
        )
    if low > 1:
        return Verdict(target, candidate, True, f"{candidate} pays: {told}")
    if noisy or high > 1:
        why = "the machine was too noisy to say" if noisy else "the difference is within the noise"
        return Verdict(target, candidate, None, f"{candidate}: {why} ({between}): {told}")
    return Verdict(
        target, candidate, False, f"{candidate} does not pay, because it runs at {between}: {told}"
    )
