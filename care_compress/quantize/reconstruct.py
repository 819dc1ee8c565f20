"""Learning how low-bit weights round, one half of an interaction at a time.

AdaRound (arXiv 2004.10568) with BRECQ's blocks (2102.05426) and QDrop (2203.05740). A weight w on
the grid of step s is rounded down or up by h in [0, 1]:

    w^ = s clamp(floor(w / s) + h(V)),    h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1),

and V minimises the mean of (y^_c - y_c)^2 / var(y_c) + lambda sum(1 - |2h - 1|^beta), where y is
the float half's output and y^ the quantized one's, on inputs that carry the error of everything
before. beta falls from 20 to 2, so that h ends at 0 or 1. Activation scales learn along; a random
half of the channels skips its quantizer, which keeps the rounding from fitting their noise.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from care_compress.quantize.calibrate import Batches
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.placement import QuantizedCare, site_of
from care_compress.recipe.quantize import ReconstructSection

ZETA, GAMMA = 1.1, -0.1
BETA_START, BETA_END = 20.0, 2.0
WARMUP = 0.2  # part of the steps before the rounding is pushed to a decision
PUSH = 1.0  # lambda, of the mean over weights beside the normalised error
GAIN_RATE = 3e-4  # learning rate of the activations' gains
JUDGED = 128  # calibration images that decide whether a half keeps what it learned
STREAM = 11  # keeps these draws apart from other users of the recipe's seed


def reconstruct(
    quantized: QuantizedCare,
    reference: QuantizedCare,
    section: ReconstructSection,
    batches: Batches,
    seed: int,
    notify: Callable[[str], None] = lambda step: None,
) -> dict[str, bool]:
    """Reconstruct every half of an interaction that has weights below 8 bits, front to back.

    A half keeps its new rounding only if the logits of images it did not learn from come nearer to
    the float ones: what fits its own output best need not be best for the network. Returns which
    halves kept it.
    """
    learned, held_back = _divided(batches, section.images)
    with torch.no_grad():
        wanted_logits = reference(held_back)

    @torch.no_grad()
    def distance() -> float:
        error = quantized(held_back) - wanted_logits
        return float((error - error.mean(dim=0)).square().sum())  # the mean is mended later

    kept: dict[str, bool] = {}
    least = distance()
    names = dict.fromkeys(
        decision.site.name.rsplit("_", 1)[0]
        for decision in quantized.plan.decisions
        if decision.site.branch in ("inter1", "inter2")
        and decision.weight is not None
        and decision.weight.is_integer
        and decision.weight.width < 8
    )
    halves = {name: Half(quantized, name) for name in names}
    for number, (name, half) in enumerate(halves.items()):
        notify(f"learning to round, {number + 1} of {len(halves)}")
        before = [tensor.detach().clone() for tensor in half.tensors()]
        inputs = _collect(quantized, half.start.name, batches, learned)
        wanted = _collect(reference, half.end.name, batches, learned)
        generator = torch.Generator().manual_seed(seed * 1000 + STREAM + number)
        _learn(half, inputs, wanted, section, generator)
        error = distance()
        kept[name] = error < least
        least = min(error, least)
        if not kept[name]:
            with torch.no_grad():
                for tensor, value in zip(half.tensors(), before, strict=True):
                    tensor.copy_(value)
    return kept


def _divided(batches: Batches, wanted: int) -> tuple[int, Tensor]:
    """How many images, from the first, are learned from; and the last ones, held back to judge."""
    count, last = 0, torch.empty(0)
    with closing(batches()) as stream:
        for batch in stream:
            last = (torch.cat([last, batch]) if count else batch)[-JUDGED:]
            count += len(batch)
    judged = min(JUDGED, max(1, count // 3))
    return min(wanted, max(1, count - judged)), last[-judged:]


class Half:
    """One half of an interaction: the nodes from its input to its output, and what rounds in it."""

    def __init__(self, quantized: QuantizedCare, name: str) -> None:
        nodes = list(quantized.graph.graph.nodes)
        own = [node for node in nodes if site_of(node).startswith(f"{name}_")]
        start = next(a for a in own[0].all_input_nodes if a.op != "get_attr")
        while start.op == "call_module":  # the quantizer of the first layer belongs to the half
            start = start.all_input_nodes[0]
        needed, waiting = {own[-1]}, [own[-1]]
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source is not start and source not in needed:
                    needed.add(source)
                    waiting.append(source)
        self.quantized = quantized
        self.start = start
        self.nodes = [node for node in nodes if node in needed]
        self.end = self.nodes[-1]
        self.quantizers = {
            str(node.target): module
            for node in self.nodes
            if node.op == "call_module"
            and isinstance(module := quantized.graph.get_submodule(str(node.target)), IntQuantizer)
        }

    def tensors(self) -> list[Tensor]:
        """Its weights, scales and zero points, and what is learned on top of these."""
        quantizers = list(self.quantizers.values())
        weights = [self.quantized.weight(q.site) for q in quantizers if q.operand == "weight"]
        return [
            *weights,
            *(t for q in quantizers for t in (q.scale, q.zero_point, q.gain, q.shift)),
        ]


def _subgraph(
    root: GraphModule, nodes: Sequence[Node], inputs: Sequence[Node], output: Node
) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[output])
    return GraphModule(root, graph)


@torch.no_grad()
def _collect(model: QuantizedCare, name: str, batches: Batches, images: int) -> Tensor:
    """What the node of this name computes for the first `images` calibration images."""
    nodes = list(model.graph.graph.nodes)
    (node,) = (n for n in nodes if n.name == name)
    before = nodes[: nodes.index(node) + 1]
    (image,) = (n for n in before if n.op == "placeholder")
    head = _subgraph(model.graph, before, [image], node)
    head.graph.eliminate_dead_code()
    head.recompile()
    found, count = [], 0
    with closing(batches()) as stream:
        for batch in stream:
            found.append(head(batch))
            count += len(batch)
            if count >= images:
                break
    return torch.cat(found)[:images]


class _SoftRounding(nn.Module):
    """A weight whose rounding is being learned; stands where its quantizer stood."""

    def __init__(self, quantizer: IntQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.low, self.high = quantizer.quant_min, quantizer.quant_max
        self.scale = quantizer.calculate_qparams()[0][:, None].clone()
        steps = weight.detach().reshape(len(self.scale), -1) / self.scale
        self.floor = steps.floor()
        share = (steps - self.floor).clamp(0.01, 0.99)
        self.v = nn.Parameter(torch.log((share - GAMMA) / (ZETA - share)))

    def up(self) -> Tensor:
        """h(V): how far each weight rounds up."""
        return ((ZETA - GAMMA) * self.v.sigmoid() + GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as rounded so far."""
        return self._on_grid(self.up())

    def decided(self) -> Tensor:
        """The weight with every rounding decided."""
        return self._on_grid((self.up() >= 0.5).float())

    def _on_grid(self, up: Tensor) -> Tensor:
        steps = (self.floor + up).clamp(self.low, self.high)
        return (steps * self.scale).reshape(self.shape)

    def undecided(self, beta: float) -> Tensor:
        """sum(1 - |2h - 1|^beta)."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()


class _Dropped(nn.Module):
    """A quantizer that a random share of the channels of each image skips."""

    def __init__(self, quantizer: IntQuantizer, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.share = share
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Quantize most of x."""
        # One draw per channel: a draw per value would take longer than the convolutions.
        draws = torch.rand(x.shape[:2], generator=self.generator).to(x.device)
        skips = (draws < self.share).view(*x.shape[:2], *[1] * (x.dim() - 2))
        return torch.where(skips, x, self.quantizer(x))


