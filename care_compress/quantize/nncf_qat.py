"""Quantization-aware training of NNCF's simulated model, by the loop that trains float networks.

Weights, ranges and offsets follow the float model's logits and stage outputs, as in
`care_compress.quantize.qat`; the result is an OpenVINO model.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from care_compress.libraries import load_nncf, quiet, silent
from care_compress.model.compact import CompactCare
from care_compress.quantize.nncf_ptq import (
    Calibration,
    mark,
    nncf_settings,
    prepared,
    save_openvino,
    to_openvino,
)
from care_compress.quantize.qat import FollowFloat, grouped, qat_fingerprint
from care_compress.recipe.quantize import NncfSection, QatSection
from care_compress.recipe.sections import TrainSection
from care_compress.tasks.known import task_called
from care_compress.train.loop import ParameterGroup
from care_compress.train.stage import Training
from care_compress.train.state import Progress

HOOKS = "__nncf_hooks"  # where NNCF keeps its quantizers in a model
# The names that torch models use for what OpenVINO calls ...
TORCH_NAMES = {
    "Add": ("add", "__add__", "__iadd__"),
    "MatMul": ("matmul", "linear"),
    "Multiply": ("mul", "__mul__", "__imul__"),
}


class Student(nn.Module):
    """Returns (logits, stage outputs) in training mode and logits in eval mode."""

    def __init__(self, network: CompactCare) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits (B, K), with what distillation wants."""
        features = self.network.stage_outputs(x_BCHW)
        logits = self.network.answer(features)
        return (logits, features) if self.training else logits


def train_openvino(
    network: CompactCare,
    followed: CompactCare,
    section: QatSection,
    nncf_section: NncfSection,
    full_range: bool,
    calibration: Calibration,
    training: Training,
    path: Path,
) -> Progress:
    """Train what NNCF makes of `network` to follow another float one; write it to `path`."""
    model = simulated(network, nncf_section, full_range, calibration)
    teacher = prepared(followed).to(training.world.device).eval()
    course = training.course(section, qat_fingerprint(section, training, model, teacher), _groups)
    with quiet():
        trainee = training.fit(
            model, FollowFloat(task_called(training.recipe.task), teacher, section), course
        )
    trained = trainee.result.cpu().eval()
    resolution = training.recipe.data.resolution
    made = to_openvino(_exportable(trained, resolution), resolution)
    mark(made, network.task, full_range)
    save_openvino(made, path)
    return trainee.progress


def simulated(
    network: CompactCare, section: NncfSection, full_range: bool, calibration: Calibration
) -> nn.Module:
    """The network with NNCF's quantizers in it, calibrated and ready to train.

    Torch models have the fast bias correction only.
    """
    nncf = load_nncf()
    _without_compiler()
    ignored = [name for kind in section.ignored_types for name in TORCH_NAMES[kind]]
    with silent():
        model: nn.Module = nncf.quantize(
            Student(prepared(network)).eval(),
            nncf.Dataset(calibration),
            subset_size=calibration.count,
            **nncf_settings(section, full_range, ignored),
        )
    if not full_range:
        _hold_in_half_range(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # numbers of bits are none
    return model


def _hold_in_half_range(model: nn.Module) -> None:
    """Take away the levels that the weights do not use: training would grow into them.

    In torch, NNCF's fix of overflows doubles a weight's range and leaves it all its levels.
    """
    with silent():
        from nncf.torch.quantization.layers import SymmetricQuantizer
    for quantizer in model.modules():
        if isinstance(quantizer, SymmetricQuantizer) and quantizer.narrow_range:  # weights alone
            before = quantizer.level_high
            quantizer._half_range = True
            quantizer.set_levels()
            with torch.no_grad():  # in the same steps
                quantizer.scale.mul_(quantizer.level_high / before)


def _without_compiler() -> None:
    """Keep NNCF from compiling C++ at the first step: it takes a minute and needs a compiler."""
    with silent():
        from nncf.torch.quantization import extensions
        from nncf.torch.quantization.reference import torch_executor

    class InTorch:
        Quantize_forward = staticmethod(torch_executor.forward)
        Quantize_backward = staticmethod(torch_executor.backward)

    for kind in (extensions.QuantizedFunctionsCPU, extensions.QuantizedFunctionsCUDA):
        kind._loaded_namespace = InTorch


class _FakeQuantize(nn.Module):
    """A fake quantizer as quantize and dequantize.

    torch's own has switches, which an exporter cannot look through, and an operation that has no
    shape function.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, source: Any, levels: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("scale", source.scale.detach().float().flatten())
        self.register_buffer("zero_point", source.zero_point.detach().to(torch.int64).flatten())
        limits = source.activation_post_process
        low, high = max(limits.quant_min, levels[0]), min(limits.quant_max, levels[1])
        self.grid = (low, high, torch.int8 if low < 0 else torch.uint8)
        self.axis = int(source.ch_axis)
        self.alone = None if len(self.scale) > 1 else (float(self.scale), int(self.zero_point))

    def forward(self, x: Tensor) -> Tensor:
        """Round to the grid."""
        ops = torch.ops.quantized_decomposed
        if self.alone is not None:
            integers = ops.quantize_per_tensor(x, *self.alone, *self.grid)
            back: Tensor = ops.dequantize_per_tensor(integers, *self.alone, *self.grid)
            return back
        where = (self.scale, self.zero_point, self.axis)
        back = ops.dequantize_per_channel(
            ops.quantize_per_channel(x, *where, *self.grid), *where, *self.grid
        )
        return back


def _exportable(model: nn.Module, resolution: int) -> nn.Module:
    """A copy whose quantizers are torch's own functions.

    OpenVINO could trace NNCF's model itself, but tracing turns arithmetic on sizes into
    operations, and NNCF, which counts operations, would put quantizers on the wrong ones.
    """
    nncf = load_nncf()
    with silent():
        from nncf.torch.function_hook.wrapper import get_hook_storage
        from nncf.torch.quantization.layers import BaseQuantizer
        from nncf.torch.quantization.strip import convert_to_torch_fakequantizer
        from torch.ao.quantization import FakeQuantize

        copied: nn.Module = copy.deepcopy(model)
        hooks = get_hook_storage(copied)
        # Weights have one level less below zero while they are trained, or half of all, which
        # NNCF's strip forgets: those that had grown beyond it would come out a step lower.
        levels = {
            name: (int(hook.level_low), int(hook.level_high))
            for name, hook in hooks.named_modules(remove_duplicate=False)
            if isinstance(hook, BaseQuantizer)
        }
        example = torch.zeros(2, 3, resolution, resolution)
        copied = nncf.strip(copied, do_copy=False, example_input=example).eval()
        # NNCF's own strip overlooks quantizers that several places share.
        for name, hook in list(hooks.named_modules(remove_duplicate=False)):
            if isinstance(hook, BaseQuantizer):
                hook = convert_to_torch_fakequantizer(hook)
            if isinstance(hook, FakeQuantize):
                hooks.set_submodule(name, _FakeQuantize(hook, levels[name]))
    return copied


def _groups(model: nn.Module, plan: TrainSection) -> list[ParameterGroup]:
    assert isinstance(plan, QatSection)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ranges = [p for name, p in trained if name.startswith(HOOKS)]
    rest = [p for name, p in trained if not name.startswith(HOOKS)]
    return grouped(rest, ranges, plan)
