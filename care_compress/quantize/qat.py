"""Quantization-aware training: the PTQ result, trained by the loop that trains float networks.

Weights, biases, scales and zero points (LSQ+, arXiv 2004.09576) follow the float model: its logits
and its stage outputs. There is no BatchNorm left to go wrong: pre-norms are affine by now.
"""

import math

import torch
from torch import Tensor, nn

from care_compress.files import fingerprint
from care_compress.libraries import quiet
from care_compress.model.checkpoint import state_digest
from care_compress.model.compact import CompactCare
from care_compress.quantize.placement import QuantizedCare
from care_compress.recipe.quantize import QatSection
from care_compress.recipe.sections import WATCHING, TrainSection
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Outcome, Targets, Task
from care_compress.train.loop import HALF_PRECISION, ParameterGroup
from care_compress.train.objective import follow_float
from care_compress.train.stage import Training
from care_compress.train.state import Progress


def train_quantized(
    model: QuantizedCare,
    teacher: CompactCare,
    section: QatSection,
    training: Training,
) -> tuple[QuantizedCare, Progress]:
    """Train `model` to follow `teacher`; the result is settled, in eval mode, on the CPU."""
    prepare_to_learn(model)
    model.guard_attention(section.precision in HALF_PRECISION)
    task = task_called(training.recipe.task)
    objective = FollowFloat(task, teacher.to(training.world.device).eval(), section)
    decides = qat_fingerprint(section, training, model, teacher)
    course = training.course(section, decides, parameter_groups)
    with quiet():
        trainee = training.fit(model, objective, course)
    trained = trainee.result.cpu().eval()
    teacher.cpu()
    assert isinstance(trained, QuantizedCare)
    trained.guard_attention(False)
    trained.requires_grad_(False)
    for quantizer in trained.integers():
        quantizer.learn(False)
        quantizer.settle()
    return trained, trainee.progress


def qat_fingerprint(
    section: QatSection, training: Training, start: nn.Module, teacher: nn.Module
) -> str:
    """Digest of everything that decides the trained weights and scales."""
    data = training.recipe.data.model_dump(mode="json", exclude={"workers", "crop_pct"})
    return fingerprint(
        {
            "qat": section.model_dump(mode="json", exclude=WATCHING),
            "start": state_digest(start.state_dict()),
            "teacher": state_digest(teacher.state_dict()),
            "data": data,
            "samples": training.samples.content_digest(),
            "seed": training.recipe.seed,
        }
    )


def prepare_to_learn(model: QuantizedCare) -> None:
    """Let every parameter and every scale move."""
    model.requires_grad_(True)
    for quantizer in model.integers():
        quantizer.learn(True)


class FollowFloat:
    """Distance of a quantized model from its float teacher.

    loss = what `follow_float` says + lambda(t) dampening

    lambda rises as a cosine from 0: late in training it pulls weights that oscillate between two
    integers towards the nearer one (arXiv 2203.11086), ||s w_int - clip(w)||^2 over steps squared.
    """

    def __init__(self, task: Task, teacher: CompactCare, section: QatSection) -> None:
        self.task = task
        # Whoever ran it before may have left it in another layout, whose sums round otherwise: a
        # QAT that goes on after a kill would not end with the same bits.
        layout = torch.channels_last
        self.teacher = teacher.to(memory_format=layout)  # type: ignore[call-overload]
        self.section = section

    def __call__(
        self, model: nn.Module, images_BCHW: Tensor, targets_BK: Targets, progress: float
    ) -> Outcome:
        """Run student and teacher on the same images."""
        section = self.section
        with torch.no_grad():
            taught = self.teacher.stage_outputs(images_BCHW)
            taught_BK = self.teacher.answer(taught)
        logits_BK, features = model(images_BCHW)
        loss = follow_float(self.task, logits_BK, features, taught_BK, taught, targets_BK, section)
        weight = section.dampening * (1 - math.cos(math.pi * progress)) / 2
        if weight:
            simulated = model if isinstance(model, QuantizedCare) else model.module  # of DDP
            assert isinstance(simulated, QuantizedCare)
            loss = loss + weight * dampening(simulated)
        return Outcome(loss, logits_BK.detach())


def dampening(model: QuantizedCare) -> Tensor:
    """Mean over all integer weights of their squared distance to the grid, in steps."""
    distances, count = [], 0
    for quantizer in model.integers("weight"):
        scale = quantizer.calculate_qparams()[0][:, None]
        steps = model.weight(quantizer.site).reshape(len(scale), -1) / scale
        inside = steps.clamp(quantizer.quant_min, quantizer.quant_max)
        distances.append((inside - inside.detach().round()).square().sum())
        count += steps.numel()
    return torch.stack(distances).sum() / max(1, count)


def parameter_groups(model: nn.Module, plan: TrainSection) -> list[ParameterGroup]:
    """Parameters of a simulated model; `grouped` says how they are trained."""
    assert isinstance(model, QuantizedCare) and isinstance(plan, QatSection)
    learned = [p for q in model.integers() for p in q.parameters() if p.requires_grad]
    apart = {id(parameter) for parameter in learned}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    return grouped(rest, learned, plan)


def grouped(
    network: list[nn.Parameter], quantizers: list[nn.Parameter], plan: QatSection
) -> list[ParameterGroup]:
    """Weights decay, the rest does not; what quantizers learn moves faster and stops earlier."""
    return [
        ParameterGroup([p for p in network if p.dim() > 1 and p.shape[1] > 1], plan.weight_decay),
        ParameterGroup([p for p in network if not (p.dim() > 1 and p.shape[1] > 1)]),
        ParameterGroup(quantizers, rate=plan.scale_rate, until=plan.freeze_scales),
    ]
