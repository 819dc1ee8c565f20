"""``builtin:scenes``: 2,500 drawn images with masks and boxes that need no download.

Three to seven objects of six classes lie among squares, bars and waves that are none. A class is
a form and a tint, such as ``red-star``, and neither alone tells it: squares come in these tints,
and these forms in another. Objects are small and large, pale and strong, covered by others and by
bars; one drawing gives the pixels, the mask and the boxes of what is visible.

Drawn splits are kept as those of `builtin:shapes` are. A pixel is four bytes: red, green, blue,
and which object it shows.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from care_compress.data.annotations import Annotation, Boxes, Kind, Mask
from care_compress.data.checks import digest_of
from care_compress.data.listing import Split
from care_compress.data.shapes import Pixels, cached
from care_compress.data.shapes_render import (
    FORMS,
    TEXTURES,
    TINTS,
    Draws,
    Field,
    Floats,
    Kinds,
    along,
    background,
    patterned,
    photograph,
)
from care_compress.files import cache_folder

# Part of every file name and image name: raise it with any change of the drawn bits.
VERSION = "v1"
COUNTS: dict[Split, int] = {"train": 2_000, "val": 500}
SIZE = 128
FIELD = Field.of(SIZE)

OBJECT_FORMS = ("triangle", "star", "disc")
OBJECT_TINTS = ("red", "yellow")  # neighbours on the path of hues
CLASSES = tuple(f"{tint}-{form}" for tint in OBJECT_TINTS for form in OBJECT_FORMS)
BACKGROUND = "background"  # a class of masks, not of boxes

FEWEST, MOST = 3, 7
SMALLEST, LARGEST = 5.0, 20.0  # radius of a disc of the same area, in pixels
PATCH = 80  # pixels to a side that hold any object: the tips of a star reach 1.9 radii
UNIFORMS = 320
HIDDEN = 0.25  # an object of which less is visible is crowd

# The fourth byte: 0 for no object, else its number, its class and whether it is crowd.
NUMBER, CLASS, CROWD = 0b111, 3, 0b1000000


class Scenes:
    """One split as `AnnotatedSamples`; drawn on first use and then mapped from the cache."""

    in_memory = True
    unlabelled = 0

    def __init__(self, split: Split, kind: Kind) -> None:
        self.split = split
        self.kind = kind
        self.classes = (BACKGROUND, *CLASSES) if kind == "masks" else CLASSES
        self.labels: NDArray[np.int64] = np.zeros(COUNTS[split], np.int64)
        self._path = cache_folder() / f"scenes-{VERSION}-{split}.npy"
        self._pixels: Pixels | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the pixels: a worker process maps the same file again."""
        return {**self.__dict__, "_pixels": None}

    @property
    def pixels(self) -> Pixels:
        """All images (N, SIZE, SIZE, 4), read-only."""
        if self._pixels is None:
            self._pixels = cached(
                self._path, (len(self), SIZE, SIZE, 4), partial(render, self.split)
            )
        return self._pixels

    def name(self, index: int) -> str:
        """Such as ``scenes-v1/val/00012``."""
        return f"scenes-{VERSION}/{self.split}/{range(len(self))[index]:05d}"

    def image(self, index: int) -> Image.Image:
        """The image as RGB."""
        return Image.fromarray(np.ascontiguousarray(self.pixels[index, :, :, :3]))

    def hashed(self, index: int) -> tuple[Image.Image, int]:
        """`image`, and a digest of its pixels."""
        image = self.image(index)
        return image, digest_of(image.tobytes())

    def annotation(self, index: int) -> Annotation:
        """The mask, or the boxes of what is visible."""
        shown = np.array(self.pixels[index, :, :, 3])
        return mask_of(shown) if self.kind == "masks" else boxes_of(shown)

    def fingerprint(self) -> str:
        """Hex digest of names and classes: the version in the names stands for the bits."""
        text = "\n".join([self.name(0), str(len(self)), self.kind, *self.classes])
        return hashlib.sha256(text.encode()).hexdigest()

    def content_digest(self) -> str:
        """The fingerprint."""
        return self.fingerprint()


def mask_of(shown: NDArray[np.uint8]) -> Mask:
    """Classes counted from 1, and 0 for the background, from the fourth bytes (H, W)."""
    classes = ((shown >> CLASS) & NUMBER) + 1
    return np.where(shown == 0, 0, classes).astype(np.uint8)


def boxes_of(shown: NDArray[np.uint8]) -> Boxes:
    """The smallest box around the visible pixels of every object, from the fourth bytes (H, W)."""
    codes = [int(code) for code in np.unique(shown) if code]
    corners = np.zeros((len(codes), 4), np.float32)
    for row, code in enumerate(codes):
        y, x = np.nonzero(shown == code)
        corners[row] = x.min(), y.min(), x.max() + 1, y.max() + 1
    classes = np.array([code >> CLASS & NUMBER for code in codes], np.int64)
    crowd = np.array([bool(code & CROWD) for code in codes], bool)
    height, width = shown.shape
    return Boxes(corners, classes, crowd, (height, width))


