"""Building engines of TensorRT for RTX ahead of time: NVIDIA's compiler, with no GPU at hand.

The builder is the one that boards run (`care_compress.device`); every graph that gets here has
passed NVIDIA's own parser and compiler.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from care_compress.device.build import BuildOptions
from care_compress.device.deploy import build_file
from care_compress.device.library import load_library
from care_compress.device.problems import DeployError, TensorRtMissingError
from care_compress.errors import ExportError, TargetError
from care_compress.files import sha256_file

INSTALL = ".venv/bin/python -m pip install -c constraints.txt -e '.[tensorrt-rtx]'"


def build_ahead(onnx: Path, precision: str, notify: Callable[[str], None]) -> dict[str, Any]:
    """Build the engine of a graph beside it; its description, layer table included."""
    engine = onnx.with_suffix(".engine")
    options = BuildOptions(precision)
    try:
        library = load_library("tensorrt_rtx")
        return build_file(
            library,
            None,
            onnx,
            sha256_file(onnx),
            engine,
            options,
            lambda phase, done: notify(f"{engine.name}: {phase}"),
        )
    except TensorRtMissingError as error:
        raise TargetError("tensorrt-rtx is not installed here.", INSTALL) from error
    except DeployError as error:
        raise ExportError(error.message, error.fix) from error
