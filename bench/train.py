"""What the trainer's own work costs over bare forward, backward and step (`make bench-train`).

Its own work is everything but reading images, which `make bench-data` measures: normalising,
mixing, soft targets, gradient norm, moving average, finite checks, TensorBoard.

Both sides train CARE-S0 at 96x96, batch 64, in alternating groups of steps, so that noise on the
machine hits both alike; the ratio of neighbouring groups is what counts.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from care_compress.data.loader import Batch
from care_compress.data.transforms import normalize
from care_compress.model.care import build_model
from care_compress.sections import AugmentSection, TrainSection
from care_compress.train.display import TrainingDisplay
from care_compress.train.distributed import World
from care_compress.train.loop import Course, set_up, train_step
from care_compress.train.objective import Classification

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10


def trainer_step(batch: Batch, plan: TrainSection, folder: Path) -> Callable[[], None]:
    """A step of our loop with everything that is ours switched on: mixing, average, curves."""
    course = Course(
        plan=plan,
        steps_per_epoch=1000,
        num_classes=CLASSES,
        seed=0,
        fingerprint="",
        batches=lambda start: (ready for ready in (batch,)),
        prepare=partial(normalize, mean=MEAN, std=STD),
        validate=lambda model: (0, 0),
    )
    trainee = set_up(build_model("care_s0", CLASSES, drop_path_rate=0.05), plan, World())
    runner = trainee.model.train()
    objective = Classification(None, None)
    display = TrainingDisplay(Console(quiet=True), folder, 0, course.total_steps).__enter__()
    return lambda: train_step(trainee, runner, objective, batch, course, World(), display)


def bare_step(images_BCHW: Tensor, labels_B: Tensor, plan: TrainSection) -> Callable[[], None]:
    """Forward, backward and optimizer step on ready floats; nothing else."""
    model = build_model("care_s0", CLASSES, drop_path_rate=0.05).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, fused=True)

    def step() -> None:
        logits, distilled = model(images_BCHW)
        loss = F.cross_entropy(logits, labels_B) + F.cross_entropy(distilled, labels_B)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds per step."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="steps per group")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    pixels = torch.randint(0, 256, (options.batch, 3, 96, 96), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (options.batch,))
    plan = TrainSection(
        epochs=10,
        batch_size=options.batch,
        learning_rate=1e-4,
        clip_grad_norm=5.0,
        ema_decay=0.999,
        augment=AugmentSection(mixup=0.2, cutmix=1.0),
    )
    with tempfile.TemporaryDirectory() as curves:
        batch = Batch(pixels, labels, torch.arange(options.batch))
        ours = trainer_step(batch, plan, Path(curves))
        bare = bare_step(normalize(pixels, MEAN, STD), labels, plan)
        pairs = interleaved(ours, bare, options.rounds, options.steps)
    report(pairs, options.batch, options.json)


def interleaved(
    ours: Callable[[], None], bare: Callable[[], None], rounds: int, steps: int
) -> list[tuple[float, float]]:
    """Seconds per step of both, in neighbouring groups whose order alternates."""
    timed(ours, 2), timed(bare, 2)
    pairs = []
    for round_number in range(rounds):
        order = (ours, bare) if round_number % 2 else (bare, ours)
        first, second = (timed(step, steps) for step in order)
        pairs.append((first, second) if order[0] is ours else (second, first))
    return pairs


def report(pairs: list[tuple[float, float]], batch_size: int, json_file: Path | None) -> None:
    """Print the table; write JSON if asked."""
    ratios = sorted(mine / other for mine, other in pairs)
    quarter = len(ratios) // 4
    ours = batch_size / statistics.median(mine for mine, _ in pairs)
    bare = batch_size / statistics.median(other for _, other in pairs)
    cost, low, high = (
        100 * (ratio - 1)
        for ratio in (statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])
    )
    table = Table("CARE-S0, 96x96, float32", "images/s")
    table.add_row("trainer", f"{ours:.0f}")
    table.add_row("forward + backward + step", f"{bare:.0f}")
    console = Console()
    console.print(table)
    threads = torch.get_num_threads()
    console.print(
        f"cost over bare: {cost:.1f} % (quartiles {low:.1f} to {high:.1f} %), {threads} threads"
    )
    result = {
        "threads": threads,
        "images_per_second": ours,
        "bare_images_per_second": bare,
        "cost_over_bare_percent": cost,
        "cost_quartiles_percent": [low, high],
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
