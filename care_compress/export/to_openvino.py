"""Writing OpenVINO's IR: from a Q/DQ graph of ours, or from the model that NNCF made."""

import re
from pathlib import Path
from typing import Any

from care_compress.export.to_onnx import About
from care_compress.libraries import load_openvino, openvino_core, silent
from care_compress.quantize.nncf_ptq import save_openvino


def write_ir(source: Path, about: About, path: Path, half: bool) -> None:
    """An ``.onnx`` or ``.xml`` file as `path` and a ``.bin`` beside it.

    `half` stores what is not quantized as float16, for devices that compute in it.
    """
    openvino = load_openvino()
    with silent():
        convert = openvino_core().read_model if source.suffix == ".xml" else openvino.convert_model
        model = convert(source)
    model.set_friendly_name("care")
    _number_names(model)
    for key, value in about.as_texts().items():
        model.set_rt_info(value, key.split("."))
    save_openvino(model, path, half)


def _number_names(model: Any) -> None:
    """Number the names that OpenVINO made up in the order of this model.

    It counts them through the whole process, and a model converted twice would be two files.
    """
    for place, operation in enumerate(model.get_ordered_ops()):
        if made_up := re.fullmatch(r"([A-Z][A-Za-z]*)_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{made_up[1]}_{place}")
