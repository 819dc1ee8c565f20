"""CARE for inference: the same function in a form that exports cleanly and can be rewritten.

`CompactCare` starts as a copy of a `Care`; the rewrites in `care_compress.model.rewrite` replace
its parts. Shape suffixes as in `care_compress.model.care`.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.errors import CareError
from care_compress.model.attention import AttentionCore
from care_compress.model.care import (
    Block,
    Care,
    DenseCare,
    Head,
    Interaction,
    Stage,
    TokenMixer,
    check_input_size,
)


class SlicedMixer(TokenMixer):
    """`TokenMixer` by slices instead of splits.

    OpenVINO cannot compile a compressed 1x1 convolution that reads one output of a Split, and qk
    is one. Training keeps the split, whose backward pass is a single concatenation.
    """

    def __init__(self, group: int, head_dim: int | None) -> None:
        super().__init__(group, head_dim)
        self.core = None if head_dim is None else AttentionCore()

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
        return x_BCHW[:, :memory], torch.cat([att, *self.windows(x_BCHW)], dim=1)

    def windows(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """The 3x3 and the 7x7, on the last two groups."""
        start = x_BCHW.shape[1] - 2 * self.group
        c1 = self.dwconv1(x_BCHW[:, start : start + self.group])
        return c1, self.dwconv2(x_BCHW[:, start + self.group :])

    def split_heads(self, qk_BCHW: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, each (B, h, d, N)."""
        qk = qk_BCHW.reshape(qk_BCHW.shape[0], 2 * heads, self.head_dim or 0, -1)
        return qk[:, :heads], qk[:, heads:]

    def mix_tokens(self, q_BhdN: Tensor, k_BhdN: Tensor, v_BhdN: Tensor) -> Tensor:
        """The attention core in the form a rewrite chose."""
        assert self.core is not None
        out: Tensor = self.core(q_BhdN, k_BhdN, v_BhdN)
        return out


class CompactInteraction(Interaction):
    """`Interaction` with places for another activation, and for rotations before second 1x1s."""

    def __init__(self, source: Interaction) -> None:
        nn.Module.__init__(self)
        for name, child in source.named_children():
            self.add_module(name, child)
        for name in ("inter2_fc2", "inter2_add"):  # the last interaction has neither
            if not hasattr(self, name):
                setattr(self, name, None)
        self.has_inter1, self.has_inter2 = source.has_inter1, source.has_inter2
        self.activation: nn.Module = nn.GELU()
        self.inter1_rotation: nn.Module = nn.Identity()
        self.inter2_rotation: nn.Module = nn.Identity()

    def forward(self, memory: Tensor, features: Tensor) -> Tensor:
        """Mix channels of the features, then of everything."""
        if self.has_inter1:
            x: Tensor = self.activation(self.inter1_fc1(self.inter1_norm(features)))
            x = self.inter1_fc2(self.inter1_rotation(self.inter1_conv(x)))
            features = self.inter1_add(features, x)
        everything = torch.cat([memory, features], dim=1)
        if not self.has_inter2:
            return everything
        x = self.activation(self.inter2_fc1(self.inter2_norm(everything)))
        x = self.inter2_conv(x)
        if self.inter2_fc2 is None or self.inter2_add is None:
            return x
        x = self.inter2_add(everything, self.inter2_fc2(self.inter2_rotation(x)))
        return x


