"""The CARE network (arXiv 2411.16170): memory + convolution + linear attention, in four stages.

Module and parameter names are the published ones, so published checkpoints load with
``strict=True``; the sizes differ only in the numbers of `ARCHITECTURES`.

Shape suffixes: B batch, C channels, H W rows and columns, N = H*W tokens, h heads,
d channels of one head, g channels of one feature group, K classes. ``x_BCHW`` is an image-shaped
tensor, ``q_BhdN`` one that holds tokens in its last axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.errors import CareError, InputSizeError

ATTENTION_EPS = 1e-6
HEAD_EPS = 1e-6
STEM_STRIDE = 4
MINIMUM_SIZE = STEM_STRIDE * 2**3  # three halvings must leave one pixel for the fourth stage
LINEAR_ATTENTION_STAGES = (2, 3)  # earlier stages have too many tokens for it to pay


@dataclass(frozen=True)
class Architecture:
    """The numbers in which the sizes differ; one entry per stage where there are four."""

    depths: tuple[int, int, int, int]
    memory: tuple[int, int, int, int]  # g: also the width of each of the three feature groups
    ratios: tuple[tuple[int, int], ...]  # (inter1, inter2) expansion per stage
    head_dims: tuple[int, int] = (16, 32)  # channels per attention head in stages 3 and 4
    neck: int = 64  # width of the feature pyramid where there is an answer for every place

    @property
    def widths(self) -> tuple[int, ...]:
        """Stage widths: memory plus three feature groups."""
        return tuple(4 * g for g in self.memory)


ARCHITECTURES: dict[str, Architecture] = {
    "care_nano": Architecture(
        (1, 2, 2, 2), (4, 8, 16, 32), ((2, 2), (2, 2), (4, 4), (4, 2)), neck=32
    ),
    "care_s0": Architecture((2, 4, 8, 4), (8, 16, 32, 64), ((2, 2), (2, 4), (4, 4), (4, 4))),
    "care_s1": Architecture((3, 6, 10, 6), (8, 16, 32, 64), ((2, 4), (2, 4), (4, 4), (4, 4))),
    "care_s2": Architecture((3, 6, 10, 6), (8, 16, 48, 96), ((4, 4), (4, 4), (4, 4), (4, 4))),
}


@dataclass(frozen=True)
class Widths:
    """How wide every block is inside, in network order: what pruning changes of a size."""

    hidden1: tuple[int, ...]  # channels inside interaction 1; 0 where it was taken out
    hidden2: tuple[int, ...]  # of interaction 2; the last block's are the head's features

    @classmethod
    def published(cls, arch: str) -> "Widths":
        """The widths of a named size, which its expansion ratios give."""
        spec = architecture(arch)
        stages = list(zip(spec.depths, spec.memory, spec.ratios, strict=True))
        return cls(
            tuple(3 * g * ratio for depth, g, (ratio, _) in stages for _ in range(depth)),
            tuple(4 * g * ratio for depth, g, (_, ratio) in stages for _ in range(depth)),
        )

    def checked(self, arch: str) -> list[tuple[int, int]]:
        """Both widths of each block; an error unless a network of this size can have them."""
        most = Widths.published(arch)
        lengths = {len(self.hidden1), len(self.hidden2), len(most.hidden1)}
        pairs = zip(self.hidden1 + self.hidden2, most.hidden1 + most.hidden2, strict=False)
        if len(lengths) > 1 or not all(0 <= one <= limit for one, limit in pairs):
            raise CareError(
                f"{arch} has {len(most.hidden1)} blocks, none wider than {max(most.hidden2)}; "
                f"{self} does not fit it.",
                "give a width for each block, at most that of the published network",
            )
        if not self.hidden2[-1]:
            raise CareError("the last block has no features for the head.", "keep some of them")
        return list(zip(self.hidden1, self.hidden2, strict=True))


def positive_features(x: Tensor) -> Tensor:
    """ELU(t) + 1 as exp(min(t, 0)) + max(t, 0).

    The textbook form cancels to exactly 0 below -17 in float32 (-8 in bfloat16); once all of a
    token's query features flush, its normaliser becomes 1/eps and training diverges.
    """
    return x.clamp(max=0).exp() + x.relu()


def linear_attention(q_BhdN: Tensor, k_BhdN: Tensor, v_BhdN: Tensor) -> Tensor:
    """Softmax-free attention, linear in N: out_n = (q_n . kv) / (q_n . mean(k) + eps).

    q and k arrive before the feature map. The d x d summary kv = k v^T / N comes first, because
    N is larger than d at every published resolution. Heads stay channel-major, so that no
    token-sized tensor is ever transposed.
    """
    q, k = positive_features(q_BhdN), positive_features(k_BhdN)
    tokens = q.shape[-1]
    vk_Bhdd = v_BhdN @ k.transpose(-1, -2) / tokens
    normaliser_Bh1N = (q * k.mean(dim=-1, keepdim=True)).sum(dim=-2, keepdim=True) + ATTENTION_EPS
    return (vk_Bhdd @ q) / normaliser_Bh1N


class Sum(nn.Module):
    """A residual addition; a module, so that quantization can name it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """X + y."""
        return x + y


