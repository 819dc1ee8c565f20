"""Figures as JSON: numbers, or nothing with a reason; never NaN or infinity.

Python writes NaN where JSON has none, and other programs refuse the whole file or, worse, read 0.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from care_compress.errors import RunError


def json_text(value: object, indent: int = 2) -> str:
    """The text of a JSON file; `RunError` names the first figure that is none."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False) + "\n"
    except ValueError as error:
        place = next(not_finite(value), None)
        if place is None:
            raise
        raise RunError(
            f"{place} came out as no number, and a result that holds one is worth nothing.",
            "check the images and the checkpoint; if they are sound, please report it",
        ) from error


def not_finite(value: Any, at: str = "") -> Iterator[str]:
    """Where in nested plain data a NaN or an infinity stands: ``candidates.ptq.drop``."""
    if isinstance(value, float) and not math.isfinite(value):
        yield at
    inner: dict[Any, Any] = value if isinstance(value, dict) else {}
    if isinstance(value, list | tuple):
        inner = dict(enumerate(value))
    for key, one in inner.items():
        yield from not_finite(one, f"{at}.{key}".lstrip("."))
