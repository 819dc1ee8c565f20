"""One network as an ONNX file: exported in float, quantized as planned, checked, written.

The nodes of the float graph bear the names of the network's modules. The plan's quantizers go in as
integers and scales for weights and Q/DQ pairs for activations. Every planned tensor gets a pair of
its own, with scale and zero point of the simulation's quantizer, and every DequantizeLinear has one
reader: a runtime fuses a pair into the operation behind it only where nobody else looks at it.
Exporting what torchao lowers instead takes 25 s for each target, clips between Q and DQ, and leaves
it to an optimizer whether a pair survives.
"""

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    collapse_slice2_rule,
    collapse_slice_rule,
    remove_optional_bias_from_conv_rule,
    remove_optional_bias_from_gemm_rule,
    unsqueeze_unsqueeze_rule,
)
from torch import nn

from care_compress.errors import ExportError
from care_compress.export.result import About
from care_compress.export.traces import traced
from care_compress.files import atomic_file
from care_compress.libraries import silent
from care_compress.model.structure import structure_of
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.placement import ROOT, QuantizedCare

INPUT, OUTPUT = "images", "logits"
FIRST_OPSET = 20  # of Gelu as one operation; what is used here means the same in later ones
NEW_TYPES_OPSET = 21  # of 4-bit integers, and of 8-bit floats with float16 scales
ANY_SIZE = 2**40
LARGEST_SHARED = 65536  # elements: the masks of attention are one for each stage
TRACED = 2  # images in the example; `_free_batch` takes this number out of the graph
FREE = "batch"  # what stands for it
OPERANDS = {"input": 0, "weight": 1, "left": 0, "right": 1}
BIAS = 2
FIX = "this is a bug of care-compress: please report the recipe"
_SCOPES = "pkg.torch.onnx.name_scopes"
_NARROW = {ir.DataType.INT4: ml_dtypes.int4, ir.DataType.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn}
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "Add"})
# What `optimize=True` does to this network. It would try forty rules more, none of which fits, on
# every node: more time than everything else here.
_SIMPLIFY = Sequential(
    RewritePass(
        (
            collapse_slice_rule,
            collapse_slice2_rule,
            unsqueeze_unsqueeze_rule,
            remove_optional_bias_from_conv_rule,
            remove_optional_bias_from_gemm_rule,
        )
    ),
    RemoveUnusedNodesPass(),
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    IdentityEliminationPass(),
    CommonSubexpressionEliminationPass(),
)

Batch = int | Literal["dynamic"]


def float_graph(network: nn.Module, resolution: int, batch: Batch = "dynamic") -> ir.Model:
    """Export a float network for images of one size, and a fixed or free number of them.

    No length in the graph depends on the batch, so whoever loads a file may give it another one.
    """
    network = network.cpu().eval()
    structure = (resolution, *structure_of(network))
    # Not `clone`, which shares the types of values, and those are edited in place.
    model = ir.from_proto(traced(structure, lambda: _trace(network, resolution)))
    # A trace has no numbers; these are whose graph it becomes.
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name in model.graph.initializers:
            value = ir.tensor(tensor.detach().numpy(), name=name)
            model.graph.initializers[name].const_value = value
    _free_batch(model.graph)
    # Without limits: what a pool makes of its weights at this size of images is large, and runtimes
    # would compute it anew for every image.
    fold_constants(model, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE)
    _SIMPLIFY(model)
    _name_by_module(model.graph, {name for name, _ in network.named_modules()})
    DeduplicateInitializersPass(size_limit=LARGEST_SHARED)(model)
    RemoveUnusedNodesPass()(model)
    model.producer_name, model.producer_version = "care-compress", None
    if batch != "dynamic":
        for value in (*model.graph.inputs, *model.graph.outputs):
            assert value.shape is not None
            value.shape = ir.Shape([int(batch), *value.shape[1:]])
    return model


def _trace(network: nn.Module, resolution: int) -> onnx.ModelProto:
    example = torch.zeros(TRACED, 3, resolution, resolution)
    with silent(), torch.no_grad():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=FIRST_OPSET,
            optimize=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    constants = program.model.graph.initializers.keys()
    own = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    assert constants <= own, "a tensor that is no parameter would not change with them"
    proto: onnx.ModelProto = ir.to_proto(program.model)
    return proto


def _free_batch(graph: ir.Graph) -> None:
    """Make the number of images free.

    Tracing it as a symbol takes twice as long, and leaves its arithmetic in the graph. The network
    uses it in one way only: as the first length that a tensor is reshaped to, where ONNX has 0 for
    "as it was".
    """
    as_it_was = add_constant(graph, "as_it_was", np.zeros(1, np.int64))
    for node in graph:
        if node.op_type == "Reshape" and _first_length(node.inputs[0]) == TRACED:
            joined = maker_of(node.inputs[1])
            assert joined is not None and joined.op_type == "Concat"
            joined.replace_input_with(0, as_it_was)
            node.attributes.pop("allowzero", None)  # with it a 0 is a length
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None and _first_length(value) == TRACED:
            value.shape = ir.Shape([FREE, *value.shape[1:]])


