"""Draws the images of ``builtin:shapes``: same seed, split and index, same bits on any machine.

Randomness is the raw words of one Philox stream per image, turned into uniforms here, because
NumPy's distributions may change between releases. The arithmetic is float32 + - * /, square root,
floor and comparisons, which IEEE 754 rounds in one way only; sines, powers and array sums are
avoided, because their last bit depends on the CPU. So an image depends on neither the machine
nor on which images are drawn beside it.

Shape suffixes: B images, P pixels of one image (row by row), S polygon sides. A per-image number
is (B, 1), a field over the image (B, P), a colour (B, 3, 1), an image (B, 3, P).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]
Floats = NDArray[np.float32]

SIZE = 64
FORMS = ("triangle", "square", "star", "disc")
TEXTURES = ("barred", "banded")
TINTS = ("red", "yellow", "green", "blue")
CLASSES = tuple(
    f"{texture}-{tint}-{form}" for form in FORMS for texture in TEXTURES for tint in TINTS
)

SPLIT_KEYS: dict[Split, int] = {"train": 1, "val": 2}
UNIFORMS = 256  # words per image for the scene; the sensor noise takes the words after them
NOISE_WORDS = 2 * 3 * SIZE * SIZE // 8  # two bytes per pixel and channel
PIXELS = SIZE * SIZE

_ROWS, _COLUMNS = np.divmod(np.arange(PIXELS, dtype=np.int64), SIZE)
X_P: Floats = (_COLUMNS - (SIZE - 1) / 2).astype(np.float32)
Y_P: Floats = (_ROWS - (SIZE - 1) / 2).astype(np.float32)

# Outward normals of the regular polygons. A missing side is (0, 0): it never wins the maximum,
# because the largest of a closed polygon's projections is never negative.
_NORMALS = {
    "triangle": ((0.0, 1.0), (0.8660254, -0.5), (-0.8660254, -0.5), (0.0, 0.0), (0.0, 0.0)),
    "square": ((0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)),
    "star": (
        (0.0, 1.0),
        (0.95105652, 0.30901699),
        (0.58778525, -0.80901699),
        (-0.58778525, -0.80901699),
        (-0.95105652, 0.30901699),
    ),
}
_NORMALS["disc"] = _NORMALS["star"]
NORMALS_FS2: Floats = np.array([_NORMALS[form] for form in FORMS], dtype=np.float32)

# Distance from the centre to a side when the form covers as much as a disc of radius 1.
REACH_F: Floats = np.array([0.778, 0.886, 0.95, 1.0], dtype=np.float32)
# How far the corners are rounded at least and at most: a disc is all rounding.
ROUNDING_F2: Floats = np.array(
    [[0.0, 0.36], [0.0, 0.36], [0.0, 0.24], [1.0, 0.82]], dtype=np.float32
)
# How far the sides cave in: 0 is convex, 1 the pentagram.
CAVING_F2: Floats = np.array([[0, 0], [0, 0], [0.85, 0.5], [0, 0]], dtype=np.float32)

# The path of hues; a tint is a stretch of it, with narrow gaps between.
HUES: Floats = np.array(
    [
        [0.9, 0.3, 0.45],
        [0.95, 0.45, 0.25],
        [0.85, 0.8, 0.2],
        [0.35, 0.75, 0.3],
        [0.2, 0.7, 0.7],
        [0.3, 0.4, 0.95],
        [0.65, 0.35, 0.85],
    ],
    dtype=np.float32,
)
TINT_RANGES: Floats = np.array(
    [[0.0, 0.22], [0.26, 0.48], [0.52, 0.74], [0.78, 1.0]], dtype=np.float32
)


class Draws:
    """One uniform stream per image, handed out in a fixed order, one column at a time."""

    def __init__(self, seed: int, split: Split, indices: Sequence[int]) -> None:
        words = np.stack([_words(seed, split, index) for index in indices])
        # 24 bits fill a float32 exactly, so the conversion cannot round.
        self._uniforms = (words[:, :UNIFORMS] >> np.uint64(40)).astype(np.float32) / np.float32(
            1 << 24
        )
        noise = words[:, UNIFORMS:].astype("<u8").view(np.uint8).reshape(len(words), 2, 3, PIXELS)
        self._noise = noise
        self._next = 0
        self.hardness = self.uniform()

    def uniform(self, low: Floats | float = 0.0, high: Floats | float = 1.0) -> Floats:
        """The next number of every image (B, 1), between two bounds."""
        assert self._next < UNIFORMS, "a scene takes more numbers than were drawn for it"
        column = self._uniforms[:, self._next : self._next + 1]
        self._next += 1
        span: Floats = np.subtract(high, low, dtype=np.float32)
        return np.add(low, span * column, dtype=np.float32)

    def graded(self, easy: float, hard: float) -> Floats:
        """Give every image its place between an easy and a hard setting (B, 1)."""
        return np.float32(easy) + np.float32(hard - easy) * self.hardness

    def choice(self, count: int) -> NDArray[np.int64]:
        """The next number of every image as one of ``range(count)`` (B,)."""
        return np.floor(self.uniform(0.0, count)[:, 0]).astype(np.int64)

    def graded_by(self, ends_B2: Floats) -> Floats:
        """Draw between the easy end and where the hardness allows to go (B, 1)."""
        easy, hard = ends_B2[:, :1], ends_B2[:, 1:]
        return easy + (hard - easy) * self.hardness * self.uniform()

    def colour(self, low: Floats | float, high: Floats | float) -> Floats:
        """Three numbers per image as a colour (B, 3, 1)."""
        return np.stack([self.uniform(low, high) for _ in range(3)], axis=1)

    def rotation(self, limit: Floats | float = 1.0) -> tuple[Floats, Floats]:
        """Cosine and sine of an angle between -90 and 90 degrees, each (B, 1)."""
        return _angle(self.uniform(-limit, limit))

    def noise(self) -> Floats:
        """Per pixel and channel, the sum of two bytes centred on 0, in -1..1 (B, 3, P)."""
        total = self._noise[:, 0].astype(np.float32) + self._noise[:, 1].astype(np.float32)
        return total / np.float32(255) - np.float32(1)


def _words(seed: int, split: Split, index: int) -> NDArray[np.uint64]:
    stream = np.random.Philox(key=[seed, SPLIT_KEYS[split]], counter=[0, index, 0, 0])
    words: NDArray[np.uint64] = stream.random_raw(UNIFORMS + NOISE_WORDS)
    return words


def _angle(t: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of 2 atan(t), without calling either."""
    square = t * t
    return (1 - square) / (1 + square), 2 * t / (1 + square)


