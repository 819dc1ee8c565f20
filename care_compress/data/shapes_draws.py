"""Random numbers for ``builtin:shapes`` that are the same with every NumPy and on every machine.

Each image has a Philox stream of its own, found by (seed, split, index). Only its raw words are
taken, and turned into uniforms here: NumPy's distributions may change between releases.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]
Floats = NDArray[np.float32]

SPLIT_KEYS: dict[Split, int] = {"train": 1, "val": 2}
UNIFORMS = 128  # words per image for the scene; the sensor noise takes the words after them


class Draws:
    """One uniform stream per image, handed out in a fixed order, one column at a time."""

    def __init__(
        self, seed: int, split: Split, indices: Sequence[int], noise_bytes: int = 0
    ) -> None:
        count = UNIFORMS + noise_bytes // 8
        words = np.stack([_words(seed, split, index, count) for index in indices])
        # 24 bits fill a float32 exactly, so the conversion cannot round.
        top = words[:, :UNIFORMS] >> np.uint64(40)
        self._uniforms: Floats = top.astype(np.float32) / np.float32(1 << 24)
        self._noise = words[:, UNIFORMS:].astype("<u8").view(np.uint8).reshape(len(words), 2, -1)
        self._next = 0
        self.hardness = self.uniform()

    def uniform(self, low: Floats | float = 0.0, high: Floats | float = 1.0) -> Floats:
        """The next number of every image (B, 1), between two bounds."""
        assert self._next < UNIFORMS, "a scene takes more numbers than were drawn for it"
        column = self._uniforms[:, self._next : self._next + 1]
        self._next += 1
        span: Floats = np.subtract(high, low, dtype=np.float32)
        drawn: Floats = np.add(low, span * column, dtype=np.float32)
        return drawn

    def graded(self, easy: float, hard: float) -> Floats:
        """Give every image its place between an easy and a hard setting (B, 1)."""
        return np.float32(easy) + np.float32(hard - easy) * self.hardness

    def choice(self, count: int) -> NDArray[np.int64]:
        """The next number of every image as one of ``range(count)`` (B,)."""
        return np.floor(self.uniform(0.0, count)[:, 0]).astype(np.int64)

    def graded_by(self, ends_B2: Floats) -> Floats:
        """Draw between the easy end and where the hardness allows to go (B, 1)."""
        easy, hard = ends_B2[:, :1], ends_B2[:, 1:]
        return easy + (hard - easy) * (self.hardness * self.uniform())

    def colour(self, low: Floats | float, high: Floats | float) -> Floats:
        """Three numbers per image as a colour (B, 3, 1)."""
        return np.stack([self.uniform(low, high) for _ in range(3)], axis=1)

    def rotation(self, limit: Floats | float = 1.0) -> tuple[Floats, Floats]:
        """Cosine and sine of an angle within +-2 atan(limit), each (B, 1)."""
        return _angle(self.uniform(-limit, limit))

    def noise(self) -> Floats:
        """Sums of two noise bytes, centred on 0, in -1..1 (B, noise_bytes / 2)."""
        total = self._noise[:, 0].astype(np.float32) + self._noise[:, 1].astype(np.float32)
        return total / np.float32(255) - np.float32(1)


def _words(seed: int, split: Split, index: int, count: int) -> NDArray[np.uint64]:
    key = np.array([seed, SPLIT_KEYS[split]], dtype=np.uint64)
    counter = np.array([0, index, 0, 0], dtype=np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return words


def _angle(t: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of 2 atan(t), without calling either."""
    square = t * t
    return (1 - square) / (1 + square), 2 * t / (1 + square)
