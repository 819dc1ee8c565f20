"""A small CARE with lifelike statistics, and ways to quantize it, for the quantization tests."""

import functools
from collections.abc import Generator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny import image_folder
from torch import Tensor, nn

import care_compress
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.samples import spread_indices
from care_compress.data.sources import open_samples
from care_compress.export import variants
from care_compress.model.care import Care
from care_compress.model.checkpoint import save_checkpoint
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import PtqJob, Quantized, quantize_network
from care_compress.recipe.quantize import QuantizeSection, RuleSection
from care_compress.recipe.sections import DataSection, RewriteSection

SIZE = 32
KEPT = RewriteSection(fold_norms=False)


def care(classes: int = 5, seed: int = 0) -> Care:
    """care_nano with random but uneven BatchNorms: channels differ by orders of magnitude."""
    torch.manual_seed(seed)
    model = care_compress.build_model("care_nano", classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, fan_in**-0.5)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.copy_(torch.exp(torch.randn(module.num_features)))
            module.weight.data.copy_(torch.exp(torch.randn(module.num_features) * 0.7))
            module.bias.data.normal_(0, 0.3)
    return model.eval()


def network(**switches: bool) -> CompactCare:
    """The rewritten network, its pre-norms kept unless asked otherwise."""
    return rewrite(care(), KEPT.model_copy(update=switches))


def images(count: int = 48, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=generator)


def batches() -> Generator[Tensor]:
    yield from torch.split(images(), 16)


INT8 = (
    RuleSection.model_validate({"weight": 8, "input": 8}),
    RuleSection.model_validate({"role": "residual_add", "input": "float"}),
    RuleSection.model_validate({"role": "attention.kv", "input": "float"}),
    RuleSection.model_validate({"role": "attention.out", "input": "float"}),
)


def rules(*extra: dict[str, object]) -> tuple[RuleSection, ...]:
    """The default placement with rules after it."""
    return (*INT8, *(RuleSection.model_validate(rule) for rule in extra))


W4 = {"role": "pointwise", "weight": {"bits": 4}}
W4A4 = {
    "role": "pointwise",
    "weight": {"bits": 4, "range": "mse"},
    "input": {"bits": 4, "range": "mse"},
}


def section(*extra: dict[str, object], **settings: object) -> QuantizeSection:
    return QuantizeSection.model_validate({"target": None, "rules": rules(*extra), **settings})


def quantized(chosen: QuantizeSection, start: CompactCare | None = None) -> Quantized:
    return quantize_network(PtqJob(start or network(), SIZE, 0, batches), chosen)


def small_start(folder: Path) -> list[str]:
    """What a recipe needs to take a small random network and few images instead of its own."""
    patches = image_folder(folder / "images")
    save_checkpoint(care(4), folder / "four.safetensors", {})
    return [
        f"model.checkpoint={folder / 'four.safetensors'}", f"data.source={patches}",
        "data.resolution=32", "data.workers=0", "export.images=8",
    ]  # fmt: skip


@functools.cache
def shipped_images(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced images of the built-in set, normalised, and their labels."""
    data = DataSection(source="builtin:shapes", resolution=64, crop_pct=1.0)
    samples = open_samples(data, split)
    indices = spread_indices(len(samples), count)
    (batch,) = prepared_batches(samples, data, count, bad=BadImages(), indices=indices)
    return batch.images.contiguous(), batch.labels


def shipped_network(**switches: bool) -> CompactCare:
    """The included, trained care_nano, rewritten."""
    model = care_compress.load_checkpoint("builtin:care_nano_shapes")
    return rewrite(model, KEPT.model_copy(update=switches))


def quantized_shipped(chosen: QuantizeSection, **switches: bool) -> QuantizedCare:
    """The included network, quantized on 128 training images."""

    def calibration() -> Generator[Tensor]:
        yield from torch.split(shipped_images("train", 128)[0], 32)

    return quantize_network(PtqJob(shipped_network(**switches), 64, 0, calibration), chosen).model


def run(graph: ir.Model, x: Tensor) -> Tensor:
    """Without fused kernels, which round in another order."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(graph).SerializeToString()
    session = onnxruntime.InferenceSession(content, options)
    fixed = session.get_inputs()[0].shape[0]
    size = fixed if isinstance(fixed, int) else len(x)
    parts = [session.run(None, {"images": part.numpy()})[0] for part in torch.split(x, size)]
    return torch.from_numpy(np.concatenate(parts))


def sqnr(value: Tensor, reference: Tensor) -> float:
    noise = (value.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def spoil_weights(monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    """Write files whose weights at one site are three times those of the model."""
    original = variants.put_integers

    def spoiled(model: ir.Model, quantized: QuantizedCare) -> None:
        original(model, quantized)
        (pair,) = (node for node in model.graph if node.name == f"{site}/weight_dq")
        scale = pair.inputs[1]
        assert scale is not None and scale.const_value is not None
        scale.const_value = ir.tensor(scale.const_value.numpy() * 3, name=scale.name)

    monkeypatch.setattr(variants, "put_integers", spoiled)