def render(seed: int, split: Split, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Draw images (B, SIZE, SIZE, 3); image i shows class ``i % len(CLASSES)``."""
    draws = Draws(seed, split, indices)
    labels = np.asarray(indices, dtype=np.int64) % len(CLASSES)
    form, texture, tint = np.unravel_index(labels, (len(FORMS), len(TEXTURES), len(TINTS)))
    reach = draws.graded(3.0, 7.0)
    x, y = draws.uniform(-reach, reach), draws.uniform(-reach, reach)
    canvas = _background(draws)
    _distractor(draws, canvas, x, y)
    _distractor(draws, canvas, x, y)
    radius = draws.uniform(draws.graded(20.0, 15.5), 24.0)
    _patterned(draws, canvas, x, y, radius, form, texture, tint)
    _distractor(draws, canvas, x, y)
    _occluder(draws, canvas, x, y)
    image = _photograph(draws, canvas)
    return np.ascontiguousarray(image.transpose(0, 2, 1)).reshape(-1, SIZE, SIZE, 3)


def _background(draws: Draws) -> Floats:
    """Two soft-edged halves of nearly grey, with slow waves over them."""
    cosine, sine = draws.rotation()
    ramp = np.clip((cosine * X_P + sine * Y_P) / draws.uniform(4.0, 40.0) + 0.5, 0, 1)[:, None]
    grey = draws.uniform(0.25, 0.75)[:, None]
    spread = draws.graded(0.05, 0.16)
    one, two = grey + draws.colour(-spread, spread), grey + draws.colour(-spread, spread)
    waves = _wave(draws, 8.0, 30.0) * _wave(draws, 8.0, 30.0) * draws.graded(0.0, 0.19)
    return one + (two - one) * ramp + waves[:, None]


def _wave(draws: Draws, shortest: float, longest: float) -> Floats:
    """A triangle wave in -1..1 of random direction, period and phase."""
    cosine, sine = draws.rotation()
    return _triangle_wave(
        (cosine * X_P + sine * Y_P) / draws.uniform(shortest, longest) + draws.uniform()
    )


def _triangle_wave(phase: Floats) -> Floats:
    saw: Floats = phase - np.floor(phase)
    wave: Floats = np.abs(saw * 4 - 2) - 1
    return wave


def _distractor(draws: Draws, canvas: Floats, x: Floats, y: Floats) -> None:
    """A smaller patterned form, of any class, away from the centre of the target."""
    cosine, sine = draws.rotation()
    distance = draws.uniform(draws.graded(28.0, 22.0), 34.0) * np.where(
        draws.uniform() < 0.5, -1, 1
    ).astype(np.float32)
    form, texture = draws.choice(len(FORMS)), draws.choice(len(TEXTURES))
    tint = draws.choice(len(TINTS))
    radius = draws.graded(3.0, 7.5)
    _patterned(
        draws, canvas, x + distance * cosine, y + distance * sine, radius, form, texture, tint
    )


def _patterned(
    draws: Draws,
    canvas: Floats,
    x: Floats,
    y: Floats,
    radius: Floats,
    form: NDArray[np.int64],
    texture: NDArray[np.int64],
    tint: NDArray[np.int64],
) -> None:
    """Paint one form with its texture and tint onto the canvas, in place."""
    u, v = X_P - x, Y_P - y
    edge = (_extent(draws, u, v, form) - radius) / draws.uniform(0.6, 1.6)
    cover = np.clip(0.5 - edge, 0, 1)[:, None]
    pattern = _pattern(draws, u, v, texture)[:, None]
    low, high = TINT_RANGES[tint, :1], TINT_RANGES[tint, 1:]
    colour = _hue(draws.uniform(low, high))
    grey = draws.uniform(0.3, 0.7)[:, None]
    colour = grey + (colour - grey) * draws.uniform(draws.graded(0.8, 0.35), 1.0)[:, None]
    shade = 1 + pattern * draws.graded(0.4, 0.2)[:, None]
    canvas += (colour * shade - canvas) * cover


def _stretched(draws: Draws, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Turn, then squeeze one axis and widen the other by up to a quarter."""
    cosine, sine = draws.rotation()
    squeeze = 1 + draws.uniform(-0.19, 0.19) * draws.hardness
    u, v = (cosine * x + sine * y) * squeeze, (cosine * y - sine * x) / squeeze
    return cosine * u - sine * v, sine * u + cosine * v


def _extent(draws: Draws, u: Floats, v: Floats, form: NDArray[np.int64]) -> Floats:
    """The radius of the form through each pixel, for a disc of the same area (B, P).

    Among the projections on the side normals the largest one describes the convex polygon, the
    second largest the star that its extended sides make.
    """
    u, v = _stretched(draws, u, v)
    cosine, sine = draws.rotation(0.2)
    normals = NORMALS_FS2[form]
    first = np.full_like(u, -np.inf)
    second = first.copy()
    for side in range(normals.shape[1]):
        a, b = normals[:, side, :1], normals[:, side, 1:]
        projection = (cosine * a - sine * b) * u + (sine * a + cosine * b) * v
        second = np.maximum(second, np.minimum(first, projection))
        first = np.maximum(first, projection)
    rounding = draws.graded_by(ROUNDING_F2[form])
    caving = draws.graded_by(CAVING_F2[form])
    reach = REACH_F[form][:, None] - caving * np.float32(0.45)
    sided = (first + (second - first) * caving) / reach
    extent: Floats = sided + (np.sqrt(u * u + v * v) - sided) * rounding
    return extent


def _pattern(draws: Draws, u: Floats, v: Floats, texture: NDArray[np.int64]) -> Floats:
    """Upright bars or level bands, within 28 degrees, in -1..1."""
    cosine, sine = draws.rotation(draws.graded(0.15, 0.37))
    barred = (texture == TEXTURES.index("barred"))[:, None]
    along = np.where(barred, cosine * u + sine * v, cosine * v - sine * u)
    wave = _triangle_wave(along / draws.uniform(7.0, 16.0) + draws.uniform())
    sharpened: Floats = np.clip(wave * draws.uniform(1.2, 4.0), -1, 1)
    return sharpened


def _hue(position: Floats) -> Floats:
    """The colour (B, 3, 1) at a position 0..1 of the path of hues."""
    scaled = position[:, 0] * np.float32(len(HUES) - 1)
    left = np.minimum(np.floor(scaled).astype(np.int64), len(HUES) - 2)
    share = (scaled - left.astype(np.float32))[:, None]
    colour: Floats = HUES[left] + (HUES[left + 1] - HUES[left]) * share
    return colour[:, :, None]


def _occluder(draws: Draws, canvas: Floats, x: Floats, y: Floats) -> None:
    """A plain bar of any colour across part of the target."""
    cosine, sine = draws.rotation()
    offset, width = draws.uniform(-12.0, 12.0), draws.graded(-1.0, 2.75)
    distance = np.abs(cosine * (X_P - x) + sine * (Y_P - y) - offset)
    cover = np.clip(width - distance + 0.5, 0, 1)[:, None]
    canvas += (draws.colour(0.1, 0.9) - canvas) * cover


def _photograph(draws: Draws, canvas: Floats) -> NDArray[np.uint8]:
    """Light the scene from one side, tint the light, blur, add sensor noise, round to bytes."""
    cosine, sine = draws.rotation()
    slope = draws.uniform(0.0, 0.012)
    light = draws.uniform(draws.graded(0.8, 0.5), 1.25) * (1 + slope * (cosine * X_P + sine * Y_P))
    lit = (
        canvas * light[:, None] * (1 + draws.colour(-1.0, 1.0) * draws.graded(0.05, 0.25)[:, None])
    )
    lit = lit + (_blurred(lit) - lit) * draws.uniform(0.0, 1.0)[:, None]
    lit = lit + draws.noise() * draws.graded(0.02, 0.12)[:, None]
    levels: Floats = np.clip(lit, 0, 1) * np.float32(255)
    return np.floor(levels + np.float32(0.5)).astype(np.uint8)


def _blurred(image: Floats) -> Floats:
    """A 3x3 box blur; the border is left as it is."""
    grid = image.reshape(*image.shape[:2], SIZE, SIZE)
    rows = grid[:, :, :-2] + grid[:, :, 1:-1] + grid[:, :, 2:]
    out = grid.copy()
    out[:, :, 1:-1, 1:-1] = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / np.float32(9)
    return out.reshape(image.shape)
