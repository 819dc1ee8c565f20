"""The float network as an ONNX graph whose nodes bear the names of its modules.

Everything else starts from it: `care_compress.export.integers` puts the plan's quantizers in,
`care_compress.export.half` the float type of a target. Exporting what torchao lowers instead takes
25 s for each target, clips between Q and DQ, and leaves it to an optimizer whether a pair survives.
"""

import ast
from typing import Any, Literal

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

from care_compress.libraries import silent
from care_compress.model.structure import Latest, structure_of

INPUT, OUTPUT = "images", "logits"
FIRST_OPSET = 20  # of Gelu as one operation; what is used here means the same in later ones
LARGEST_SHARED = 65536  # elements: the masks of attention are one for each stage
TRACED = 2  # images in the example; `_free_batch` takes this number out of the graph
FREE = "batch"  # what stands for it
_SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "Add"})

Batch = int | Literal["dynamic"]


def float_graph(network: nn.Module, resolution: int, batch: Batch = "dynamic") -> ir.Model:
    """Export a float network for images of one size, and a fixed or free number of them.

    No length in the graph depends on the batch, so whoever loads a file may give it another one.
    """
    model = _traced(network.cpu().eval(), resolution)
    _free_batch(model.graph)
    fold_constants(model)
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


_traces: Latest[onnx.ModelProto] = Latest(16)  # a recipe and its targets take up to five


def _traced(network: nn.Module, resolution: int) -> ir.Model:
    """The network as torch exports it; a late graph of the same structure with its own weights."""
    structure = (resolution, *structure_of(network))
    # Not `clone`, which shares the types of values, and those are edited in place.
    model = ir.from_proto(_traces.of(structure, lambda: _trace(network, resolution)))
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name in model.graph.initializers:
            value = ir.tensor(tensor.detach().numpy(), name=name)
            model.graph.initializers[name].const_value = value
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


def product_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """The node that computes each site: named as the site is, and nothing else."""
    return {node.name: node for node in graph if node.name and "/" not in node.name}


def add_constant(graph: ir.Graph, name: str, value: NDArray[np.generic]) -> ir.Value:
    """A new constant of the graph."""
    tensor = ir.tensor(value, name=name)
    made = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
    )
    graph.initializers[name] = made
    return made


def constant(value: ir.Value | None) -> NDArray[Any]:
    """The numbers of a constant of the graph."""
    assert value is not None and value.const_value is not None
    numbers: NDArray[Any] = value.const_value.numpy()
    return numbers


def maker_of(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value; none for a constant or an input."""
    return None if value is None else value.producer()


def drop_unread(graph: ir.Graph) -> None:
    """Remove the constants that no node reads any more."""
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def module_of(node: ir.Node) -> str:
    """The module a node belongs to."""
    return (node.name or "").partition("/")[0]


def _free_batch(graph: ir.Graph) -> None:
    """Make the number of images free.

    Tracing it as a symbol takes twice as long, and leaves its arithmetic in the graph. The network
    uses it in one way only: as the first length that a tensor is reshaped to, where ONNX has 0 for
    "as it was".
    """
    as_it_was = add_constant(graph, "as_it_was", np.zeros(1, np.int64))
    for node in graph:
        if node.op_type == "Reshape" and _first_length(node.inputs[0]) == TRACED:
            lengths = node.inputs[1]
            joined = lengths.producer() if lengths is not None else None
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
    for number, node in enumerate(graph):
        module = _innermost(node, modules)
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


def _innermost(node: ir.Node, modules: set[str]) -> str:
    """The deepest module whose forward pass the node comes from."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    found = [scope for scope in scopes if scope in modules]
    return str(found[-1]) if found else ""
