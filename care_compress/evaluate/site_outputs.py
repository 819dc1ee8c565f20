"""What every site computes: in a torch model, an ONNX file, an OpenVINO IR.

A site is named as its module is, in all three. Reading a layer of a file makes it an output, and a
runtime fuses nothing across an output: layers show what the graph says, in the runtime's own
kernels where those remain. Logits are therefore never taken from a tapped file.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from care_compress.libraries import openvino_core
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.placement import PRODUCTS, QuantizedCare, site_of
from care_compress.runtime.on_onnxruntime import feed_of, open_session
from care_compress.runtime.on_openvino import openvino_feed, read_to_run

TURNED = "/channels_last"
Outputs = dict[str, Tensor]
# Called with a quantizer of an activation, what enters it and what leaves it.
Seen = Callable[[IntQuantizer, Tensor, Tensor], None]
# One image (1, 3, H, W) to the outputs of the sites.
FileTap = Callable[[Tensor], Outputs]


@dataclass(frozen=True)
class Taken:
    """One pass of a torch model."""

    logits: Tensor
    sites: Outputs = field(default_factory=dict)


class _Tap(Interpreter):
    """Runs an exported graph; keeps what each site computes, shows what each quantizer changes."""

    def __init__(self, model: QuantizedCare, seen: Seen | None) -> None:
        super().__init__(model.graph)
        self.seen = seen
        self.kept: Outputs = {}

    def run_node(self, n: Node) -> Any:
        inputs, _ = self.fetch_args_kwargs_from_env(n)
        out = super().run_node(n)
        if n.target in PRODUCTS and isinstance(out, Tensor):
            self.kept.setdefault(site_of(n), out)
        if self.seen is not None and n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            if isinstance(module, IntQuantizer) and module.operand != "weight":
                self.seen(module, inputs[0], out)
        return out


def run_graph(model: QuantizedCare, images: Tensor, seen: Seen | None = None) -> Taken:
    """Run a quantized model, with its quantizers as they are switched."""
    tap = _Tap(model, seen)
    logits, *_ = tap.run(images)
    return Taken(logits, tap.kept)


def run_module(model: nn.Module, images: Tensor) -> Taken:
    """Run any torch model: quantized, or a float one whose sites are its innermost modules."""
    if isinstance(model, QuantizedCare):
        return run_graph(model, images)
    kept: Outputs = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                kept[name] = output

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        logits = model(images)
    finally:
        for handle in hooks:
            handle.remove()
    return Taken(logits, kept)


def tap_file(path: Path, names: Iterable[str]) -> FileTap:
    """Compile an exported file once to show these sites; those that it has."""
    wanted = set(names)
    return _tap_openvino(path, wanted) if path.suffix == ".xml" else _tap_onnx(path, wanted)


def _tap_onnx(path: Path, wanted: set[str]) -> FileTap:
    model = onnx.load(path)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    named = {node.name: node.output[0] for node in model.graph.node}
    turned = {name: value for name in wanted if (value := named.get(f"{name}{TURNED}"))}
    values = turned | {name: named[name] for name in wanted if name in named}
    del model.graph.output[:]
    for value in values.values():
        model.graph.output.append(onnx.ValueInfoProto(name=value))
    session = open_session(path, model.SerializeToString())
    images, feed = session.get_inputs()[0].name, feed_of(session, path)

    def tap(image: Tensor) -> Outputs:
        found = session.run(list(values.values()), {images: feed(image.repeat(batch, 1, 1, 1))})
        outputs = {
            name: torch.from_numpy(value[:1]).float()
            for name, value in zip(values, found, strict=True)
        }
        # Whoever compares has channels first.
        return {n: v if n in named else v.movedim(-1, 1) for n, v in outputs.items()}

    return tap


def _tap_openvino(path: Path, wanted: set[str]) -> FileTap:
    model = read_to_run(path)
    known = [op for op in model.get_ordered_ops() if op.get_friendly_name() in wanted]
    if not known:  # NNCF's file has names of its own
        return lambda image: {}
    for operation in known:
        model.add_outputs(operation.output(0))
    # Not simply the last ones: what the file gives out anyway is not added again.
    places = {
        operation.get_friendly_name(): model.get_result_index(operation.output(0))
        for operation in known
    }
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    size = compiled.inputs[0].partial_shape[0]
    batch = 1 if size.is_dynamic else int(size.get_length())
    feed = openvino_feed(model, path)

    def tap(image: Tensor) -> Outputs:
        values = compiled([feed(image.repeat(batch, 1, 1, 1))])
        return {name: torch.from_numpy(values[place][:1].copy()) for name, place in places.items()}

    return tap
