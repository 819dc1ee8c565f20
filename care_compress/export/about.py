"""What an exported file says about itself: enough to serve it without the run that made it."""

import json
import math
from dataclasses import asdict, dataclass

from care_compress.sections import DataSection
from care_compress.target import NEEDS

PREFIX = "care_compress."


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input.

    RGB; the shorter side to `resize` pixels by Pillow's bicubic filter, the middle
    `resolution` x `resolution` of it, divided by 255, minus `mean`, over `std`.
    """

    resolution: int
    resize: int
    crop_pct: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif_rotate: bool  # turned as its EXIF orientation says, before all that

    @classmethod
    def of(cls, data: DataSection) -> "Preprocessing":
        """As the recipe's evaluation does it."""
        size = data.resolution
        return cls(
            size,
            math.floor(size / data.crop_pct),
            data.crop_pct,
            data.mean,
            data.std,
            data.exif_rotate,
        )


@dataclass(frozen=True)
class About:
    """What is stored with a model."""

    recipe: str
    fingerprint: str  # of the model's weights, the classes and the preprocessing
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    needs: str | None = None  # what a processor must have, or its answers are wrong

    def as_texts(self) -> dict[str, str]:
        """Key and value as ONNX metadata and OpenVINO's runtime information hold them."""
        texts = {
            PREFIX + "recipe": self.recipe,
            PREFIX + "fingerprint": self.fingerprint,
            PREFIX + "classes": json.dumps(self.classes),
            PREFIX + "preprocessing": json.dumps(asdict(self.preprocessing)),
        }
        return texts if self.needs is None else {**texts, NEEDS: self.needs}