class TokenMixer(nn.Module):
    """Splits channels into memory and three groups; mixes tokens within the groups.

    The memory passes through; the groups go to a 3x3, a 7x7, and either a pair of strip
    convolutions (early stages) or linear attention (late stages).
    """

    def __init__(self, group: int, head_dim: int | None) -> None:
        super().__init__()
        self.group = group
        self.head_dim = head_dim
        self.dwconv1 = nn.Conv2d(group, group, 3, padding=1, groups=group)
        self.dwconv2 = nn.Conv2d(group, group, 7, padding=3, groups=group)
        if head_dim is None:
            self.dwconvatt_1 = nn.Conv2d(group, group, (11, 1), padding=(5, 0), groups=group)
            self.dwconvatt_2 = nn.Conv2d(group, group, (1, 11), padding=(0, 5), groups=group)
        else:
            self.qk = nn.Conv2d(group, 2 * group, 1)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return (memory, features)."""
        g = self.group
        sizes = [x_BCHW.shape[1] - 3 * g, g, g, g]
        memory, att, c1, c2 = torch.split(x_BCHW, sizes, dim=1)
        att = self.strips(att) if self.head_dim is None else self.attention(att)
        features = torch.cat([att, self.dwconv1(c1), self.dwconv2(c2)], dim=1)
        return memory, features

    def strips(self, att_BgHW: Tensor) -> Tensor:
        """11x1 plus 1x11 depthwise: a cheap stand-in for attention on many tokens."""
        out: Tensor = self.dwconvatt_1(att_BgHW) + self.dwconvatt_2(att_BgHW)
        return out

    def attention(self, att_BgHW: Tensor) -> Tensor:
        """Linear attention over all positions; always in float32 where autocast would narrow it.

        Half precision cannot hold exp(t) for the very negative pre-activations CARE learns, and
        rounding t itself to bfloat16 already costs 25 % of exp(t) at t = -60.
        """
        device = att_BgHW.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._attention(att_BgHW.float())
        return self._attention(att_BgHW)

    def _attention(self, att_BgHW: Tensor) -> Tensor:
        assert self.head_dim is not None
        heads = self.group // self.head_dim
        q, k = self.split_heads(self.qk(att_BgHW), heads)
        v_BhdN = att_BgHW.reshape(att_BgHW.shape[0], heads, self.head_dim, -1)
        return self.mix_tokens(q, k, v_BhdN).reshape(att_BgHW.shape)

    def split_heads(self, qk_BCHW: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, each (B, h, d, N)."""
        qk = qk_BCHW.reshape(qk_BCHW.shape[0], 2 * heads, self.head_dim or 0, -1)
        q, k = qk.chunk(2, dim=1)
        return q, k

    def mix_tokens(self, q_BhdN: Tensor, k_BhdN: Tensor, v_BhdN: Tensor) -> Tensor:
        """The attention core; a rewrite may put an equivalent form in its place."""
        return linear_attention(q_BhdN, k_BhdN, v_BhdN)


class Bottleneck(NamedTuple):
    """The layers of one half of an interaction: norm, 1x1 out, GELU, depthwise, 1x1 back."""

    name: str  # inter1, inter2
    norm: nn.Module
    fc1: nn.Conv2d
    conv: nn.Conv2d
    fc2: nn.Conv2d | None  # the network's last one ends with its depthwise convolution


