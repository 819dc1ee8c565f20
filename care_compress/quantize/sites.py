"""Where a CARE can be quantized: every convolution, product and addition, by its module's name."""

import copy
import re
from types import UnionType

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from care_compress.model.attention import AttentionCore, Product
from care_compress.model.care import Interaction, Sum
from care_compress.model.compact import (
    ChannelAffine,
    CompactCare,
    GlobalMean,
    PooledDepthwise,
    Rotation,
)
from care_compress.model.structure import Latest, structure_of
from care_compress.quantize.spec import Kept, Site

# Module names below a block to (branch, role).
_IN_BLOCK = {
    "token_mixer.dwconv1": ("mixer.dw3", "depthwise"),
    "token_mixer.dwconv2": ("mixer.dw7", "depthwise"),
    "token_mixer.dwconvatt_1": ("mixer.att", "depthwise"),
    "token_mixer.dwconvatt_2": ("mixer.att", "depthwise"),
    "token_mixer.qk": ("mixer.att", "attention.qk"),
    "token_mixer.core.kv": ("mixer.att", "attention.kv"),
    "token_mixer.core.out": ("mixer.att", "attention.out"),
    "inter_layer.inter1_fc1": ("inter1", "pointwise"),
    "inter_layer.inter1_conv": ("inter1", "depthwise"),
    "inter_layer.inter1_fc2": ("inter1", "pointwise"),
    "inter_layer.inter1_add": ("inter1", "residual_add"),
    "inter_layer.inter2_fc1": ("inter2", "pointwise"),
    "inter_layer.inter2_conv": ("inter2", "depthwise"),
    "inter_layer.inter2_fc2": ("inter2", "pointwise"),
    "inter_layer.inter2_add": ("inter2", "residual_add"),
    "add": ("block", "residual_add"),
}
# Parts of the names of a dense head's modules to their roles; the rest are predictions.
_IN_NECK = ((".laterals.", "lateral"), (".adds.", "residual_add"), (".conv", "tower"))
_PLACE = re.compile(r"stages\.(\d+)\.(?:blocks\.(\d+)\.(.+)|downsample\.\d+)$")
_counts: Latest[dict[str, int]] = Latest(64)


def find_sites(model: CompactCare, resolution: int) -> tuple[Site, ...]:
    """Every quantizable operation, in the order of the forward pass."""
    macs = _macs_by_module(model, resolution)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear | Product | Sum):
            continue
        stage, block, branch, role = _place(name)
        channels = narrowest = 0
        if isinstance(module, nn.Conv2d):
            channels = module.in_channels // module.groups
            narrowest = min(channels, module.out_channels)
        elif isinstance(module, nn.Linear):
            channels = module.in_features
            narrowest = min(channels, module.out_features)
        parent, _, leaf = name.rpartition(".")
        before = "0" if leaf == "1" else leaf.replace("fc1", "norm")
        norm = getattr(model.get_submodule(parent), before, None)
        site = Site(
            name=name,
            role=role,
            stage=stage,
            block=block,
            branch=branch,
            macs=macs.get(name, 0),
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            channels=channels,
            # By a pre-norm that has not been folded away.
            prescaled=isinstance(norm, nn.BatchNorm2d | ChannelAffine | Rotation),
            weighted=isinstance(module, nn.Conv2d | nn.Linear),
            narrowest=narrowest,
        )
        found.append(site)
    return tuple(found)


def _place(name: str) -> tuple[int | None, int | None, str | None, str]:
    """(stage, block, branch, role) of a module name."""
    if name.startswith("stem."):
        return None, None, None, "stem"
    if name.startswith("heads."):
        neck = next((role for part, role in _IN_NECK if part in name), None)
        return None, None, "neck" if neck else None, neck or "head"
    found = _PLACE.match(name)
    assert found is not None, name
    stage, block, below = found.groups()
    if block is None:
        return int(stage), None, None, "downsample"
    branch, role = _IN_BLOCK[below]
    return int(stage), int(block), branch, role


def kept_in_float(model: CompactCare, resolution: int) -> tuple[Kept, ...]:
    """What no rule can quantize, and why."""
    modules = list(model.modules())

    def count(kinds: type | UnionType) -> int:
        return sum(isinstance(module, kinds) for module in modules)

    kept = []
    if norms := count(ChannelAffine | nn.BatchNorm2d):
        why = "one multiply-add per channel in front of a quantize, which it fuses into"
        kept.append(Kept("pre-norm scale and shift", norms, why))
    gelus = sum(len(list(m.bottlenecks())) for m in modules if isinstance(m, Interaction))
    kept.append(Kept("GELU", gelus, "element-wise, in the epilogue of a conv"))
    if rotations := count(Rotation):
        macs = _macs_by_module(model, resolution)
        turning = sum(macs.get(n, 0) for n, m in model.named_modules() if isinstance(m, Rotation))
        why = "what it spreads would not fit the integers"
        kept.append(Kept("Hadamard rotation", rotations, why, turning))
    if attention := count(AttentionCore):
        why = "exp and division: 8 bits of the divisor cost 14 dB"
        kept.append(Kept("attention feature map and normaliser", attention, why))
    if isinstance(model.pool, GlobalMean | PooledDepthwise):
        why = "one vector per image; 0.1 % of the work"
        kept.append(Kept("global pool, GELU, LayerNorm", 1, why))
    return tuple(kept)


def _macs_by_module(model: CompactCare, resolution: int) -> dict[str, int]:
    """MACs of one image, by module; counted on shapes alone, and once for every structure."""

    def counted() -> dict[str, int]:
        shadow = copy.deepcopy(model).to("meta").eval()
        image = torch.zeros(1, 3, resolution, resolution, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            shadow(image)
        root = type(shadow).__name__ + "."
        return {
            module.removeprefix(root): sum(counts.values()) // 2
            for module, counts in flops.get_flop_counts().items()
        }

    return _counts.of((resolution, *structure_of(model)), counted)
