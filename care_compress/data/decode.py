"""Encoded bytes to an image, or a `BadImageError` that names it."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from care_compress.errors import BadImageError

# Nothing else is tried: Pillow would hand PostScript under a .jpg name to an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
FIX = "replace or remove it, or set data.skip_bad_images=true"


def decode(encoded: bytes, name: str) -> Image.Image:
    """The first frame, fully decoded, in the mode it is stored in."""
    if not encoded:
        raise BadImageError(f"{name} is empty (0 bytes).", FIX)
    try:
        # Pillow's warnings (odd EXIF, large image) name no file, so they help nobody.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Between Pillow's limit and twice that it only warns, and takes a gigabyte.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            with _libtiff_silent() if image.format == "TIFF" else contextlib.nullcontext():
                image.load()
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = f"no {', '.join(FORMATS)} image"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"refused as a decompression bomb ({error})"
    except Exception as error:  # broken bytes make Pillow's readers raise nearly anything
        reason = f"not decodable ({error})"
    else:
        return image
    raise BadImageError(f"{name} is {reason}.", FIX)


@contextlib.contextmanager
def _libtiff_silent() -> Iterator[None]:
    """It writes what it finds wrong to the terminal itself, a line for each row of pixels."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