def _learn(
    half: Half,
    inputs: Tensor,
    wanted: Tensor,
    section: ReconstructSection,
    generator: torch.Generator,
) -> None:
    # A network of its own; parameters and quantizers are shared.
    network = _subgraph(half.quantized.graph, half.nodes, [half.start], half.end)
    roundings: dict[str, _SoftRounding] = {}
    for name, quantizer in half.quantizers.items():
        if quantizer.operand != "weight":
            network.set_submodule(name, _Dropped(quantizer, section.drop, generator))
        elif quantizer.spec.width < 8:
            roundings[name] = _SoftRounding(quantizer, half.quantized.weight(quantizer.site))
            network.set_submodule(name, roundings[name])
    gains = [q.gain for q in half.quantizers.values() if q.operand != "weight"]
    for quantizer in half.quantizers.values():
        quantizer.learn(quantizer.operand != "weight")
    groups: list[dict[str, Any]] = [
        {"params": [rounding.v for rounding in roundings.values()]},
        {"params": gains, "lr": GAIN_RATE},
    ]
    optimizer = torch.optim.Adam(groups, lr=section.learning_rate)
    # Per channel: the next pre-norm lifts small channels to the size of large ones.
    variance = wanted.var(dim=(0, 2, 3), keepdim=True).clamp(min=1e-12)
    weights = sum(rounding.v.numel() for rounding in roundings.values())
    for step in range(section.steps):
        chosen = torch.randint(len(inputs), (section.batch_size,), generator=generator)
        error = ((network(inputs[chosen]) - wanted[chosen]).square() / variance).mean()
        progress = (step / section.steps - WARMUP) / (1 - WARMUP)
        loss = error
        if progress > 0:
            beta = BETA_END + (BETA_START - BETA_END) * (1 - progress)
            undecided = sum(rounding.undecided(beta) for rounding in roundings.values())
            loss = error + PUSH * undecided / weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for name, rounding in roundings.items():
            weight = half.quantized.weight(half.quantizers[name].site)
            weight.copy_(rounding.decided())
    for quantizer in half.quantizers.values():
        quantizer.learn(False)
        quantizer.settle()
