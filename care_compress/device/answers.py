"""What verify and infer ask of a task: how outputs are compared, told and drawn.

All three answers are here, so that nothing else on a device knows which task a bundle is of.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from care_compress.device.boxes import SHOWN, Detections, draw_boxes, find_boxes, found_again
from care_compress.device.images import FloatArray
from care_compress.device.letterbox import ImageSquare
from care_compress.device.manifest import Bundle
from care_compress.device.masks import draw_mask, find_mask, shares_of
from care_compress.device.problems import BundleDamagedError

# Kernels on a device round in other places than the simulation, and 64 images are few: at least 61
# of them answer alike in all but one of 250 cases where 99 % of all images do.
LEAST_AGREEMENT = 95.0
_LEAST_MASK = 80.0  # however much noise a file may have: below it is another mask
_USUAL_TOP = 5


@dataclass(frozen=True)
class Told:
    """What a network says of one image: rows of a table, and a PIL image where it has places."""

    rows: list[list[str]]
    drawing: Any = None


class Answers(Protocol):
    """How the answers of one task are dealt with."""

    compared: dict[str, str]  # key in results.json -> column of verify's table
    passes: str  # of what verify demands a percentage
    infers: str  # what infer does
    drawn: str  # what a drawing shows; nothing where none is made
    is_dense: bool  # an output is as large as an image, and labels have a place

    def least_agreement(self, reached: float, louder: float) -> float:
        """Percent that have to agree on a device.

        `reached` is what the exported file did, `louder` how much larger its noise may be there.
        """
        ...

    def compare(self, got: FloatArray, expected: FloatArray, bundle: Bundle) -> dict[str, float]:
        """What is `compared` of finite outputs to the samples, in percent."""
        ...

    def tell(self, output: FloatArray, image: Any, bundle: Bundle, top: int | None) -> Told:
        """The output to one image, an RGB one of Pillow; `top` lines of it at most."""
        ...


class ClassAnswers:
    """A class for each image."""

    compared = {"top1": "top-1 %", "expected_top1": "expected %", "agreement": "agreement %"}
    passes = "of the\nimages get the class the exported model gives them"
    infers = "classifies image files"
    drawn = ""
    is_dense = False

    def least_agreement(self, reached: float, louder: float) -> float:
        """The same of all files: images are too few to tell more."""
        return LEAST_AGREEMENT

    def compare(self, got: FloatArray, expected: FloatArray, bundle: Bundle) -> dict[str, float]:
        """Beside how many images get the same class, how many get that of their label."""
        first_N, expected_N = got.argmax(axis=1), expected.argmax(axis=1)
        labels_N = bundle.array("labels")
        pairs = ((first_N, labels_N), (expected_N, labels_N), (first_N, expected_N))
        shares = (100 * float((one == other).mean()) for one, other in pairs)
        return dict(zip(self.compared, shares, strict=True))

    def tell(self, output: FloatArray, image: Any, bundle: Bundle, top: int | None) -> Told:
        """The likeliest classes, with their probabilities."""
        odds_K = np.exp(output - output.max())
        odds_K /= odds_K.sum()
        names = bundle.manifest["classes"]
        likeliest = np.argsort(-odds_K)[: _USUAL_TOP if top is None else top]
        return Told([[f"{100 * odds_K[k]:5.1f} %", str(names[k])] for k in likeliest])


class MaskAnswers:
    """A class for each pixel; outputs are (N, K, h, w)."""

    compared = {"agreement": "agreement %"}
    passes = "of the\nplaces of the masks get the class the exported model gives them"
    infers = "draws masks over image files"
    drawn = "mask"
    is_dense = True

    def least_agreement(self, reached: float, louder: float) -> float:
        """Places near a border are those that turn: the more noise, the more of them."""
        grown = round(100 - (100 - reached) * louder, 1)
        return max(_LEAST_MASK, min(LEAST_AGREEMENT, grown))

    def compare(self, got: FloatArray, expected: FloatArray, bundle: Bundle) -> dict[str, float]:
        """How many places get the same class."""
        return {"agreement": 100 * float((got.argmax(axis=1) == expected.argmax(axis=1)).mean())}

    def tell(self, output: FloatArray, image: Any, bundle: Bundle, top: int | None) -> Told:
        """The share of each class that is there."""
        names = [str(name) for name in bundle.manifest["classes"]]
        mask_HW = find_mask(output, _square(image, bundle))
        shares = shares_of(mask_HW, len(names))[:top]
        rows = [[f"{100 * share:5.1f} %", names[k]] for k, share in shares]
        return Told(rows, draw_mask(image, mask_HW, names))


class BoxAnswers:
    """Boxes with a class each; outputs are (N, 4 + K, places)."""

    compared = {"agreement": "agreement %"}
    passes = "of the\nboxes of either model are found by the other"
    infers = "draws boxes into image files"
    drawn = "boxes"
    is_dense = True

    def least_agreement(self, reached: float, louder: float) -> float:
        """The same of all files: a box is found again even where its score is half as high."""
        return LEAST_AGREEMENT

    def compare(self, got: FloatArray, expected: FloatArray, bundle: Bundle) -> dict[str, float]:
        """How many sure boxes of either model the other has; two that see nothing agree."""
        side = int(bundle.manifest["resolution"])
        square = ImageSquare.of((side, side), side)
        again = sure = 0
        for one, other in zip(got, expected, strict=True):
            pair = [find_boxes(output, square, SHOWN / 2) for output in (one, other)]
            again += found_again(*pair) + found_again(*reversed(pair))
            sure += sum(len(found.surer()) for found in pair)
        return {"agreement": 100 * again / sure if sure else 100.0}

    def tell(self, output: FloatArray, image: Any, bundle: Bundle, top: int | None) -> Told:
        """Class, score and corners of each box, the surest first."""
        names = [str(name) for name in bundle.manifest["classes"]]
        found: Detections = find_boxes(output, _square(image, bundle), SHOWN)
        rows = [
            [names[k], f"{score:.2f}", *(f"{corner:.0f}" for corner in corners)]
            for k, score, corners in zip(found.classes, found.scores, found.corners, strict=True)
        ][:top]
        head = ["class", "score", "x1", "y1", "x2", "y2"]
        nothing = [[f"nothing with a score of {SHOWN:g} or more"]]
        return Told([head, *rows] if rows else nothing, draw_boxes(image, found, names))


ANSWERS: dict[str, Answers] = {
    "classification": ClassAnswers(),
    "segmentation": MaskAnswers(),
    "detection": BoxAnswers(),
}


def answers_of(bundle: Bundle) -> Answers:
    """How the answers of a bundle's models are dealt with."""
    if bundle.task not in ANSWERS:
        raise BundleDamagedError(
            f"this bundle is of task {bundle.task!r:.60}, which this script does not know.",
            "use the care_deploy.py beside it",
        )
    return ANSWERS[bundle.task]


def _square(image: Any, bundle: Bundle) -> ImageSquare:
    return ImageSquare.of(image.size[::-1], int(bundle.manifest["resolution"]))
