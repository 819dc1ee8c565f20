"""Paints the images of ``builtin:shapes``: same seed, split and index, same bits on any machine.

The arithmetic is float32 + - * /, square root, floor and comparisons, which IEEE 754 rounds in
one way only; sines, powers and array sums are avoided, because their last bit depends on the CPU.
So an image depends neither on the machine nor on which images are painted beside it.

Shape suffixes: B images, P pixels of one image (row by row), F forms, S polygon sides. A number
per image is (B, 1), a field over the image (B, P), a colour (B, 3, 1), an image (B, 3, P).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from care_compress.data.listing import Split

Floats = NDArray[np.float32]

SPLIT_KEYS: dict[Split, int] = {"train": 1, "val": 2}
UNIFORMS = 128  # words per image for the scene; the sensor noise takes the words after them

SIZE = 64
FORMS = ("triangle", "square", "star", "disc")
TEXTURES = ("barred", "banded")
TINTS = ("red", "yellow", "green", "cyan", "violet")
CLASSES = tuple(
    f"{texture}-{tint}-{form}" for form in FORMS for texture in TEXTURES for tint in TINTS
)


class Field(NamedTuple):
    """The pixels of a square image, row by row, by their distance from its centre."""

    size: int
    x_P: Floats
    y_P: Floats

    @classmethod
    def of(cls, size: int) -> "Field":
        """The field of an image of size x size pixels."""
        rows, columns = np.divmod(np.arange(size * size, dtype=np.int64), size)
        x, y = ((each - (size - 1) / 2).astype(np.float32) for each in (columns, rows))
        return cls(size, x, y)


FIELD = Field.of(SIZE)
X_P, Y_P = FIELD.x_P, FIELD.y_P

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
NORMALS_FSxy: Floats = np.array([_NORMALS[form] for form in FORMS], dtype=np.float32)

# Distance from the centre to a side when the form covers as much as a disc of radius 1.
REACH_F: Floats = np.array([0.778, 0.886, 0.95, 1.0], dtype=np.float32)
# How far corners are rounded in the easiest and the hardest image: a disc is all rounding.
ROUNDING_F2: Floats = np.array([[0.0, 0.2], [0.0, 0.2], [0.0, 0.2], [1.0, 0.92]], dtype=np.float32)
# How far the sides cave in, easiest and hardest: 0 is convex, 1 the pentagram.
CAVING_F2: Floats = np.array([[0, 0], [0, 0], [0.85, 0.65], [0, 0]], dtype=np.float32)

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
    [[0.0, 0.188], [0.203, 0.391], [0.406, 0.594], [0.609, 0.797], [0.812, 1.0]], dtype=np.float32
)


class Draws:
    """One uniform stream per image, handed out in a fixed order, one column at a time.

    Each image has a Philox stream of its own, found by (seed, split, index). Only its raw words are
    taken, and turned into uniforms here: NumPy's distributions may change between releases.
    """

    def __init__(
        self,
        seed: int,
        split: Split,
        indices: Sequence[int],
        noise_bytes: int = 0,
        uniforms: int = UNIFORMS,
    ) -> None:
        count = uniforms + noise_bytes // 8
        key = np.array([seed, SPLIT_KEYS[split]], dtype=np.uint64)
        counters = [np.array([0, index, 0, 0], dtype=np.uint64) for index in indices]
        words: NDArray[np.uint64] = np.stack(
            [np.random.Philox(key=key, counter=counter).random_raw(count) for counter in counters]
        )
        # 24 bits fill a float32 exactly, so the conversion cannot round.
        top = words[:, :uniforms] >> np.uint64(40)
        self._uniforms: Floats = top.astype(np.float32) / np.float32(1 << 24)
        self._noise = words[:, uniforms:].astype("<u8").view(np.uint8).reshape(len(words), 2, -1)
        self._next = 0
        self.hardness = self.uniform()

    def uniform(self, low: Floats | float = 0.0, high: Floats | float = 1.0) -> Floats:
        """The next number of every image (B, 1), between two bounds."""
        assert self._next < self._uniforms.shape[1], (
            "a scene takes more numbers than were drawn for it"
        )
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
        t = self.uniform(-limit, limit)
        square = t * t
        # Of 2 atan(t), without calling a sine.
        return (1 - square) / (1 + square), 2 * t / (1 + square)

    def noise(self) -> Floats:
        """Sums of two noise bytes, centred on 0, in -1..1 (B, noise_bytes / 2)."""
        total = self._noise[:, 0].astype(np.float32) + self._noise[:, 1].astype(np.float32)
        return total / np.float32(255) - np.float32(1)


class Kinds(NamedTuple):
    """What to draw: indices (B,) into FORMS, TEXTURES and TINTS."""

    form: NDArray[np.int64]
    texture: NDArray[np.int64]
    tint: NDArray[np.int64]


def along(axis: tuple[Floats, Floats], x: Floats, y: Floats) -> Floats:
    """Project (x, y) on the direction with this cosine and sine."""
    cosine, sine = axis
    return cosine * x + sine * y


def across(axis: tuple[Floats, Floats], x: Floats, y: Floats) -> Floats:
    """Project (x, y) on the direction a quarter turn further."""
    cosine, sine = axis
    return cosine * y - sine * x


def _mix(one: Floats, two: Floats, share: Floats) -> Floats:
    """All of one at share 0, all of two at share 1."""
    return one + (two - one) * share


def render(seed: int, split: Split, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Draw images (B, SIZE, SIZE, 3); image i shows class ``i % len(CLASSES)``."""
    draws = Draws(seed, split, indices, noise_bytes=2 * 3 * SIZE * SIZE)
    labels = np.asarray(indices, dtype=np.int64) % len(CLASSES)
    kinds = Kinds(*np.unravel_index(labels, (len(FORMS), len(TEXTURES), len(TINTS))))
    reach = draws.graded(3.0, 6.0)
    x, y = draws.uniform(-reach, reach), draws.uniform(-reach, reach)
    canvas = background(draws, FIELD)
    _distractor(draws, canvas, x, y)
    _distractor(draws, canvas, x, y)
    radius = draws.uniform(draws.graded(20.0, 16.5), 24.0)
    _patterned(draws, canvas, x, y, radius, kinds)
    _distractor(draws, canvas, x, y)
    # A plain bar of any colour lies across part of the target.
    slant = along(draws.rotation(), X_P - x, Y_P - y)
    offset, width = draws.uniform(-12.0, 12.0), draws.graded(-1.0, 2.0)
    cover = np.clip(width - np.abs(slant - offset) + 0.5, 0, 1)[:, None]
    canvas += (draws.colour(0.1, 0.9) - canvas) * cover
    image = photograph(draws, canvas, FIELD)
    return np.ascontiguousarray(image.transpose(0, 2, 1)).reshape(-1, SIZE, SIZE, 3)


