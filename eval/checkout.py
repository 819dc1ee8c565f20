"""Lets the scripts here run from any directory without activating anything."""

import importlib.util
import os
import sys
from pathlib import Path


def use_checkout_environment() -> None:
    """Start again under the checkout's ``.venv`` if this Python has no care_compress."""
    if importlib.util.find_spec("care_compress") is not None:
        return
    root = Path(__file__).resolve().parent.parent
    python = root / ".venv" / "bin" / "python"
    if not python.exists() or sys.prefix == str(root / ".venv"):
        sys.exit(f"care-compress is not installed. Fix: make -C {root} setup")
    os.execv(python, [str(python), *sys.argv])
