"""What the trainer's own work costs over bare forward, backward and step (`make bench WHAT=train`).

Its own work is everything but reading images, which `make bench WHAT=data` measures: normalising,
mixing, soft targets, gradient norm, moving average, finite checks, TensorBoard.

Both sides train CARE-S0 at 96x96, batch 64, in alternating groups of steps, so that noise on the
machine hits both alike; the ratio of neighbouring groups is what counts.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from steps import CLASSES, MEAN, STD, interleaved, random_batch, trainer_step
from torch import Tensor
from torch.nn import functional as F

from care_compress.data.transforms import normalize
from care_compress.model.care import build_model
from care_compress.recipe.sections import AugmentSection, TrainSection
from care_compress.tasks.classification import BothHeads, Classification
from care_compress.train.display import TrainingDisplay


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


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="steps per group")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    plan = TrainSection(
        epochs=10,
        batch_size=options.batch,
        learning_rate=1e-4,
        clip_grad_norm=5.0,
        ema_decay=0.999,
        augment=AugmentSection(mixup=0.2, cutmix=1.0),
    )
    batch = random_batch(options.batch)
    with (
        tempfile.TemporaryDirectory() as curves,
        TrainingDisplay(
            Console(quiet=True), Classification.metric, Path(curves), 0, 1000
        ) as display,
    ):
        # Everything that is ours switched on: mixing, average, curves.
        model = build_model("care_s0", CLASSES, drop_path_rate=0.05)
        objective = BothHeads(None, None)
        ours = trainer_step(model, objective, plan, batch, display=display)
        bare = bare_step(normalize(batch.images, MEAN, STD), batch.labels, plan)
        pairs = interleaved(ours, bare, options.rounds, options.steps)
    report(pairs, options.batch, options.json)


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
