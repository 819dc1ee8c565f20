"""Which training images calibrate: chosen once, written down as name and sha256.

``random`` draws, ``stratified`` draws the same number from every class, ``diverse`` (QuantVGGT)
drops outliers, clusters deep features and draws the same number from every cluster.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.samples import Samples
from care_compress.errors import CalibrationError
from care_compress.model.compact import CompactCare
from care_compress.quantization_sections import CalibrateSection
from care_compress.run import write_text
from care_compress.sections import DataSection

STREAM = 7  # keeps these draws apart from other users of the recipe's seed
POOL = 8  # candidates per wanted image that `diverse` computes features of
OUTLIERS = 0.05  # share of the candidates it drops
PER_CLUSTER = 16
ITERATIONS = 25

Features = Callable[[Sequence[int]], Tensor]  # indices to deep features (N, C)


@dataclass(frozen=True)
class CalibrationSet:
    """Chosen images of a training split."""

    samples: Samples
    indices: tuple[int, ...]
    method: str

    def batches(
        self, data: DataSection, batch_size: int, device: torch.device
    ) -> Generator[Tensor]:
        """One pass in the listed order, as normalised floats; evaluation's preprocessing."""
        loaded = prepared_batches(
            self.samples, data, batch_size, bad=BadImages(), indices=self.indices, device=device
        )
        with contextlib.closing(loaded):
            for batch in loaded:
                yield batch.images

    def listing(self) -> dict[str, Any]:
        """Name and sha256 (of the decoded RGB pixels) of every image."""
        return {
            "method": self.method,
            "classes": list(self.samples.classes),
            "images": [
                {"name": self.samples.name(i), "sha256": pixel_digest(self.samples, i)}
                for i in self.indices
            ],
        }


def pixel_digest(samples: Samples, index: int) -> str:
    """The same for a folder, a zip and a parquet file of one image."""
    image = samples.image(index).convert("RGB")
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def select_images(
    samples: Samples, section: CalibrateSection, seed: int, features: Features
) -> CalibrationSet:
    """The calibration images a recipe asks for."""
    rng = np.random.default_rng((seed, STREAM))
    if section.list is not None:
        listed = read_list(Path(section.list), samples)
        # Corrections look at the first images, and a list may be sorted by class.
        shuffled = rng.permutation(listed.indices)
        return replace(listed, indices=tuple(int(i) for i in shuffled))
    if len(samples) == 0:
        raise CalibrationError("the training split is empty.", "check data.source")
    count = min(section.images, len(samples))
    if section.method == "random":
        chosen = rng.permutation(len(samples))[:count]
    elif section.method == "stratified":
        chosen = _equal_draw(samples.labels, count, rng)
    else:
        pool = np.sort(rng.permutation(len(samples))[: POOL * count])
        chosen = pool[_diverse(features(pool.tolist()), count, rng)]
    return CalibrationSet(samples, tuple(int(i) for i in chosen), section.method)


def deep_features(network: CompactCare, samples: Samples, data: DataSection) -> Features:
    """Pooled outputs of the fourth stage, the input of the classifier."""

    @torch.inference_mode()
    def compute(indices: Sequence[int]) -> Tensor:
        pool = CalibrationSet(samples, tuple(indices), "pool")
        device = next(network.parameters()).device
        found = [
            network.stage_outputs(images)[-1].mean(dim=(2, 3))
            for images in pool.batches(data, 64, device)
        ]
        return torch.cat(found).cpu()

    return compute


def _equal_draw(
    groups: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`count` positions, the same number from every group as far as that goes."""
    order = rng.permutation(len(groups))
    # Rank of each image within its group; all first ones come before any second one.
    rank = np.empty(len(groups), dtype=np.int64)
    by_group = order[np.argsort(groups[order], kind="stable")]
    starts = np.flatnonzero(np.r_[True, np.diff(groups[by_group]) != 0])
    sizes = np.diff(np.r_[starts, len(groups)])
    rank[by_group] = np.arange(len(groups)) - np.repeat(starts, sizes)
    chosen: NDArray[np.int64] = order[np.argsort(rank[order], kind="stable")][:count]
    return chosen


def _diverse(features_NC: Tensor, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of `count` candidates: outliers out, then equally from every cluster."""
    features = torch.nn.functional.normalize(features_NC, dim=1)
    score = (features_NC.norm(dim=1) - features_NC.norm(dim=1).mean()).abs()
    keep = max(count, round(len(score) * (1 - OUTLIERS)))
    inside = score.argsort(stable=True)[:keep].sort().values
    clusters = max(1, count // PER_CLUSTER)
    groups = _k_means(features[inside], clusters, rng)
    chosen: NDArray[np.int64] = inside.numpy()[_equal_draw(groups, count, rng)]
    return chosen


def _k_means(points: Tensor, clusters: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Cluster of every point (Lloyd's iteration from random points)."""
    first = rng.permutation(len(points))[:clusters]
    centres = points[torch.from_numpy(first)].clone()
    nearest = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(ITERATIONS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        sizes = torch.bincount(nearest, minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        full = sizes > 0
        centres[full] = sums[full] / sizes[full, None]
    groups: NDArray[np.int64] = nearest.numpy()
    return groups


def write_list(path: Path, chosen: CalibrationSet) -> None:
    """Save a list for ``quantize.calibrate.list``."""
    write_text(path, json.dumps(chosen.listing(), indent=1) + "\n")


def read_list(path: Path, samples: Samples) -> CalibrationSet:
    """A saved list, found in and checked against the training split."""
    fix = "make one with calibration/select.py"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        wanted = [(str(entry["name"]), str(entry["sha256"])) for entry in content["images"]]
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}.", fix) from None
    except (ValueError, KeyError, TypeError):
        raise CalibrationError(f"{path} is no calibration list.", fix) from None
    if not wanted:
        raise CalibrationError(f"{path} lists no image.", fix)
    names = {name for name, _ in wanted}
    places = {name: i for i in range(len(samples)) if (name := samples.name(i)) in names}
    for name, digest in wanted:
        if name not in places:
            raise CalibrationError(
                f"{path} lists {name}, which the training split does not have.",
                "use the data.source the list was made from, or make a new list",
            )
        if pixel_digest(samples, places[name]) != digest:
            raise CalibrationError(
                f"{name} is not the image that {path} lists (its pixels differ).",
                "restore the image, or make a new list",
            )
    return CalibrationSet(samples, tuple(places[name] for name, _ in wanted), f"list {path.name}")
