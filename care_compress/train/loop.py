"""The training loop: float training and QAT run through `fit`.

Everything random is a function of (seed, step) or (seed, epoch, image), never of how the process
got there. So a run killed at any moment and started again ends, on a CPU, with the same bits.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from care_compress.data.loader import BadImages, Batch
from care_compress.errors import DataError, TrainingError
from care_compress.recipe.sections import TrainSection
from care_compress.run.processes import World, distribute, synchronise_norms
from care_compress.tasks.task import Lesson, Objective, Score, Task, value_of
from care_compress.train.display import Silent, TrainingDisplay
from care_compress.train.state import STATE_FILE, Progress, Trainee, forget, step_back

STEP_STREAM = 2  # keeps the per-step seeds apart from the other users of the recipe's seed
DIVERGED = 3.0  # times the first loss, or that of a uniform guess
GUARD_STEPS = 50  # steps before the divergence guard speaks
ONE_CYCLE_START = 1 / 25  # where one-cycle begins, as a fraction of its peak
# A model in, its score on this process's share of the validation images out.
Validate = Callable[[nn.Module], Score | None]
HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay and a rate relative to the schedule's."""

    parameters: list[nn.Parameter]
    weight_decay: float = 0.0
    rate: float = 1.0
    until: float = 1.0  # part of the training after which they stay as they are