class ChannelAffine(nn.Module):
    """y_c = scale_c x_c + shift_c: a BatchNorm in eval mode, and the scale site in front of a 1x1.

    In a quantized graph it is one multiply-add that fuses into the quantize behind it.
    """

    def __init__(self, scale_C: Tensor, shift_C: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale_C.detach().view(-1, 1, 1).float().clone())
        self.shift = nn.Parameter(shift_C.detach().view(-1, 1, 1).float().clone())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scale and shift every channel."""
        return x_BCHW * self.scale + self.shift


class Rotation(nn.Module):
    """An orthogonal map within blocks of channels: y = H x, as a grouped 1x1 convolution.

    H is a Hadamard matrix over sqrt(block), so outlier channels spread over their block. The
    layer behind it takes W H^T and the product stays what it was. It runs in float.
    """

    def __init__(self, channels: int, block: int) -> None:
        super().__init__()
        hadamard = torch.ones(1, 1)
        while len(hadamard) < block:
            top = torch.cat([hadamard, hadamard], dim=1)
            hadamard = torch.cat([top, torch.cat([hadamard, -hadamard], dim=1)])
        self.block = block
        matrix = (hadamard / block**0.5).repeat(channels // block, 1)
        self.weight = nn.Parameter(matrix[:, :, None, None], requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Rotate every block of channels."""
        return F.conv2d(x_BCHW, self.weight, self.bias, groups=len(self.bias) // self.block)


class GlobalMean(nn.Module):
    """Mean over all positions."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features (B, C)."""
        return x_BCHW.mean(dim=(2, 3))


class PooledDepthwise(nn.Module):
    """A zero-padded depthwise 3x3 followed by the global mean, as one weighted sum.

    mean_p sum_d w[d] x[p + d] = (1/N) sum_q x[q] sum_d w[d] [q - d is inside]: one weight for each
    position, which differs from the kernel's sum at the border only. Needs a ninth of the
    multiplications, and never stores the convolution's output.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        channels = conv.weight.shape[0]
        self.weight = nn.Parameter(conv.weight.detach().reshape(channels, 3, 3))
        self.bias = conv.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features (B, C)."""
        rows_3H, columns_3W = (_reached(size, x_BCHW) for size in x_BCHW.shape[2:])
        reached_33HW = rows_3H[:, None, :, None] * columns_3W[:, None, :]
        # All of it is constant at one input size, and no part of what an image costs.
        weight_CHW = (self.weight[..., None, None] * reached_33HW).sum(dim=(1, 2))
        pooled = (x_BCHW * weight_CHW).sum(dim=(2, 3)) / (x_BCHW.shape[2] * x_BCHW.shape[3])
        return pooled if self.bias is None else pooled + self.bias


def _reached(size: int, like: Tensor) -> Tensor:
    """Whether row d of a 3-wide kernel reaches a position from inside: (3, size)."""
    # Made from `like`: an exported graph would keep the device that `torch.arange` was given.
    ones = like.new_ones(size)
    # Row 0 looks one up, so it never reads the last position; row 2 never the first.
    return torch.stack([F.pad(ones[1:], (0, 1)), ones, F.pad(ones[1:], (1, 0))])


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
        if not isinstance(model, Care):
            raise CareError(
                f"cannot rewrite a {type(model).__name__}.",
                "give the float model from build_model or load_checkpoint",
            )
        source = copy.deepcopy(model).eval()
        self.arch = source.arch
        self.num_classes = source.num_classes
        self.widths = source.widths
        self.stem = source.stem
        self.stages = source.stages
        for block in blocks(self):
            block.token_mixer = SlicedMixer.of(block.token_mixer)
            block.inter_layer = CompactInteraction(block.inter_layer)
        self.task = source.task
        # Nothing is pooled where there is an answer for every place.
        self.pool: nn.Module | None = None
        if isinstance(source, DenseCare):
            self.heads: nn.Module = source.dense
        else:
            self.pool = GlobalMean()
            self.heads = TwinHeads(source.head, source.dist_head)
        self.requires_grad_(False)

    def forward_features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The four stage outputs; only while the last depthwise is not merged into the pool."""
        if isinstance(self.pool, PooledDepthwise):
            raise CareError(
                "the fourth stage output no longer exists: its depthwise is part of the pool.",
                "rewrite with pool_last_depthwise off",
            )
        return self.stage_outputs(x_BCHW)

    def stage_outputs(self, x_BCHW: Tensor) -> list[Tensor]:
        """What each stage hands on; the fourth may still lack the depthwise that moved on."""
        check_input_size(x_BCHW)
        outputs = [self.stem(x_BCHW)]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[1:]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K), or what the head of another task gives out."""
        return self.answer(self.stage_outputs(x_BCHW))

    def answer(self, features: Sequence[Tensor]) -> Tensor:
        """What the heads make of the stage outputs."""
        answer: Tensor
        if self.pool is None:
            answer = self.heads(features)
        else:
            answer = self.heads(self.pool(features[-1]))
        return answer


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