def _first_length(value: ir.Value | None) -> object:
    return value.shape[0] if value is not None and value.shape else None


def _name_by_module(graph: ir.Graph, modules: set[str]) -> None:
    """Call every node after its module; values get short names, which files repeat often.

    The node that computes a site, a product or the addition of a residual, has the bare name.
    """
    taken: set[str] = set()
    homes: dict[ir.Node | None, str] = {None: ""}
    for number, node in enumerate(graph):
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        # The deepest module whose forward pass the node comes from. What the exporter put together
        # itself, a Split, tells of none: it belongs to whoever made what it reads.
        module = next((str(scope) for scope in reversed(scopes) if scope in modules), "")
        if not scopes and node.inputs and node.inputs[0] is not None:
            module = homes[node.inputs[0].producer()]
        homes[node] = module
        name = module if node.op_type in _PRODUCTS else f"{module}/{node.op_type}"
        if name in taken or not name:
            name = f"{module}/{node.op_type}_{number}"
        taken.add(name)
        node.name = name
        node.metadata_props.clear()
        node.doc_string = None
        for place, value in enumerate(node.outputs):
            if value.name != OUTPUT:
                value.name = f"t{number}" if place == 0 else f"t{number}_{place}"
            value.metadata_props.clear()
    for number, value in enumerate(list(graph.initializers.values())):
        # Parameters keep their names: people look for them.
        if (value.name or "").rpartition(".")[0] not in modules - {""}:
            value.name = f"c{number}"
        value.metadata_props.clear()


def put_integers(model: ir.Model, quantized: QuantizedCare) -> None:
    """Quantize the graph of the same network in place."""
    graph = model.graph
    nodes = product_nodes(graph)
    for quantizer in quantized.integers():
        node, place = nodes[quantizer.site], OPERANDS[quantizer.operand]
        if quantizer.operand == "weight":
            _store_weight(model, node, quantizer, quantized)
            continue
        value, before, readers = node.inputs[place], node, [(node, place)]
        assert value is not None
        if node.op_type == "MatMul":
            # The pair stands where a factor is made, so that every reader sees the same integers.
            while (maker := value.producer()) is not None and maker.op_type == "Transpose":
                value = maker.inputs[0]
                assert value is not None
            uses = sorted(value.uses(), key=lambda use: (use.node.name or "", use.idx))
            readers = [(use.node, use.idx) for use in uses]
            before = next(n for n in graph if any(reader is n for reader, _ in readers))
        kind = _kind_of(model, quantizer)
        scale, _ = quantizer.calculate_qparams()
        pair = _Pair(graph, quantizer, scale, {"axis": quantizer.spec.axis}, kind)
        integers = pair.quantized(value, before)
        for reader, place in readers:
            reader.replace_input_with(place, pair.dequantized(integers, reader))
    drop_unread(graph)


def _store_weight(
    model: ir.Model, node: ir.Node, quantizer: IntQuantizer, quantized: QuantizedCare
) -> None:
    """Replace a float weight by its integers and a DequantizeLinear, and the bias beside it."""
    graph, spec, site = model.graph, quantizer.spec, quantizer.site
    before = node.inputs[OPERANDS["weight"]]
    assert before is not None and before.name is not None
    weight = quantized.weight(site).detach()
    scale, _ = quantizer.calculate_qparams()
    attributes = {"axis": spec.axis}
    if spec.granularity == "group":
        assert spec.group is not None
        # Groups follow one another along the input channels, the axis of blocks.
        scale = scale.reshape(weight.shape[0], -1, *weight.shape[2:])
        per_weight = scale.repeat_interleave(spec.group, dim=1)
        attributes = {"axis": 1, "block_size": spec.group}
    elif spec.granularity == "channel":
        per_weight = scale.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        per_weight = scale
    kind = _kind_of(model, quantizer)
    numbers = quantizer(weight) / per_weight
    if spec.is_integer:
        numbers = numbers.round().to(torch.int8)
    stored = add_constant(graph, before.name, _narrowed(numbers.numpy(), kind))
    pair = _Pair(graph, quantizer, scale, attributes, kind)
    node.replace_input_with(OPERANDS["weight"], pair.dequantized(stored, node))
    if len(node.inputs) > BIAS and node.inputs[BIAS] is not None:
        # That of this target's model: it is rounded to the steps of the integer sums.
        bias = quantized.graph.get_parameter(f"{ROOT}.{site}.bias").detach().numpy()
        node.replace_input_with(BIAS, add_constant(graph, _new_name(graph, "b"), bias))


def _kind_of(model: ir.Model, quantizer: IntQuantizer) -> ir.DataType:
    """The type that holds a quantized tensor; newer ones raise the graph's opset."""
    spec = quantizer.spec
    if spec.bits == "fp8" or (spec.bits == 4 and quantizer.operand == "weight"):
        model.opset_imports[""] = max(model.opset_imports[""], NEW_TYPES_OPSET)
        return ir.DataType.FLOAT8E4M3FN if spec.bits == "fp8" else ir.DataType.INT4
    return ir.DataType.INT8 if spec.symmetric else ir.DataType.UINT8


