"""``care_deploy.py infer``: pictures of a user's own, answered in words and drawn where that helps.

What is wrong with a picture, or with where its drawing goes, is said before a model is opened.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from care_compress.device.answers import Answers, answers_of
from care_compress.device.images import cropped_pixels, open_image
from care_compress.device.letterbox import ImageSquare
from care_compress.device.manifest import Bundle
from care_compress.device.problems import DeployError, ImageError
from care_compress.device.samples import Runs, check_finite, run_pixels
from care_compress.device.verbs import format_table

_PNG = ".png"


@dataclass(frozen=True)
class Asked:
    """Pictures to be answered, and where each is drawn."""

    bundle: Bundle
    answers: Answers
    files: Sequence[Path]
    pixels_NCHW: np.ndarray[Any, np.dtype[np.uint8]]
    drawings: Sequence[Path | None]

    @classmethod
    def of(cls, bundle: Bundle, files: Sequence[Path], out: Path | None) -> Asked:
        """Read the files; drawings go beside them, or to the folder or PNG file `out`."""
        answers = answers_of(bundle)
        drawings = drawn_to(answers.drawn, files, out)
        pixels = np.stack([_pixels(bundle, file) for file in files])
        return cls(bundle, answers, files, pixels, drawings)

    def answer(self, session: Runs, model: str, top: int | None) -> None:
        """Print what a model says of each picture, `top` lines at most, and draw it."""
        outputs = run_pixels(session, self.bundle, self.pixels_NCHW)
        for file, output, drawing in zip(self.files, outputs, self.drawings, strict=True):
            check_finite(output)
            image = open_image(file, self.bundle.manifest["exif_rotate"])
            told = self.answers.tell(output, image, self.bundle, top)
            print(f"{file} ({model})")
            print(format_table(told.rows))
            if drawing is not None:
                _save(told.drawing, drawing)
                print(f"drawn to {drawing}")


def drawn_to(shown: str, files: Sequence[Path], out: Path | None) -> list[Path | None]:
    """Where each file is drawn; nowhere where answers have no place in the image."""
    if not shown:
        if out is not None:
            raise DeployError("this network gives classes: nothing is drawn.", "leave out --out")
        return [None] * len(files)
    if out is not None and out.suffix.lower() == _PNG:
        drawings = [out] * len(files)
    else:
        folders = [file.parent if out is None else out for file in files]
        names = [f"{file.stem}-{shown}{_PNG}" for file in files]
        drawings = [folder / name for folder, name in zip(folders, names, strict=True)]
    for number, drawing in enumerate(drawings):
        if drawing in drawings[:number]:
            raise DeployError(
                f"two pictures would be drawn to {drawing}.",
                "give pictures of different names, and --out a folder",
            )
        if drawing in files:
            raise DeployError(f"{drawing} would be drawn over.", "name another place with --out")
    return [*drawings]


def _pixels(bundle: Bundle, file: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture as the bundle's models want it."""
    about = bundle.manifest
    image, size = open_image(file, about["exif_rotate"]), about["resolution"]
    if bundle.is_letterboxed:
        return ImageSquare.of(image.size[::-1], size).array(image)
    return cropped_pixels(image, size, about["crop_pct"])


def _save(picture: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{path} cannot be written ({reason}).", "name another place with --out"
        ) from error
