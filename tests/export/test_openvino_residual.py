"""Gamma in the weights: the same network, fewer sums, for float and for integer weights."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from quantized import SIZE, images, network, quantized, section, sqnr

from care_compress.export.to_onnx import float_graph, put_integers
from care_compress.export.to_openvino import SCALED, scale_branches
from care_compress.model.compact import CompactCare, blocks
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network


def answers(graph: ir.Model) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    found = [session.run(None, {"images": x.numpy()})[0] for x in images(6, seed=9).split(3)]
    return torch.from_numpy(np.concatenate(found))


def with_signs(model: CompactCare) -> CompactCare:
    """Trained gammas may be negative."""
    draw = torch.Generator().manual_seed(1)
    for block in blocks(model):
        if block.gamma is not None:
            block.gamma.data = torch.randn(block.gamma.shape, generator=draw)
    return model


# Weights alone: a rounded activation would turn the last bit of a float sum into a step.
WEIGHTS = {"input": "float"}
RULES = {
    "float": None,
    "int8": (WEIGHTS,),
    "groups": (WEIGHTS, {"role": "pointwise", "weight": {"bits": 4, "group": 4}}),
}


@pytest.mark.parametrize("kind", RULES)
def test_the_network_stays_the_same(kind: str) -> None:
    rules = RULES[kind]
    if rules is None:
        graph = float_graph(with_signs(network()), SIZE)
    else:
        chosen = section(*rules)
        model = quantized(chosen).model
        inner = with_signs(float_network(model, planned(network(), chosen, SIZE)[0]))
        graph = float_graph(inner, SIZE)
        put_integers(graph, model)
    before = answers(graph)
    scale_branches(graph)
    moved = sum((node.name or "").endswith(f"inter2_fc2{SCALED}") for node in graph.graph)
    gammas = sum(block.gamma is not None for block in blocks(network()))
    assert moved == (0 if kind == "groups" else gammas)
    assert sqnr(answers(graph), before) > 100