class Interaction(nn.Module):
    """Two inverted-bottleneck mixers: one over the features, one over memory and features.

    One without hidden channels has no layers at all: its input passes through.
    """

    def __init__(self, group: int, hidden1: int, hidden2: int, last: bool) -> None:
        super().__init__()
        features, width = 3 * group, 4 * group
        if hidden1:
            self.inter1_norm = nn.BatchNorm2d(features)
            self.inter1_fc1 = nn.Conv2d(features, hidden1, 1)
            self.inter1_conv = nn.Conv2d(hidden1, hidden1, 3, padding=1, groups=hidden1)
            self.inter1_fc2 = nn.Conv2d(hidden1, features, 1)
            self.inter1_add = Sum()
        if hidden2:
            self.inter2_norm = nn.BatchNorm2d(width)
            self.inter2_fc1 = nn.Conv2d(width, hidden2, 1)
            self.inter2_conv = nn.Conv2d(hidden2, hidden2, 3, padding=1, groups=hidden2)
            self.inter2_fc2 = None if last else nn.Conv2d(hidden2, width, 1)
            self.inter2_add = None if last else Sum()
        self.has_inter1, self.has_inter2 = hidden1 > 0, hidden2 > 0

    def bottlenecks(self) -> Iterator[Bottleneck]:
        """Those that are there."""
        if self.has_inter1:
            fc2: nn.Conv2d | None = self.inter1_fc2
            yield Bottleneck("inter1", self.inter1_norm, self.inter1_fc1, self.inter1_conv, fc2)
        if self.has_inter2:
            fc2 = self.inter2_fc2
            yield Bottleneck("inter2", self.inter2_norm, self.inter2_fc1, self.inter2_conv, fc2)

    def forward(self, memory: Tensor, features: Tensor) -> Tensor:
        """Mix channels of the features, then of everything."""
        if self.has_inter1:
            x = F.gelu(self.inter1_fc1(self.inter1_norm(features)))
            features = self.inter1_add(features, self.inter1_fc2(self.inter1_conv(x)))
        everything = torch.cat([memory, features], dim=1)
        if not self.has_inter2:
            return everything
        x = F.gelu(self.inter2_fc1(self.inter2_norm(everything)))
        out: Tensor = self.inter2_conv(x)
        if self.inter2_fc2 is None or self.inter2_add is None:
            return out
        out = self.inter2_add(everything, self.inter2_fc2(out))
        return out


class Block(nn.Module):
    """Token mixer, then interaction, added to the input after a learned scale (gamma)."""

    def __init__(
        self, group: int, hidden: tuple[int, int], head_dim: int | None, drop: float, last: bool
    ) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(group, head_dim)
        self.inter_layer = Interaction(group, *hidden, last)
        self.drop_path = drop
        self.gamma = None if last else nn.Parameter(torch.full((4 * group,), 1e-1))
        self.add = None if last else Sum()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """One block; the last block of the network returns its hidden features bare."""
        out: Tensor = self.inter_layer(*self.token_mixer(x_BCHW))
        if self.gamma is None or self.add is None:
            return out
        out = out * self.gamma.view(-1, 1, 1)
        if self.training and self.drop_path > 0:
            out = drop_path(out, self.drop_path)
        out = self.add(x_BCHW, out)
        return out


def drop_path(x_BCHW: Tensor, probability: float) -> Tensor:
    """Zero whole samples with this probability and rescale the rest (arXiv 1603.09382)."""
    keep = 1.0 - probability
    mask = x_BCHW.new_empty(x_BCHW.shape[0], 1, 1, 1).bernoulli_(keep)
    return x_BCHW * (mask / keep)


