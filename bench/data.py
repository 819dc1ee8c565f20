"""Images per second of our loader beside a plain PIL + DataLoader loop, at 224.

    make bench WHAT=data
    .venv/bin/python bench/data.py --json FILE

The plain loop is what one writes by hand: open, convert, resize, crop, to float, normalise, default
collate. Both deliver normalised float batches in the main process; the repetitions alternate.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFilter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.sources import open_samples
from care_compress.recipe.sections import DataSection

SIZE = (500, 375)  # the usual ImageNet image
CLASSES = 10
BATCH_SIZE = 32
DATA = DataSection()


def main(
    images: Annotated[int, typer.Option(help="JPEGs to make")] = 200,
    repetitions: Annotated[int, typer.Option(help="of each loop and worker count")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="write figures here")] = None,
) -> None:
    """Make JPEGs, time both loops with one and two workers, print the median ratio."""
    # torch's threads spin for a while after every operation, on the cores that decode; the network
    # that would need them is not part of this.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = make_images(Path(folder), images)
        results = [compare(Path(folder), files, workers, repetitions) for workers in (1, 2)]
    Console().print(table_of(results))
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in results], indent=2) + "\n")


def make_images(root: Path, count: int) -> list[Path]:
    """JPEGs with the detail of photographs: smooth light, forms with edges, sensor noise."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        image = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y, size = rng.integers(0, 500), rng.integers(0, 375), rng.integers(20, 150)
            colour = tuple(rng.integers(0, 256, 3).tolist())
            draw.ellipse((int(x), int(y), int(x + size), int(y + size * 0.7)), fill=colour)
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32)
        noisy = pixels + rng.normal(0, 6, pixels.shape)
        path = root / "val" / f"{number % CLASSES}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        files.append(path)
    return sorted(files)


class PlainImages(Dataset[tuple[Tensor, int]]):
    """What one writes by hand."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        """How many images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One normalised image and its label."""
        path = self.files[index]
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        width, height = int(image.width * scale), int(image.height * scale)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - 224) // 2, (height - 224) // 2
        image = image.crop((left, top, left + 224, top + 224))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        mean, std = torch.tensor(DATA.mean).view(3, 1, 1), torch.tensor(DATA.std).view(3, 1, 1)
        return (x - mean) / std, int(path.parent.name)


def plain_batches(files: list[Path], workers: int) -> Iterable[Tensor]:
    """Normalised batches of the plain loop."""
    for images, _ in DataLoader(PlainImages(files), BATCH_SIZE, num_workers=workers):
        yield images


def our_batches(root: Path, workers: int) -> Iterable[Tensor]:
    """Batches as a network takes them."""
    data = DATA.model_copy(update={"source": str(root), "workers": workers})
    samples = open_samples(data, "val")
    for batch in prepared_batches(samples, data, BATCH_SIZE, bad=BadImages()):
        yield batch.images


def images_per_second(batches: Callable[[], Iterable[Tensor]]) -> float:
    """Over the whole set, the start of the workers included."""
    start = time.perf_counter()
    count = sum(len(images) for images in batches())
    return count / (time.perf_counter() - start)


@dataclass(frozen=True)
class Comparison:
    """Medians of both loops and of their ratio, and its smallest and largest value."""

    workers: int
    ours_images_per_second: float
    plain_images_per_second: float
    ratio: float
    ratio_min: float
    ratio_max: float


def compare(root: Path, files: list[Path], workers: int, repetitions: int) -> Comparison:
    """Both loops in turn, `repetitions` times."""
    ours, plain = [], []
    for _ in track(range(repetitions), f"{workers} workers", transient=True):
        ours.append(images_per_second(lambda: our_batches(root, workers)))
        plain.append(images_per_second(lambda: plain_batches(files, workers)))
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    median = statistics.median
    return Comparison(
        workers, median(ours), median(plain), median(ratios), min(ratios), max(ratios)
    )


def table_of(results: list[Comparison]) -> Table:
    """The figures, one row per worker count."""
    table = Table("workers", "ours img/s", "per worker", "plain img/s", "ratio", "min .. max")
    for row in results:
        table.add_row(
            f"{row.workers}",
            f"{row.ours_images_per_second:.0f}",
            f"{row.ours_images_per_second / row.workers:.0f}",
            f"{row.plain_images_per_second:.0f}",
            f"{row.ratio:.2f}",
            f"{row.ratio_min:.2f} .. {row.ratio_max:.2f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
