"""What drawings of answers share: colours, letters, and a size that can be read."""

from typing import Any

# Okabe and Ito's colours, which those who cannot tell red from green can tell apart.
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
READABLE = 480  # pixels of the longer side below which a drawing is enlarged by a whole number


def enlarged_copy(image: Any) -> "tuple[Any, int]":
    """An RGB copy of a PIL image and by how much it was enlarged: letters do not fit small ones."""
    from PIL import Image

    factor = max(1, -(-READABLE // max(image.size)))
    size = image.width * factor, image.height * factor
    # JetPack 6 has Pillow 9.0, which knows the filter by its older name only.
    return image.convert("RGB").resize(size, getattr(Image, "Resampling", Image).NEAREST), factor


def ink_on(colour: "tuple[int, int, int]") -> "tuple[int, int, int]":
    """Black or white, whichever can be read on a colour."""
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128
    return (0, 0, 0) if bright else (255, 255, 255)


def letters_for(picture: Any) -> Any:
    """A font of a size that suits a drawing."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(max(12, max(picture.size) // 50))
    except TypeError:  # before Pillow 10.1 there is one size
        return ImageFont.load_default()
