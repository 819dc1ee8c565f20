"""What is made of a structure serves every network of it, with the numbers of each."""

import copy

import onnx_ir as ir
import pytest
import torch
from quantized import SIZE, care, network

from care_compress.export import to_onnx as exported
from care_compress.export.half import write_half
from care_compress.export.to_onnx import constant, float_graph
from care_compress.model.structure import Latest, structure_of


def test_numbers_are_no_part_of_a_structure_and_all_else_is() -> None:
    plain = structure_of(network())
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert structure_of(other) == plain
    assert structure_of(network(merge_heads=False)) != plain
    assert structure_of(care(3)) != structure_of(care(4))
    other.stages[0].blocks[0].token_mixer.group += 1
    assert structure_of(other) != plain
    assert structure_of(network().double()) != plain


def test_only_the_latest_are_held() -> None:
    latest: Latest[int] = Latest(2)
    made: list[int] = []

    def of(number: int) -> int:
        return latest.of((number,), lambda: made.append(number) or number)

    assert [of(n) for n in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2], "the one not asked for longest goes first"


def test_networks_of_one_structure_share_a_trace_and_no_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = network(), network()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    before = float_graph(copy.deepcopy(first), SIZE, 1)
    written = ir.to_proto(before).SerializeToString(deterministic=True)
    write_half(before)
    monkeypatch.setattr(exported, "_trace", lambda *given: pytest.fail("traced again"))
    after = float_graph(copy.deepcopy(second), SIZE, 1)
    again = float_graph(copy.deepcopy(first), SIZE, 1)
    assert ir.to_proto(again).SerializeToString(deterministic=True) == written
    name = "stages.0.blocks.0.inter_layer.inter1_fc1.weight"
    found = [constant(graph.graph.initializers[name]) for graph in (again, after)]
    assert (found[1] == found[0] * 1.5).all()
