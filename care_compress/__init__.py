"""care-compress: make a float CARE Transformer small and fast on edge devices.

The names of ``__all__`` are the stable Python interface (docs/API.md); everything else is the
command line. They load on first use, so that ``care-compress --help`` never waits for torch.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from care_compress.shipped import VERSION

if TYPE_CHECKING:
    from care_compress.api import Accuracy, Result, compare, fp32, quantize
    from care_compress.errors import CareError
    from care_compress.evaluate.comparison import Comparison
    from care_compress.model.care import build_model
    from care_compress.model.checkpoint import load_checkpoint
    from care_compress.model.rewrite import rewrite
    from care_compress.recipe.recipe import Recipe, load_recipe

__all__ = [
    "Accuracy",
    "CareError",
    "Comparison",
    "Recipe",
    "Result",
    "build_model",
    "compare",
    "fp32",
    "load_checkpoint",
    "load_recipe",
    "quantize",
    "rewrite",
]
__version__ = VERSION

_HOMES = {
    "Accuracy": "api",
    "CareError": "errors",
    "Comparison": "evaluate.comparison",
    "Recipe": "recipe.recipe",
    "Result": "api",
    "build_model": "model.care",
    "compare": "api",
    "fp32": "api",
    "load_checkpoint": "model.checkpoint",
    "load_recipe": "recipe.recipe",
    "rewrite": "model.rewrite",
}


class _Room(ModuleType):
    """`care_compress.quantize`: the room of that name, and the function."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.function(*given, **named)

    @property
    def function(self) -> Any:
        return import_module("care_compress.api").quantize

    @property
    def __signature__(self) -> inspect.Signature:  # what a notebook shows
        return inspect.signature(self.function)


class _Package(ModuleType):
    """The package itself: importing a room puts it here by its name, which one of them shares."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "quantize" and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "quantize":
        return import_module("care_compress.quantize")
    if name not in _HOMES:
        raise AttributeError(f"module 'care_compress' has no attribute {name!r}")
    return getattr(import_module(f"care_compress.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
