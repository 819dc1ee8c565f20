"""Exact rewrites: the same function with fewer parameters, operations and hard-to-export shapes.

`rewrite` turns a `Care` into a `CompactCare` for inference and applies the switched-on rewrites.
Each is an identity over the reals; in floating point they agree to rounding (tested at 1e-12 in
float64). All folding arithmetic is done in float64.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
from care_compress.model.cost import Cost, measure_cost
from care_compress.recipe import RewriteSection


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
        _assign(self.fc, sum(weights) / 2, sum(biases) / 2)

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
        for block in _blocks(self):
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


def rewrite(model: Care, switches: RewriteSection | None = None) -> CompactCare:
    """An equivalent inference model; `model` itself stays as it is."""
    compact = _compact(model)
    for name, apply in _chosen(switches):
        del name
        apply(compact)
    return compact


@dataclass(frozen=True)
class RewriteStep:
    """What the model costs after one rewrite."""

    name: str
    cost: Cost


def rewrite_in_steps(
    model: Care, switches: RewriteSection, resolution: int
) -> tuple[CompactCare, list[RewriteStep]]:
    """Like `rewrite`, and the cost of one image as published and after every step."""
    steps = [RewriteStep("published", measure_cost(model, resolution))]
    compact = _compact(model)
    for name, apply in _chosen(switches):
        apply(compact)
        steps.append(RewriteStep(name, measure_cost(compact, resolution)))
    return compact, steps


def _compact(model: Care) -> CompactCare:
    if not isinstance(model, Care):
        raise CareError(
            f"cannot rewrite a {type(model).__name__}.",
            "give the float model from build_model or load_checkpoint",
        )
    return CompactCare(model)


def _chosen(switches: RewriteSection | None) -> Iterator[tuple[str, Callable[[CompactCare], None]]]:
    switches = switches or RewriteSection()
    return ((name, apply) for name, apply in REWRITES.items() if getattr(switches, name))


@torch.no_grad()
def fold_stem(model: CompactCare) -> None:
    """Stem convolution then BatchNorm: W' = a W, b' = a b + c, per output channel."""
    conv = _conv(model.stem[0])
    scale, shift = _affine(model.stem[1])
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(scale)
    _assign(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias * scale + shift)
    model.stem = nn.Sequential(conv)


@torch.no_grad()
def fold_norms(model: CompactCare) -> None:
    """BatchNorm before an unpadded convolution: W' = W a per input channel, b' = b + sum W c.

    Exact here because none of these convolutions pads; a padded one would see c at its border.
    """
    for block in _blocks(model):
        inter = block.inter_layer
        for norm, conv in (("inter1_norm", inter.inter1_fc1), ("inter2_norm", inter.inter2_fc1)):
            _fold_norm_forward(getattr(inter, norm), conv)
            setattr(inter, norm, nn.Identity())
    for stage in _stages(model):
        if stage.downsample is not None:
            conv = _conv(stage.downsample[1])
            _fold_norm_forward(stage.downsample[0], conv)
            stage.downsample = nn.Sequential(conv)


@torch.no_grad()
def merge_heads(model: CompactCare) -> None:
    """Two averaged heads as one affine-free LayerNorm and one Linear."""
    assert isinstance(model.heads, TwinHeads)
    model.heads = MergedHead(model.heads).requires_grad_(False)


@torch.no_grad()
def fold_depthwise_bias(model: CompactCare) -> None:
    """A depthwise bias is constant over positions, so the following 1x1 can add it: b2 + W2 b."""
    for block in _blocks(model):
        inter = block.inter_layer
        pairs = ((inter.inter1_conv, inter.inter1_fc2), (inter.inter2_conv, inter.inter2_fc2))
        for depthwise, pointwise in pairs:
            if pointwise is None:
                continue
            weight = pointwise.weight.double()
            assert pointwise.bias is not None and depthwise.bias is not None
            bias = pointwise.bias.double() + weight.flatten(1) @ depthwise.bias.double()
            _assign(pointwise, weight, bias)
            depthwise.bias = None


@torch.no_grad()
def pool_last_depthwise(model: CompactCare) -> None:
    """The network's last depthwise 3x3 becomes part of the global mean."""
    *_, last = _blocks(model)
    model.pool = PooledDepthwise(last.inter_layer.inter2_conv).requires_grad_(False)
    setattr(last.inter_layer, "inter2_conv", nn.Identity())  # noqa: B010 (not a Conv2d to mypy)


def fuse_normaliser(model: CompactCare) -> None:
    """Attention numerator and denominator from one matrix product."""
    for block in _blocks(model):
        assert isinstance(block.token_mixer, SlicedMixer)
        block.token_mixer.fused_normaliser = True


REWRITES: dict[str, Callable[[CompactCare], None]] = {
    "fold_stem": fold_stem,
    "fold_norms": fold_norms,
    "merge_heads": merge_heads,
    "fold_depthwise_bias": fold_depthwise_bias,
    "pool_last_depthwise": pool_last_depthwise,
    "fuse_normaliser": fuse_normaliser,
}


def _stages(model: CompactCare) -> Iterator[Stage]:
    for stage in model.stages:
        assert isinstance(stage, Stage)
        yield stage


def _blocks(model: CompactCare) -> Iterator[Block]:
    for stage in _stages(model):
        for block in stage.blocks:
            assert isinstance(block, Block)
            yield block


def _conv(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as y = scale x + shift, in float64."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _fold_norm_forward(norm: nn.Module, conv: nn.Conv2d) -> None:
    scale, shift = _affine(norm)
    weight = conv.weight.double()
    assert conv.bias is not None and not any(conv.padding)
    bias = conv.bias.double() + (weight * shift.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    _assign(conv, weight * scale.view(1, -1, 1, 1), bias)


def _assign(layer: nn.Conv2d | nn.Linear, weight: Tensor | float, bias: Tensor | float) -> None:
    """Replace a layer's parameters, keeping its dtype."""
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    layer.weight = nn.Parameter(weight.detach().to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().to(layer.weight.dtype), requires_grad=False)
