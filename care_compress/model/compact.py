"""CARE for inference: the same function in a form that exports cleanly and can be rewritten.

`CompactCare` starts as a copy of a `Care`; the rewrites in `care_compress.model.rewrite` replace
its parts. Shape suffixes as in `care_compress.model.care`; e is d plus one row that counts tokens.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.errors import CareError
from care_compress.model.care import (
    ATTENTION_EPS,
    Block,
    Care,
    Head,
    Stage,
    TokenMixer,
    check_input_size,
    positive_features,
)


class SlicedMixer(TokenMixer):
    """`TokenMixer` by slices instead of splits.

    OpenVINO cannot compile a compressed 1x1 convolution that reads one output of a Split, and qk
    is one. Training keeps the split, whose backward pass is a single concatenation.
    """

    fused_normaliser = False

    @classmethod
    def of(cls, mixer: TokenMixer) -> "SlicedMixer":
        """The same mixer with the same weights."""
        twin = cls(mixer.group, mixer.head_dim).to(mixer.dwconv1.weight)
        twin.load_state_dict(mixer.state_dict())
        return twin.eval()

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return (memory, features)."""
        g, memory = self.group, x_BCHW.shape[1] - 3 * self.group
        att = x_BCHW[:, memory : memory + g]
        att = self.strips(att) if self.head_dim is None else self.attention(att)
        c1 = self.dwconv1(x_BCHW[:, memory + g : memory + 2 * g])
        c2 = self.dwconv2(x_BCHW[:, memory + 2 * g :])
        return x_BCHW[:, :memory], torch.cat([att, c1, c2], dim=1)

    def split_heads(self, qk_BCHW: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, each (B, h, d, N)."""
        qk = qk_BCHW.reshape(qk_BCHW.shape[0], 2 * heads, self.head_dim or 0, -1)
        return qk[:, :heads], qk[:, heads:]

    def mix_tokens(self, q_BhdN: Tensor, k_BhdN: Tensor, v_BhdN: Tensor) -> Tensor:
        """Attention with numerator and denominator from one product, if so rewritten."""
        if not self.fused_normaliser:
            return super().mix_tokens(q_BhdN, k_BhdN, v_BhdN)
        return fused_linear_attention(q_BhdN, k_BhdN, v_BhdN)


def fused_linear_attention(q_BhdN: Tensor, k_BhdN: Tensor, v_BhdN: Tensor) -> Tensor:
    """Linear attention with [v, 1] as the operand: the extra row of the product is the normaliser.

    [v; 1] k^T q / N = [numerator; q . mean(k)]. The division by N stays: dropping it is exact only
    with eps * N, and float16 needs the smaller numbers.
    """
    q, k = positive_features(q_BhdN), positive_features(k_BhdN)
    v1_BheN = torch.cat([v_BhdN, torch.ones_like(v_BhdN[:, :, :1])], dim=2)
    v1k_Bhed = v1_BheN @ k.transpose(-1, -2) / q.shape[-1]
    both_BheN = v1k_Bhed @ q
    return both_BheN[:, :, :-1] / (both_BheN[:, :, -1:] + ATTENTION_EPS)


class GlobalMean(nn.Module):
    """Mean over all positions."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features (B, C)."""
        return x_BCHW.mean(dim=(2, 3))


class PooledDepthwise(nn.Module):
    """A zero-padded depthwise 3x3 followed by the global mean, as nine border-corrected sums.

    mean_p sum_d w[d] x[p + d] = (1/N) sum_d w[d] S_d, where S_d sums x over all positions that
    offset d can reach: the total minus one border row and/or column, plus their shared corner.
    Needs about a ninth of the multiplications and never stores the convolution's output.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        channels = conv.weight.shape[0]
        self.weight = nn.Parameter(conv.weight.detach().reshape(channels, 3, 3))
        self.bias = conv.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features (B, C)."""
        rows_BCW = x_BCHW.sum(dim=2)
        top, bottom = x_BCHW[:, :, 0], x_BCHW[:, :, -1]
        # Kernel row 0 looks one up, so it never reads the bottom row; row 2 never the top one.
        reached = torch.stack([rows_BCW - bottom, rows_BCW, rows_BCW - top], dim=2)
        total = reached.sum(dim=3)
        left, right = reached[..., 0], reached[..., -1]
        sums_BC33 = torch.stack([total - right, total, total - left], dim=3)
        pixels = x_BCHW.shape[2] * x_BCHW.shape[3]
        pooled = (sums_BC33 * self.weight).sum(dim=(2, 3)) / pixels
        return pooled if self.bias is None else pooled + self.bias


class TwinHeads(nn.Module):
    """The published inference head: the mean of both heads."""

    def __init__(self, head: Head, dist_head: Head) -> None:
        super().__init__()
        self.head = head
        self.dist_head = dist_head

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """Logits (B, K)."""
        mean: Tensor = (self.head(pooled_BC) + self.dist_head(pooled_BC)) / 2
        return mean


class MergedHead(nn.Module):
    """Both heads as one: they share pooling, GELU and the affine-free part of LayerNorm."""

    def __init__(self, heads: TwinHeads) -> None:
        super().__init__()
        both = (heads.head, heads.dist_head)
        weights = [head.fc.weight.double() * head.norm.weight.double() for head in both]
        biases = [
            head.fc.bias.double() + head.fc.weight.double() @ head.norm.bias.double()
            for head in both
        ]
        classes, features = heads.head.fc.weight.shape
        self.norm = nn.LayerNorm(features, eps=heads.head.norm.eps, elementwise_affine=False)
        self.fc = nn.Linear(features, classes).to(heads.head.fc.weight)
        assign(self.fc, (weights[0] + weights[1]) / 2, (biases[0] + biases[1]) / 2)

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.fc(self.norm(F.gelu(pooled_BC)))
        return logits


class CompactCare(nn.Module):
    """CARE for inference, in a form whose parts the rewrites may replace."""

    def __init__(self, model: Care) -> None:
        super().__init__()
        source = copy.deepcopy(model).eval()
        self.arch = source.arch
        self.num_classes = source.num_classes
        self.stem = source.stem
        self.stages = source.stages
        for block in blocks(self):
            block.token_mixer = SlicedMixer.of(block.token_mixer)
        self.pool: nn.Module = GlobalMean()
        self.heads: nn.Module = TwinHeads(source.head, source.dist_head)
        self.requires_grad_(False)

    def forward_features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The four stage outputs; only while the last depthwise is not merged into the pool."""
        if isinstance(self.pool, PooledDepthwise):
            raise CareError(
                "the fourth stage output no longer exists: its depthwise is part of the pool.",
                "rewrite with pool_last_depthwise off",
            )
        return self._stages(x_BCHW)

    def _stages(self, x_BCHW: Tensor) -> list[Tensor]:
        check_input_size(x_BCHW)
        outputs = [self.stem(x_BCHW)]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[1:]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.heads(self.pool(self._stages(x_BCHW)[-1]))
        return logits


def stages(model: CompactCare) -> Iterator[Stage]:
    """The four stages."""
    for stage in model.stages:
        assert isinstance(stage, Stage)
        yield stage


def blocks(model: CompactCare) -> Iterator[Block]:
    """Every block, in order."""
    for stage in stages(model):
        for block in stage.blocks:
            assert isinstance(block, Block)
            yield block


def assign(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Replace a layer's parameters, keeping its dtype."""
    layer.weight = nn.Parameter(weight.detach().to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().to(layer.weight.dtype), requires_grad=False)