class Canvas:
    """Pictures in the making (B, 3, P), and the number of the object that each pixel shows."""

    def __init__(self, colours: Floats) -> None:
        self.colours = np.ascontiguousarray(colours)
        self.numbers = np.zeros((len(colours), SIZE * SIZE), np.uint8)

    def form(
        self, draws: Draws, kinds: Kinds, radius: Floats, drawn: NDArray[np.bool_], number: int
    ) -> None:
        """Paint a form somewhere on the pictures where `drawn`; the number 0 is of no object.

        Only the patch around it is computed.
        """
        reach = SIZE / 2 - 4
        x, y = draws.uniform(-reach, reach), draws.uniform(-reach, reach)
        corner = (np.floor(part + (SIZE - PATCH) / 2).astype(np.int64) for part in (x, y))
        left, top = (part.clip(0, SIZE - PATCH) for part in corner)
        rows, columns = np.divmod(np.arange(PATCH * PATCH), PATCH)
        patch = (top + rows) * SIZE + left + columns
        cover, colour = patterned(draws, FIELD.x_P[patch] - x, FIELD.y_P[patch] - y, radius, kinds)
        cover = cover * drawn[:, None, None]
        cover, colour = (part.reshape(len(part), -1, PATCH, PATCH) for part in (cover, colour))
        corners = np.concatenate([top, left], axis=1).tolist()
        for picture, (y0, x0) in enumerate(corners):  # slices: an indexed copy takes four times it
            rows_columns = slice(y0, y0 + PATCH), slice(x0, x0 + PATCH)
            below = self.colours[picture].reshape(3, SIZE, SIZE)[:, *rows_columns]
            below += (colour[picture] - below) * cover[picture]
            numbers = self.numbers[picture].reshape(SIZE, SIZE)[rows_columns]
            numbers[cover[picture, 0] > 0.5] = number

    def bar(self, draws: Draws) -> None:
        """Lay a thin straight bar of any colour across the pictures."""
        slant = along(draws.rotation(), FIELD.x_P, FIELD.y_P)
        offset, width = draws.uniform(-48.0, 48.0), draws.uniform(0.5, draws.graded(1.5, 3.5))
        cover = np.clip(width - np.abs(slant - offset) + np.float32(0.5), 0, 1)
        self.colours += (draws.colour(0.1, 0.9) - self.colours) * cover[:, None]
        self.numbers[cover > 0.5] = 0


def render(split: Split, indices: Sequence[int]) -> Pixels:
    """Draw images (B, SIZE, SIZE, 4): pixels, and which object each shows."""
    draws = Draws(0, split, indices, noise_bytes=2 * 3 * SIZE * SIZE, uniforms=UNIFORMS)
    canvas = Canvas(background(draws, FIELD))
    everywhere = np.ones(len(indices), bool)
    for _ in range(2):  # any form in a tint of no class, and squares in any tint
        canvas.form(draws, _clutter(draws, OBJECT_FORMS, ("green",)), _radius(draws), everywhere, 0)
        canvas.form(draws, _clutter(draws, ("square",), TINTS), _radius(draws), everywhere, 0)
    count = draws.choice(MOST - FEWEST + 1) + FEWEST
    classes = np.zeros((len(indices), MOST + 1), np.uint8)
    areas = np.zeros((len(indices), MOST + 1), np.float32)
    for number in range(1, MOST + 1):
        classes[:, number] = draws.choice(len(CLASSES))
        tint, form = np.divmod(classes[:, number].astype(np.int64), len(OBJECT_FORMS))
        kinds = Kinds(
            np.array([FORMS.index(name) for name in OBJECT_FORMS])[form],
            draws.choice(len(TEXTURES)),
            np.array([TINTS.index(name) for name in OBJECT_TINTS])[tint],
        )
        drawn = number <= count
        radius = _radius(draws)
        canvas.form(draws, kinds, radius, drawn, number)
        areas[:, number] = radius[:, 0] * radius[:, 0] * np.float32(np.pi)
    canvas.bar(draws)
    canvas.bar(draws)
    numbers = np.arange(MOST + 1, dtype=np.uint8)
    visible = np.stack([(canvas.numbers == number).sum(axis=1) for number in numbers], axis=1)
    crowd = np.where(visible < HIDDEN * areas, CROWD, 0).astype(np.uint8)
    codes = numbers | classes << CLASS | crowd
    codes[:, 0] = 0
    shown = np.take_along_axis(codes, canvas.numbers.astype(np.int64), axis=1)
    pixels = photograph(draws, canvas.colours, FIELD).transpose(0, 2, 1)
    together = np.concatenate([pixels, shown[:, :, None]], axis=2)
    return np.ascontiguousarray(together).reshape(-1, SIZE, SIZE, 4)


def _radius(draws: Draws) -> Floats:
    """Small ones are more than large ones."""
    share = draws.uniform()
    return np.float32(SMALLEST) + np.float32(LARGEST - SMALLEST) * share * share


def _clutter(draws: Draws, forms: Sequence[str], tints: Sequence[str]) -> Kinds:
    form = np.array([FORMS.index(name) for name in forms])[draws.choice(len(forms))]
    tint = np.array([TINTS.index(name) for name in tints])[draws.choice(len(tints))]
    return Kinds(form, draws.choice(len(TEXTURES)), tint)