def background(draws: Draws, field: Field) -> Floats:
    """Two soft-edged halves of nearly grey, with slow waves over them."""
    slant = along(draws.rotation(), field.x_P, field.y_P)
    ramp = np.clip(slant / draws.uniform(4.0, 40.0) + 0.5, 0, 1)[:, None]
    grey = draws.uniform(0.25, 0.75)[:, None]
    spread = draws.graded(0.05, 0.14)
    one, two = grey + draws.colour(-spread, spread), grey + draws.colour(-spread, spread)
    waves = _wave(draws, field) * _wave(draws, field) * draws.graded(0.0, 0.13)
    return _mix(one, two, ramp) + waves[:, None]


def _wave(draws: Draws, field: Field) -> Floats:
    """A triangle wave in -1..1 of random direction, period and phase."""
    slant = along(draws.rotation(), field.x_P, field.y_P)
    return _triangle_wave(slant / draws.uniform(8.0, 30.0) + draws.uniform())


def _triangle_wave(phase: Floats) -> Floats:
    saw: Floats = phase - np.floor(phase)
    wave: Floats = np.abs(saw * 4 - 2) - 1
    return wave


def _distractor(draws: Draws, canvas: Floats, x: Floats, y: Floats) -> None:
    """A smaller patterned form, of any class, away from the centre of the target."""
    cosine, sine = draws.rotation()
    distance = draws.uniform(draws.graded(28.0, 22.0), 34.0)
    distance = np.where(draws.uniform() < 0.5, -distance, distance)
    kinds = Kinds(*(draws.choice(len(cue)) for cue in (FORMS, TEXTURES, TINTS)))
    radius = draws.graded(3.0, 6.5)
    _patterned(draws, canvas, x + distance * cosine, y + distance * sine, radius, kinds)


def _patterned(
    draws: Draws, canvas: Floats, x: Floats, y: Floats, radius: Floats, kinds: Kinds
) -> None:
    """Paint a form with its texture and tint onto every canvas, in place."""
    cover, colour = patterned(draws, X_P - x, Y_P - y, radius, kinds)
    canvas += (colour - canvas) * cover


