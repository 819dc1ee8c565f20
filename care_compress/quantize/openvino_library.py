"""OpenVINO and NNCF, loaded only when a recipe or a file asks for them.

They are an optional extra, and importing them takes seconds.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from care_compress.errors import TargetError
from care_compress.quantize.quiet import silent

FIX = "pip install -e '.[openvino]'"
REPORTER = "openvino_telemetry"


def load_openvino() -> Any:
    """The `openvino` module."""
    try:
        with silent(), _unreported():
            import openvino
    except ImportError as error:
        raise TargetError("openvino is not installed here.", FIX) from error
    return openvino


def load_nncf() -> Any:
    """The `nncf` module."""
    load_openvino()
    try:
        with silent(), _unreported():
            import nncf
    except ImportError as error:
        raise TargetError("nncf is not installed here.", FIX) from error
    return nncf


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Both send usage to a statistics server from their import on, unasked; without it they run."""
    if REPORTER in sys.modules:
        yield
        return
    sys.modules[REPORTER] = None  # type: ignore[assignment]  # importing it now fails
    try:
        yield
    finally:
        del sys.modules[REPORTER]
