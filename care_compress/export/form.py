"""The same network in the form that a runtime is fastest in, before it is exported.

Runtimes keep images channels last. CPUs split and join them channel by channel in reference code,
and a GPU starts a kernel for every piece. So attention takes its tokens as they lie in memory, all
heads in one product, and both window convolutions are one. Measured in docs/PERFORMANCE.md for
CPUs, counted in docs/DEPLOY.md for TensorRT. Only what the plan leaves in float is touched: what is
quantized keeps its module, and with it the name by which its integers go in.
"""

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.model.care import ATTENTION_EPS, positive_features
from care_compress.model.compact import CompactCare, SlicedMixer, assign, blocks
from care_compress.quantize.spec import FLOAT, Plan
from care_compress.recipe.target import Target

_WINDOWS = (".token_mixer.dwconv1", ".token_mixer.dwconv2")
_PRODUCTS = (".token_mixer.core.kv", ".token_mixer.core.out")


@dataclass(frozen=True)
class Form:
    """Which parts take another form; none of them where the plan quantizes what it would change."""

    windows: bool = False  # the 3x3 and the 7x7 as one convolution
    tokens: bool = False  # attention with tokens before channels


EVERYWHERE = Form(windows=True, tokens=True)


def form_for(target: Target, plan: Plan | None) -> Form:
    """The form for a target; every part of a float model may change."""
    if target.device != "cpu" and not target.is_engine:  # OpenVINO's GPU and NPU: not measured
        return Form()
    quantized = {
        decision.site.name
        for decision in (plan.decisions if plan is not None else ())
        if decision.input != FLOAT or decision.weight not in (None, FLOAT)
    }
    return Form(
        windows=not any(name.endswith(_WINDOWS) for name in quantized),
        tokens=not any(name.endswith(_PRODUCTS) for name in quantized),
    )


def in_form(network: CompactCare, form: Form) -> CompactCare:
    """A copy of the network in this form."""
    network = copy.deepcopy(network)
    for block in blocks(network) if form != Form() else ():
        assert isinstance(block.token_mixer, SlicedMixer)
        block.token_mixer = FormedMixer(block.token_mixer, form)
    return network


class FormedMixer(SlicedMixer):
    """`SlicedMixer` with one window convolution, or with tokens before channels, or both."""

    def __init__(self, mixer: SlicedMixer, form: Form) -> None:
        nn.Module.__init__(self)
        self.group, self.head_dim = mixer.group, mixer.head_dim
        for name, child in mixer.named_children():
            self.add_module(name, child)
        self.tokens_first: TokensFirstCore | None = None
        if form.tokens and self.head_dim is not None:
            self.tokens_first = TokensFirstCore(self.group, self.head_dim)
        self.window: nn.Conv2d | None = None
        if form.windows:
            small, large = mixer.dwconv1, mixer.dwconv2
            assert small.bias is not None and large.bias is not None
            size, channels = large.kernel_size[0], 2 * mixer.group
            padded = F.pad(small.weight, ((size - small.kernel_size[0]) // 2,) * 4)
            window = nn.Conv2d(
                channels, channels, size, padding=large.padding[0], groups=channels
            ).to(large.weight)
            assign(window, torch.cat([padded, large.weight]), torch.cat([small.bias, large.bias]))
            self.window = window
            del self.dwconv1, self.dwconv2

    def windows(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Both windows at once: the smaller one is a 7x7 with a border of zeros."""
        if self.window is None:
            return super().windows(x_BCHW)
        return (self.window(x_BCHW[:, x_BCHW.shape[1] - 2 * self.group :]),)

    def attention(self, att_BgHW: Tensor) -> Tensor:
        """Attention on (B, N, C): a view of an image that lies channels last."""
        if self.tokens_first is None:
            return super().attention(att_BgHW)
        batch, channels, height, width = att_BgHW.shape
        qk_BNC = self.qk(att_BgHW).permute(0, 2, 3, 1).reshape(batch, -1, 2 * channels)
        v_BNC = att_BgHW.permute(0, 2, 3, 1).reshape(batch, -1, channels)
        out: Tensor = self.tokens_first(qk_BNC, v_BNC)
        return out.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class TokensFirstCore(nn.Module):
    """Linear attention of all heads, numerator and denominator, in two products.

    With M one within a head and zero between heads, q (M [k^T v / N, k^T 1 / N]) holds both. That
    is more multiplications by twice the number of heads, of under 1 % of the network's, and a
    third of the operations.
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        mask_CC = torch.kron(torch.eye(channels // head_dim), torch.ones(head_dim, head_dim))
        self.register_buffer("mask_CE", torch.cat([mask_CC, mask_CC], dim=1), persistent=False)

    def forward(self, qk_BNC: Tensor, v_BNC: Tensor) -> Tensor:
        """Attention of every token (B, N, C)."""
        q_BNC, k_BNC = positive_features(qk_BNC).chunk(2, dim=-1)
        v1_BNE = torch.cat([v_BNC, torch.ones_like(v_BNC)], dim=2)
        mask_CE = cast(Tensor, self.mask_CE) / v_BNC.shape[1]
        both_BNE = q_BNC @ ((k_BNC.transpose(1, 2) @ v1_BNE) * mask_CE)
        numerator, denominator = both_BNE.chunk(2, dim=-1)
        return numerator / (denominator + ATTENTION_EPS)