def decayed_and_free(model: nn.Module, plan: TrainSection) -> list[ParameterGroup]:
    """Matrices decay; weight decay pulls norms, biases and layer scales towards nothing useful."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        ParameterGroup([p for p in trained if p.dim() > 1], plan.weight_decay),
        ParameterGroup([p for p in trained if p.dim() <= 1]),
    ]


Groups = Callable[[nn.Module, TrainSection], list[ParameterGroup]]


@dataclass(frozen=True)
class Course:
    """What a training works on."""

    plan: TrainSection
    task: Task
    steps_per_epoch: int
    num_classes: int
    seed: int
    fingerprint: str  # of everything that decides the weights
    batches: Callable[[int], Generator[Batch]]  # from a step to the end
    prepare: Callable[[Tensor], Tensor]  # uint8 pixels to normalised float32
    validate: Validate
    groups: Groups = decayed_and_free
    bad: BadImages = field(default_factory=BadImages)  # that were left out so far
    # Told of each validation: how many there were, and its metric. It ends the
    # training by raising.
    watch: Callable[[int, float], None] | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.plan.total_steps(self.steps_per_epoch)


def fit(
    model: nn.Module,
    objective: Objective,
    course: Course,
    folder: Path,
    world: World,
    console: Console,
) -> Trainee:
    """Train to the end, resuming from `folder` if the same training was cut off there."""
    checkpoint = folder / STATE_FILE
    trainee = set_up(model, course.plan, world, course.groups)
    resumed = trainee.resume(checkpoint, course.fingerprint)
    course.bad.reasons.update(trainee.progress.skipped)
    world.wait()  # nobody may touch the state before everybody has read it
    if trainee.progress.step == course.total_steps:
        return trainee
    if resumed:
        console.print(f"resuming after step {trainee.progress.step}/{course.total_steps}")
    elif world.is_main:
        if checkpoint.exists():
            console.print("recipe or data changed since the last training here: training anew")
        forget(checkpoint)
    try:
        display = Silent()
        if world.is_main:
            curves, done = folder / "tensorboard", trainee.progress.step
            metric = course.task.metric
            display = TrainingDisplay(console, metric, curves, done, course.total_steps)
        with display:
            _train(trainee, objective, course, checkpoint, world, display)
    except TrainingError as error:
        if not world.is_main:
            raise
        step = step_back(checkpoint)
        kept = f"{error.message} The state after step {step} is kept in {checkpoint}."
        raise TrainingError(kept, error.fix) from error
    world.wait()
    return trainee


def _train(
    trainee: Trainee,
    objective: Objective,
    course: Course,
    checkpoint: Path,
    world: World,
    display: Silent,
) -> None:
    """The remaining steps, with validation and checkpoints in between."""
    plan = course.plan
    runner = distribute(trainee.model, world).train()
    if world.is_main and trainee.progress.step == 0:
        _save(trainee, course, checkpoint)
    with contextlib.closing(course.batches(trainee.progress.step)) as batches:
        for batch in batches:
            train_step(trainee, runner, objective, batch, course, world, display)
            done = trainee.progress.step
            finished = done == course.total_steps
            if finished or done % (plan.validate_epochs * course.steps_per_epoch) == 0:
                _validate(trainee, course, world, display)
                runner.train()
            if world.is_main and (finished or done % plan.checkpoint_steps == 0):
                _save(trainee, course, checkpoint)


def _save(trainee: Trainee, course: Course, checkpoint: Path) -> None:
    trainee.progress.skipped = dict(course.bad.reasons)
    trainee.save(checkpoint, course.fingerprint)


def set_up(
    model: nn.Module,
    plan: TrainSection,
    world: World,
    groups: Groups = decayed_and_free,
) -> Trainee:
    """The model on its device with optimizer, scaler and average, before the first step."""
    layout = torch.channels_last
    model = synchronise_norms(model, world)
    model = model.to(device=world.device, memory_format=layout)  # type: ignore[call-overload]
    optimized: list[dict[str, Any]] = [
        {"params": g.parameters, "weight_decay": g.weight_decay, "rate": g.rate, "until": g.until}
        for g in groups(model, plan)
    ]
    return Trainee(
        model=model,
        optimizer=torch.optim.AdamW(optimized, lr=plan.learning_rate, fused=True),
        scaler=torch.amp.GradScaler(world.device.type, enabled=plan.precision == "fp16"),
        average=None if plan.ema_decay is None else averaged(model, plan.ema_decay),
        progress=Progress(),
    )


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An `AveragedModel` whose decay grows as min(decay, (1 + n) / (10 + n)) with its updates n.

    Without the warm-up a short training would end with an average of its own initialisation.
    """

    @torch.no_grad()
    def update(means: Sequence[Tensor], values: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        if means[0].is_floating_point():
            torch._foreach_lerp_(list(means), list(values), weight)
        else:
            torch._foreach_copy_(list(means), list(values))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def train_step(
    trainee: Trainee,
    runner: nn.Module,
    objective: Objective,
    batch: Batch,
    course: Course,
    world: World,
    display: Silent,
) -> None:
    """One step: pixels to floats, mix, forward, check, backward, update, average."""
    plan, step = course.plan, trainee.progress.step
    # Drop-path draws from torch's generator; reseeding makes its draws a function of the step.
    seeds = np.random.SeedSequence((course.seed, STEP_STREAM, step, world.rank))
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    images = course.prepare(batch.images.to(world.device))
    lesson = Lesson(plan, course.num_classes, course.seed, step)
    images, targets = course.task.targets(batch, images, lesson)

    progress = step / course.total_steps
    half = HALF_PRECISION.get(plan.precision)
    with torch.autocast(world.device.type, half, enabled=half is not None):
        outcome = objective(runner, images, targets, progress)
    # The loss of the global batch, so that every process takes the same way out of a bad one.
    loss = float(world.total(outcome.loss.detach().clone())) / world.size
    _check_loss(trainee.progress, loss, course)

    rate = learning_rate(step, course.steps_per_epoch, plan)
    for group in trainee.optimizer.param_groups:
        # A rate of zero moves nothing: AdamW's decay is multiplied by it too.
        group["lr"] = rate * group["rate"] if progress < group["until"] else 0.0
    trainee.optimizer.zero_grad()
    trainee.scaler.scale(outcome.loss).backward()  # type: ignore[no-untyped-call]
    trainee.scaler.unscale_(trainee.optimizer)
    limit = math.inf if plan.clip_grad_norm is None else plan.clip_grad_norm
    norm = nn.utils.clip_grad_norm_(trainee.model.parameters(), limit)
    # Under fp16 the scaler skips such steps by itself: it tries out how far it may scale.
    if not trainee.scaler.is_enabled() and not math.isfinite(norm):
        raise TrainingError(f"the gradient is {float(norm)} at step {step + 1}.", _remedy(plan))
    trainee.scaler.step(trainee.optimizer)
    trainee.scaler.update()
    if trainee.average is not None:
        trainee.average.update_parameters(trainee.model)

    trainee.progress.step = step + 1
    score = course.task.running_score(outcome.logits, batch)
    display.step(step + 1, loss, score, rate, len(batch.labels) * world.size)


def learning_rate(step: int, steps_per_epoch: int, plan: TrainSection) -> float:
    """The rate of one step: warm-up, then a cosine down to ``final_lr_fraction`` of the peak.

    `cosine` warms up on a line from zero; `one_cycle` on a cosine from 1/25 of the peak. It is a
    function of the step alone, so that a resumed run needs no scheduler state.
    """
    peak, final = plan.learning_rate, plan.learning_rate * plan.final_lr_fraction
    warmup = round(plan.warmup_epochs * steps_per_epoch)
    total = plan.total_steps(steps_per_epoch)
    if step < warmup:
        if plan.schedule == "one_cycle":
            return _cosine(peak * ONE_CYCLE_START, peak, step / warmup)
        return peak * (step + 1) / warmup
    return _cosine(peak, final, (step - warmup) / max(1, total - 1 - warmup))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _check_loss(progress: Progress, loss: float, course: Course) -> None:
    """Stop before a bad step reaches the weights."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {progress.step + 1}.", _remedy(course.plan)
        )
    if progress.first_loss is None:
        progress.first_loss = progress.recent_loss = loss
    progress.recent_loss = 0.95 * progress.recent_loss + 0.05 * loss
    # A fine-tuning begins far below a uniform guess and may well rise at first.
    limit = DIVERGED * max(progress.first_loss, math.log(course.num_classes))
    if progress.step >= GUARD_STEPS and progress.recent_loss > limit:
        raise TrainingError(
            f"training diverged at step {progress.step + 1}: the loss is around "
            f"{progress.recent_loss:.2f} and began at {progress.first_loss:.2f}.",
            _remedy(course.plan),
        )


def _remedy(plan: TrainSection) -> str:
    return (
        f"lower {plan.place}.learning_rate (now {plan.learning_rate}) or set {plan.place}."
        "clip_grad_norm, under another --name if the kept state matters"
    )


def _validate(trainee: Trainee, course: Course, world: World, display: Silent) -> None:
    """Judge the weights to keep on the validation images of all processes."""
    score: Score | None = None
    for part in world.gathered(course.validate(trainee.result)):
        score = part if score is None or part is None else score + part
    if score is None or not score.images:  # every process sees it, so all of them end here
        raise DataError(
            "no validation image can be decoded, so there is nothing to judge the training by.",
            "check the val split of data.source",
        )
    metric = course.task.metric
    entry = {
        "epoch": trainee.progress.step / course.steps_per_epoch,
        metric.key: value_of(score, metric),
        "loss": trainee.progress.recent_loss,
    }
    trainee.progress.history.append(entry)
    display.validated(trainee.progress.step, entry)
    if course.watch is not None:
        course.watch(len(trainee.progress.history), entry[metric.key])