def patterned(
    draws: Draws, u: Floats, v: Floats, radius: Floats, kinds: Kinds
) -> tuple[Floats, Floats]:
    """How much of each pixel a form around (0, 0) covers (B, 1, P), and its colour (B, 3, P)."""
    edge = (_extent(draws, u, v, kinds.form) - radius) / draws.uniform(0.6, 1.6)
    cover = np.clip(0.5 - edge, 0, 1)[:, None]
    pattern = _pattern(draws, u, v, kinds.texture)[:, None]
    ends_B2 = TINT_RANGES[kinds.tint]
    position = draws.uniform(ends_B2[:, :1], ends_B2[:, 1:])[:, 0] * np.float32(len(HUES) - 1)
    left = np.minimum(np.floor(position).astype(np.int64), len(HUES) - 2)
    share = (position - left.astype(np.float32))[:, None]
    hue = _mix(HUES[left], HUES[left + 1], share)[:, :, None]
    grey = draws.uniform(0.3, 0.7)[:, None]
    colour = _mix(grey, hue, draws.uniform(draws.graded(0.8, 0.45), 1.0)[:, None])
    shade = 1 + pattern * draws.graded(0.35, 0.13)[:, None]
    return cover, colour * shade


def _extent(draws: Draws, u: Floats, v: Floats, form: NDArray[np.int64]) -> Floats:
    """The radius of the form through each pixel, for a disc of the same area (B, P).

    Among the projections on the side normals the largest one describes the convex polygon, the
    second largest the star that its extended sides make.
    """
    # Squeezed along a random direction, and widened across it by as much; the area stays.
    cosine, sine = axis = draws.rotation()
    squeeze = 1 + draws.uniform(-0.1, 0.1) * draws.hardness
    u, v = along(axis, u, v) * squeeze, across(axis, u, v) / squeeze
    u, v = cosine * u - sine * v, sine * u + cosine * v
    cosine, sine = draws.rotation(0.2)
    normals = NORMALS_FSxy[form]
    first = np.full_like(u, -np.inf)
    second = first.copy()
    for side in range(normals.shape[1]):
        a, b = normals[:, side, :1], normals[:, side, 1:]
        projection = (cosine * a - sine * b) * u + (sine * a + cosine * b) * v
        second = np.maximum(second, np.minimum(first, projection))
        first = np.maximum(first, projection)
    rounding = draws.graded_by(ROUNDING_F2[form])
    caving = draws.graded_by(CAVING_F2[form])
    reach: Floats = REACH_F[form][:, None] - caving * np.float32(0.45)
    sided = _mix(first, second, caving) / reach
    return _mix(sided, np.sqrt(u * u + v * v), rounding)


def _pattern(draws: Draws, u: Floats, v: Floats, texture: NDArray[np.int64]) -> Floats:
    """Upright bars or level bands, tilted by up to 6 degrees (easy) or 43 (hard), in -1..1."""
    axis = draws.rotation(draws.graded(0.05, 0.39))
    barred = (texture == TEXTURES.index("barred"))[:, None]
    slant: Floats = np.where(barred, along(axis, u, v), across(axis, u, v))
    wave = _triangle_wave(slant / draws.uniform(8.0, 16.0) + draws.uniform())
    sharpened: Floats = np.clip(wave * draws.uniform(1.2, 4.0), -1, 1)
    return sharpened


def photograph(draws: Draws, canvas: Floats, field: Field) -> NDArray[np.uint8]:
    """Light the scene from one side, tint the light, blur, add sensor noise, round to bytes."""
    # From edge to edge the light falls off by as much, however large the image is.
    steepest = draws.uniform(0.0, 0.012 * SIZE / field.size)
    falloff = 1 + steepest * along(draws.rotation(), field.x_P, field.y_P)
    light = draws.uniform(draws.graded(0.7, 0.3), 1.25) * falloff
    cast = 1 + draws.colour(-1.0, 1.0) * draws.graded(0.05, 0.22)[:, None]
    lit = canvas * light[:, None] * cast
    # A 3x3 box blur; the border is left as it is.
    grid = lit.reshape(*lit.shape[:2], field.size, field.size)
    rows = grid[:, :, :-2] + grid[:, :, 1:-1] + grid[:, :, 2:]
    blurred = grid.copy()
    blurred[:, :, 1:-1, 1:-1] = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / np.float32(9)
    lit = _mix(lit, blurred.reshape(lit.shape), draws.uniform()[:, None])
    noise = draws.noise().reshape(lit.shape)
    lit = lit + noise * draws.graded(0.01, 0.05)[:, None]
    levels: Floats = np.clip(lit, 0, 1) * np.float32(255)
    image: NDArray[np.uint8] = np.floor(levels + np.float32(0.5)).astype(np.uint8)
    return image
