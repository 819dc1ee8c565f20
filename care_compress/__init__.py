"""care-compress: make a float CARE Transformer small and fast on edge devices.

The stable Python interface is the three functions below; everything else is the command line.
They load on first use, so that ``care-compress --help`` and ``doctor`` never wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from care_compress.model.care import build_model
    from care_compress.model.checkpoint import load_checkpoint
    from care_compress.model.rewrite import rewrite

__all__ = ["build_model", "load_checkpoint", "rewrite"]
__version__ = "0.1.0"

_HOMES = {"build_model": "care", "load_checkpoint": "checkpoint", "rewrite": "rewrite"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'care_compress' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"care_compress.model.{_HOMES[name]}"), name)
