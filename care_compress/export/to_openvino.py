"""Writing OpenVINO's IR: from a Q/DQ graph of ours, or from the model that NNCF made."""

from pathlib import Path

from care_compress.export.about import About
from care_compress.quantize.nncf_backend import save_openvino
from care_compress.quantize.openvino_library import load_openvino, openvino_core
from care_compress.quantize.quiet import silent


def write_ir(source: Path, about: About, path: Path, half: bool) -> None:
    """An ``.onnx`` or ``.xml`` file as `path` and a ``.bin`` beside it.

    `half` stores what is not quantized as float16, for devices that compute in it.
    """
    openvino = load_openvino()
    with silent():
        convert = openvino_core().read_model if source.suffix == ".xml" else openvino.convert_model
        model = convert(source)
    model.set_friendly_name("care")
    for key, value in about.as_texts().items():
        model.set_rt_info(value, key.split("."))
    save_openvino(model, path, half)
