"""What training shows: a live bar in a terminal, plain lines elsewhere, TensorBoard curves."""

import time
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from care_compress.console import PLAIN_LINE_SECONDS
from care_compress.tasks.task import Metric


class Silent:
    """Watches a training and shows nothing: for every process but the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(
        self, step: int, loss: float, accuracy: float | None, rate: float, images: int
    ) -> None:
        """After one step: loss, accuracy in percent, learning rate, images of all processes."""

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        """After one validation."""


class TrainingDisplay(Silent):
    """Progress on the console and curves in a TensorBoard folder."""

    def __init__(
        self, console: Console, metric: Metric, curves: Path, start: int, total: int
    ) -> None:
        self.console = console
        self.metric = metric
        self.total = total
        self.start = start
        self.loss = self.accuracy = 0.0
        self.images = 0
        # Points after the resumed step come from work that was lost; the new ones replace them.
        self.writer = SummaryWriter(str(curves), purge_step=start)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        self.bar.start()
        self.task = self.bar.add_task("", total=self.total, completed=self.start, note="")
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        self.writer.close()

    def step(
        self, step: int, loss: float, accuracy: float | None, rate: float, images: int
    ) -> None:
        """Smooth the numbers and show them."""
        first = self.images == 0
        if first:  # the clock starts with the first batch, not with the loading before it
            self.began = self.last_line = time.monotonic()
        self.images += images
        self.loss = loss if first else 0.95 * self.loss + 0.05 * loss
        if accuracy is not None:
            self.accuracy = accuracy if first else 0.95 * self.accuracy + 0.05 * accuracy
        now = time.monotonic()
        speed = (self.images - images) / max(1e-9, now - self.began)
        right = "" if accuracy is None else f"{self.metric.name} {self.accuracy:.1f} %  "
        note = f"loss {self.loss:.3f}  {right}{speed:,.0f} images/s"
        self.bar.update(self.task, completed=step, note=note)
        if not self.console.is_terminal and now - self.last_line >= PLAIN_LINE_SECONDS:
            self.last_line = now
            left = (self.total - step) * (now - self.began) / max(1, step - self.start - 1)
            self.console.print(f"step {step}/{self.total}  {note}  {left / 60:.1f} min left")
        for name, value in (("loss", loss), (self.metric.key, accuracy), ("learning_rate", rate)):
            if value is not None:
                self.writer.add_scalar(f"train/{name}", value, step)

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        """One line per validation."""
        shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        self.console.print(f"step {step}/{self.total}  {shown}")
        for name, value in metrics.items():
            self.writer.add_scalar(f"validation/{name}", value, step)
