"""Where a file parts from its model: every site's output in both, in the order of the network."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from care_compress.quantize.openvino_library import load_openvino
from care_compress.quantize.placement import PRODUCTS, QuantizedCare, site_of
from care_compress.runtime.on_onnxruntime import open_session

Outputs = dict[str, Tensor]


def first_divergence(model: nn.Module, artifact: Path, sites: Iterable[str], image: Tensor) -> str:
    """The first site whose output differs, in words.

    The first is where the sharpest fall of the distance is: what comes after inherits it.
    """
    expected = _torch_outputs(model, image)
    names = [name for name in sites if name in expected]
    read = _openvino_outputs if artifact.suffix == ".xml" else _onnx_outputs
    found = read(artifact, names, image)
    distances = {name: _sqnr(expected[name], found[name]) for name in names if name in found}
    before, worst, where = math.inf, 0.0, ""
    for name, distance in distances.items():
        fall = min(before, 80.0) - distance
        if fall > worst:
            worst, where = fall, f"{name} ({distance:.1f} dB, before it {min(before, 80.0):.1f})"
        before = min(before, distance)
    return where or "no layer that both name"


class _Tap(Interpreter):
    """Runs an exported graph and keeps what each site computes."""

    def __init__(self, model: QuantizedCare) -> None:
        super().__init__(model.graph)
        self.kept: Outputs = {}

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if n.target in PRODUCTS and isinstance(out, Tensor):
            self.kept.setdefault(site_of(n), out)
        return out


@torch.no_grad()
def _torch_outputs(model: nn.Module, image: Tensor) -> Outputs:
    if isinstance(model, QuantizedCare):
        tap = _Tap(model)
        tap.run(image)
        return tap.kept
    kept: Outputs = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: kept.update({name: output})

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    model(image)
    for hook in hooks:
        hook.remove()
    return {name: value for name, value in kept.items() if isinstance(value, Tensor)}


def _onnx_outputs(path: Path, names: list[str], image: Tensor) -> Outputs:
    model = onnx.load(path)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    outputs = {node.name: node.output[0] for node in model.graph.node if node.name in set(names)}
    del model.graph.output[:]
    for value in outputs.values():
        model.graph.output.append(onnx.ValueInfoProto(name=value))
    session = open_session(model.SerializeToString())
    feed = {session.get_inputs()[0].name: _repeated(image, batch)}
    found = session.run(list(outputs.values()), feed)
    return {
        name: torch.from_numpy(value[:1]).float()
        for name, value in zip(outputs, found, strict=True)
    }


def _openvino_outputs(path: Path, names: list[str], image: Tensor) -> Outputs:
    core = load_openvino().Core()
    model = core.read_model(path)
    wanted = set(names)
    known = [op for op in model.get_ordered_ops() if op.get_friendly_name() in wanted]
    if not known:  # NNCF's file has names of its own
        return {}
    for operation in known:
        model.add_outputs(operation.output(0))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    size = compiled.inputs[0].partial_shape[0]
    images = _repeated(image, 1 if size.is_dynamic else int(size.get_length()))
    values = list(compiled([images]).values())[-len(known) :]
    return {
        op.get_friendly_name(): torch.from_numpy(value[:1].copy())
        for op, value in zip(known, values, strict=True)
    }


def _repeated(image: Tensor, batch: int) -> NDArray[np.float32]:
    """One image as often as a file of fixed batch size takes it."""
    repeated: NDArray[np.float32] = image.repeat(batch, 1, 1, 1).numpy()
    return repeated


def _sqnr(expected: Tensor, found: Tensor) -> float:
    noise = float((expected.double() - found.double().reshape(expected.shape)).square().sum())
    if not math.isfinite(noise):
        return -math.inf
    signal = float(expected.double().square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