class _Pair:
    """The scale and zero point of one quantizer, and the nodes that use them."""

    def __init__(
        self,
        graph: ir.Graph,
        quantizer: IntQuantizer,
        scale: torch.Tensor,
        attributes: dict[str, int],
        kind: ir.DataType,
    ) -> None:
        self.name = f"{quantizer.site}/{quantizer.operand}"
        self.attributes = attributes
        _, zero_point = quantizer.calculate_qparams()
        zeros = zero_point.numpy().astype(np.uint8 if kind == ir.DataType.UINT8 else np.int8)
        scales = scale.numpy()
        if quantizer.spec.granularity == "group":
            zeros = zeros.reshape(scales.shape)
        if quantizer.spec.granularity == "tensor":
            scales, zeros = scales.reshape(()), zeros.reshape(())
            self.attributes = {}
        self.scale = add_constant(graph, _new_name(graph, "s"), scales)
        # Most zero points are arrays of zeros: one of each length serves all.
        shape = "x".join(str(size) for size in zeros.shape)
        name = _new_name(graph, "z") if zeros.any() else f"zero_{kind.name}_{shape}"
        found = graph.initializers.get(name)
        self.zero_point = found or add_constant(graph, name, _narrowed(zeros, kind))

    def quantized(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Integers of a float value, made just before a node."""
        return self._node("QuantizeLinear", value, before, "q")

    def dequantized(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Floats of integers, for one reader."""
        readers = len(value.uses())
        return self._node("DequantizeLinear", value, before, f"dq{readers + 1 if readers else ''}")

    def _node(self, kind: str, value: ir.Value, before: ir.Node, suffix: str) -> ir.Value:
        operands, name = [value, self.scale, self.zero_point], f"{self.name}_{suffix}"
        assert before.graph is not None
        output = f"q{len(before.graph)}"  # grows with every node
        return add_node(before, kind, operands, name, [output], self.attributes).outputs[0]


def _new_name(graph: ir.Graph, kind: str) -> str:
    """Short, because a file repeats names often."""
    return f"{kind}{len(graph.initializers)}"


def _narrowed(numbers: NDArray[np.generic], kind: ir.DataType) -> NDArray[np.generic]:
    return numbers.astype(_NARROW[kind]) if kind in _NARROW else numbers


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
    """Raise unless every planned tensor has its pair, and every DequantizeLinear one reader."""
    integers = [] if quantized is None else list(quantized.integers())
    weights = sum(quantizer.operand == "weight" for quantizer in integers)
    # A bias may be stored as integers, too: of 32 bits.
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT8E4M3FN)
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
            f"the graph has {found} quantized weights and {len(quantizes)} quantized activations, "
            f"planned are {weights} and {len(integers) - weights}.",
            FIX,
        )
    readers = Counter(name for node in graph.node for name in node.input)
    for node in dequantizes:
        if readers[node.output[0]] != 1:
            raise ExportError(f"{node.name} has {readers[node.output[0]]} readers.", FIX)


# What the passes of single runtimes read and edit a graph with.


def product_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """The node that computes each site: named as the site is, and nothing else."""
    return {node.name: node for node in graph if node.name and "/" not in node.name}


def module_of(node: ir.Node) -> str:
    """The module a node belongs to."""
    return (node.name or "").partition("/")[0]


def maker_of(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value; none for a constant or an input."""
    return None if value is None else value.producer()


def is_image(value: ir.Value | None) -> bool:
    """Whether a value is known to have the four lengths of images."""
    return value is not None and value.shape is not None and len(value.shape) == 4


def constant(value: ir.Value | None) -> NDArray[Any]:
    """The numbers of a constant of the graph."""
    assert value is not None and value.const_value is not None
    numbers: NDArray[Any] = value.const_value.numpy()
    return numbers


def add_constant(graph: ir.Graph, name: str, value: NDArray[np.generic]) -> ir.Value:
    """A new constant of the graph."""
    tensor = ir.tensor(value, name=name)
    made = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
    )
    graph.initializers[name] = made
    return made


def add_node(
    before: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    outputs: Sequence[str],
    attributes: Mapping[str, int | Sequence[int]] | None = None,
    domain: str = "",
    like: ir.Value | None = None,
) -> ir.Node:
    """A new node just before another one; what it gives out has the shape and type of `like`."""
    made = ir.node(
        kind, inputs, attributes or None, domain=domain, num_outputs=len(outputs), name=name
    )
    for value, its_name in zip(made.outputs, outputs, strict=True):
        value.name = its_name
        if like is not None:
            value.shape, value.type = like.shape, like.type
    assert before.graph is not None
    before.graph.insert_before(before, made)
    return made


def drop_unread(graph: ir.Graph) -> None:
    """Remove the constants that no node reads any more."""
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