class Stage(nn.Module):
    """Optional 2x downsampling, then blocks."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Sequential | None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Run the stage."""
        if self.downsample is not None:
            x_BCHW = self.downsample(x_BCHW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return x_BCHW


class Head(nn.Module):
    """Classifier on pooled features: GELU, LayerNorm, Linear."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features, eps=HEAD_EPS)
        self.fc = nn.Linear(features, num_classes)

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """Logits (B, K) of pooled features (B, C)."""
        logits: Tensor = self.fc(self.norm(F.gelu(pooled_BC)))
        return logits


class Care(nn.Module):
    """A CARE network: four stages and the published classifier, or another task's head.

    The classifier averages its two heads in eval mode, training mode returns both. With other
    `widths` than the published ones it is a slimmed network of that size.
    """

    task = "classification"
    classes_in = "head.fc.weight"  # the weight with a row for each class
    pools = True  # its head reads the mean over all places of the last stage

    def __init__(
        self,
        arch: str,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        widths: Widths | None = None,
    ) -> None:
        super().__init__()
        spec, widths = architecture(arch), widths or Widths.published(arch)
        hidden = widths.checked(arch)
        if num_classes < 1:
            raise CareError(f"num_classes is {num_classes}.", "give at least one class")
        self.arch = arch
        self.num_classes = num_classes
        self.widths = widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, spec.widths[0], STEM_STRIDE, stride=STEM_STRIDE),
            nn.BatchNorm2d(spec.widths[0]),
        )
        self.stages = nn.ModuleList()
        total, index = sum(spec.depths), 0
        for i, group in enumerate(spec.memory):
            linear = i in LINEAR_ATTENTION_STAGES
            head_dim = spec.head_dims[i - LINEAR_ATTENTION_STAGES[0]] if linear else None
            blocks = []
            for _ in range(spec.depths[i]):
                drop = drop_path_rate * index / max(1, total - 1)  # grows linearly with depth
                last = index == total - 1
                blocks.append(Block(group, hidden[index], head_dim, drop, last))
                index += 1
            downsample = None
            if i > 0:
                before, after = spec.widths[i - 1 : i + 1]
                downsample = nn.Sequential(
                    nn.BatchNorm2d(before), nn.Conv2d(before, after, 2, stride=2)
                )
            self.stages.append(Stage(blocks, downsample))
        self.add_heads((*spec.widths[:-1], hidden[-1][1]))

    def add_heads(self, channels: Sequence[int]) -> None:
        """Add what answers, given how many channels each stage hands on."""
        self.head = Head(channels[-1], self.num_classes)
        self.dist_head = Head(channels[-1], self.num_classes)

    def start_heads(self) -> None:
        """Give fresh heads what they should begin with; nothing for most of them."""

    def readers_of(self, stage: int) -> tuple[str, ...]:
        """Name the layers of the head that read the output of a stage."""
        return ("head.fc", "dist_head.fc") if stage == len(self.stages) - 1 else ()

    @property
    def is_slimmed(self) -> bool:
        """Whether it is narrower than the published size."""
        return self.widths != Widths.published(self.arch)

    def forward_features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The four stage outputs, at strides 4, 8, 16 and 32."""
        check_input_size(x_BCHW)
        x = self.stem(x_BCHW)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits; in training mode (class head, distillation head)."""
        return self.answer(self.forward_features(x_BCHW))

    def answer(self, features: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """What the heads make of the stage outputs."""
        pooled = features[-1].mean(dim=(2, 3))
        logits: Tensor = self.head(pooled)
        distilled: Tensor = self.dist_head(pooled)
        if self.training:
            return logits, distilled
        return (logits + distilled) / 2


class DenseCare(Care):
    """A CARE whose head looks at all four stage outputs, for an answer at every place."""

    pools = False
    first_read = 0  # the first stage whose output its head reads
    dense: nn.Module

    def readers_of(self, stage: int) -> tuple[str, ...]:
        """Name the 1x1 that takes the output of a stage into the pyramid."""
        level = stage - self.first_read
        return (f"dense.pyramid.laterals.{level}",) if level >= 0 else ()

    def add_heads(self, channels: Sequence[int]) -> None:
        """Add the one head of this task."""
        self.dense = self.make_head(channels)

    def make_head(self, channels: Sequence[int]) -> nn.Module:
        """Make the head of a task, which takes a list of features."""
        raise NotImplementedError

    def answer(self, features: Sequence[Tensor]) -> Tensor:
        """What the head makes of the stage outputs."""
        answer: Tensor = self.dense(features)
        return answer


def check_input_size(x_BCHW: Tensor) -> None:
    """Refuse what the stem and three halvings cannot shrink to at least one pixel."""
    if x_BCHW.dim() != 4 or x_BCHW.shape[1] != 3:
        raise InputSizeError(
            f"input has shape {tuple(x_BCHW.shape)}.", "give a batch of RGB images (B, 3, H, W)"
        )
    height, width = x_BCHW.shape[2:]
    if height < MINIMUM_SIZE or width < MINIMUM_SIZE:
        raise InputSizeError(
            f"input is {height}x{width}, too small for four stages.",
            f"use at least {MINIMUM_SIZE}x{MINIMUM_SIZE} pixels",
        )


def architecture(arch: str) -> Architecture:
    """The numbers of a named size."""
    if arch not in ARCHITECTURES:
        raise CareError(f"unknown arch {arch!r}.", f"use one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]


def build_model(
    arch: str,
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    kind: type[Care] = Care,
    widths: Widths | None = None,
) -> Care:
    """A freshly initialised CARE of the named size; `kind` is that of a task."""
    model = kind(arch, num_classes, drop_path_rate, widths)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.start_heads()
    return model
