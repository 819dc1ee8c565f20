"""Writing an ONNX file, and refusing to write one that is not what was planned."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from care_compress.errors import ExportError
from care_compress.files import atomic_file
from care_compress.quantize.placement import QuantizedCare
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import NEEDS

PREFIX = "care_compress."


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input.

    RGB; the shorter side to `resize` pixels by Pillow's bicubic filter, the middle
    `resolution` x `resolution` of it, divided by 255, minus `mean`, over `std`.
    """

    resolution: int
    resize: int
    crop_pct: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif_rotate: bool  # turned as its EXIF orientation says, before all that

    @classmethod
    def of(cls, data: DataSection) -> "Preprocessing":
        """As the recipe's evaluation does it."""
        size = data.resolution
        return cls(
            size,
            math.floor(size / data.crop_pct),
            data.crop_pct,
            data.mean,
            data.std,
            data.exif_rotate,
        )


@dataclass(frozen=True)
class About:
    """What an exported file says of itself: enough to serve it without the run that made it."""

    recipe: str
    fingerprint: str  # of the model's weights, the classes and the preprocessing
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    needs: str | None = None  # what a processor must have, or its answers are wrong

    def as_texts(self) -> dict[str, str]:
        """Key and value as ONNX metadata and OpenVINO's runtime information hold them."""
        texts = {
            PREFIX + "recipe": self.recipe,
            PREFIX + "fingerprint": self.fingerprint,
            PREFIX + "classes": json.dumps(self.classes),
            PREFIX + "preprocessing": json.dumps(asdict(self.preprocessing)),
        }
        return texts if self.needs is None else {**texts, NEEDS: self.needs}


FIX = "this is a bug of care-compress: please report the recipe"


def write_onnx(model: ir.Model, about: About, path: Path, quantized: QuantizedCare | None) -> None:
    """Check the graph, against its plan too if it has one, and write it whole or not at all."""
    proto = ir.to_proto(model)
    # Types of intermediate values can be inferred again, and would be a tenth of a small file.
    del proto.graph.value_info[:]
    for key, value in about.as_texts().items():
        proto.metadata_props.add(key=key, value=value)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{path.name} is no valid ONNX graph: {reason}.", FIX) from error
    check_pairs(proto.graph, quantized)
    with atomic_file(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def check_pairs(graph: onnx.GraphProto, quantized: QuantizedCare | None) -> None:
    """Every planned tensor has its Q/DQ pair, and no DequantizeLinear has two readers."""
    integers = [] if quantized is None else list(quantized.integers())
    weights = sum(quantizer.operand == "weight" for quantizer in integers)
    # A bias may be stored as integers, too: of 32 bits.
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.INT4)
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type in kinds}
    quantizes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    dequantizes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    # ONNX Runtime's own products read the integers themselves.
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    # The head's weight has two of them for readers, one for each half of its input.
    read = [node.input[0] for node in dequantizes] + list({node.input[1] for node in products})
    found = sum(name in stored for name in read)
    if (found, len(quantizes)) != (weights, len(integers) - weights):
        raise ExportError(
            f"the graph has {found} integer weights and {len(quantizes)} quantized activations, "
            f"planned are {weights} and {len(integers) - weights}.",
            FIX,
        )
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for node in dequantizes:
        if readers.get(node.output[0], 0) != 1:
            raise ExportError(f"{node.name} has {readers.get(node.output[0], 0)} readers.", FIX)
