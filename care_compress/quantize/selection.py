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
from rich.console import Console
from torch import Tensor

from care_compress.console import say
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import BadImageError, CalibrationError, RecipeError
from care_compress.files import read_json, write_text
from care_compress.model.checkpoint import load_checkpoint
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.recipe.quantize import CalibrateSection
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import DataSection
from care_compress.tasks.known import labelled

STREAM = 7  # keeps these draws apart from other users of the recipe's seed
POOL = 8  # candidates per wanted image that `diverse` computes features of
OUTLIERS = 0.05  # share of the candidates it drops
PER_CLUSTER = 16
ITERATIONS = 25

# Indices to those that could be decoded and their deep features (N, C).
Features = Callable[[Sequence[int]], tuple[NDArray[np.int64], Tensor]]


@dataclass(frozen=True)
class CalibrationSet:
    """Chosen images of a training split."""

    samples: Samples
    indices: tuple[int, ...]
    digests: tuple[str, ...]  # of their pixels
    method: str
    stored: tuple[int, ...]  # digests of what they are stored as

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

    def held_back(self, count: int) -> list[int]:
        """Evenly spaced training images that calibrate nothing: what is chosen is chosen on these.

        Not on validation images, since a number is too good on those that chose it.
        """
        taken = set(self.indices)
        rest = [index for index in range(len(self.samples)) if index not in taken]
        if not rest:
            raise RecipeError(
                "every training image calibrates, so none is left to choose by.",
                "lower quantize.calibrate.images",
            )
        return [rest[place] for place in spread_indices(len(rest), count)]

    def listing(self) -> dict[str, Any]:
        """Name, sha256 of the decoded RGB pixels, and a digest of the stored bytes of each."""
        return {
            "method": self.method,
            "classes": list(self.samples.classes),
            "images": [
                {"name": self.samples.name(i), "sha256": digest, "stored": f"{stored:016x}"}
                for i, digest, stored in zip(self.indices, self.digests, self.stored, strict=True)
            ],
        }


def digests_of(samples: Samples, index: int) -> tuple[str, int]:
    """Digests of the pixels, alike in a folder, a zip and a parquet file, and of stored bytes."""
    read, stored = samples.hashed(index)
    image = read.convert("RGB")
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest(), stored


def select_images(
    samples: Samples,
    section: CalibrateSection,
    seed: int,
    features: Features,
    skip_bad: bool = False,
    bad: BadImages | None = None,
) -> CalibrationSet:
    """The calibration images a recipe asks for; with `skip_bad`, others for those that are bad."""
    rng = np.random.default_rng((seed, STREAM))
    if section.list is not None:
        listed = read_list(Path(section.list), samples)
        # Corrections look at the first images, and a list may be sorted by class.
        order = rng.permutation(len(listed.indices))
        return replace(
            listed,
            indices=tuple(listed.indices[i] for i in order),
            digests=tuple(listed.digests[i] for i in order),
            stored=tuple(listed.stored[i] for i in order),
        )
    if len(samples) == 0:
        raise CalibrationError("the training split is empty.", "check data.source")
    count = min(section.images, len(samples))
    if section.method == "random":
        order = rng.permutation(len(samples))
    elif section.method == "stratified":
        order = _equal_order(samples.labels, rng)
    else:
        pool = np.sort(rng.permutation(len(samples))[: POOL * count])
        decoded, found = features(pool.tolist())
        order = decoded[_diverse(found, min(count, len(decoded)), rng)]
    chosen: dict[int, tuple[str, int]] = {}
    for index in (int(i) for i in order):
        if len(chosen) == count:
            break
        try:
            chosen[index] = digests_of(samples, index)
        except BadImageError as error:
            if not skip_bad:
                raise
            if bad is not None:
                bad.reasons[samples.name(index)] = error.message
    if not chosen:
        raise CalibrationError("no training image can be decoded.", "check data.source")
    pixels, stored = zip(*chosen.values(), strict=True)
    return CalibrationSet(samples, tuple(chosen), pixels, section.method, stored)


def deep_features(network: CompactCare, samples: Samples, data: DataSection) -> Features:
    """Pooled outputs of the fourth stage, the input of the classifier."""

    @torch.inference_mode()
    def compute(indices: Sequence[int]) -> tuple[NDArray[np.int64], Tensor]:
        device = next(network.parameters()).device
        decoded, found = [], []
        batches = prepared_batches(
            samples, data, 64, bad=BadImages(), indices=indices, device=device
        )
        for batch in batches:
            decoded.append(batch.indices)
            found.append(network.stage_outputs(batch.images)[-1].mean(dim=(2, 3)).cpu())
        return torch.cat(decoded).numpy(), torch.cat(found)

    return compute


def _equal_order(groups: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """All positions, so that any first ones are the same number from every group."""
    order = rng.permutation(len(groups))
    # Rank of each image within its group; all first ones come before any second one.
    rank = np.empty(len(groups), dtype=np.int64)
    by_group = order[np.argsort(groups[order], kind="stable")]
    starts = np.flatnonzero(np.r_[True, np.diff(groups[by_group]) != 0])
    sizes = np.diff(np.r_[starts, len(groups)])
    rank[by_group] = np.arange(len(groups)) - np.repeat(starts, sizes)
    equal: NDArray[np.int64] = order[np.argsort(rank[order], kind="stable")]
    return equal


def _diverse(features_NC: Tensor, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of candidates: outliers out, then equally from every cluster."""
    features = torch.nn.functional.normalize(features_NC, dim=1)
    score = (features_NC.norm(dim=1) - features_NC.norm(dim=1).mean()).abs()
    keep = max(count, round(len(score) * (1 - OUTLIERS)))
    inside = score.argsort(stable=True)[:keep].sort().values
    points, clusters = features[inside], max(1, count // PER_CLUSTER)
    # k-means: Lloyd's iteration from random points.
    centres = points[torch.from_numpy(rng.permutation(len(points))[:clusters])].clone()
    nearest = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(ITERATIONS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        sizes = torch.bincount(nearest, minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        full = sizes > 0
        centres[full] = sums[full] / sizes[full, None]
    ordered: NDArray[np.int64] = inside.numpy()[_equal_order(nearest.numpy(), rng)]
    return ordered


def write_list(path: Path, chosen: CalibrationSet) -> None:
    """Save a list for ``quantize.calibrate.list``."""
    write_text(path, json.dumps(chosen.listing(), indent=1) + "\n")


def read_list(path: Path, samples: Samples) -> CalibrationSet:
    """A saved list, found in and checked against the training split."""
    fix = "make one with calibration/select.py"
    try:
        content = read_json(path)
        wanted = [(str(entry["name"]), str(entry["sha256"])) for entry in content["images"]]
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}.", fix) from None
    except (ValueError, KeyError, TypeError):
        raise CalibrationError(f"{path} is no calibration list.", fix) from None
    if not wanted:
        raise CalibrationError(f"{path} lists no image.", fix)
    names = {name for name, _ in wanted}
    places = {name: i for i in range(len(samples)) if (name := samples.name(i)) in names}
    stored = []
    for name, digest in wanted:
        if name not in places:
            raise CalibrationError(
                f"{path} lists {name}, which the training split does not have.",
                "use the data.source the list was made from, or make a new list",
            )
        pixels, bytes_of_it = digests_of(samples, places[name])
        stored.append(bytes_of_it)
        if pixels != digest:
            raise CalibrationError(
                f"{name} is not the image that {path} lists (its pixels differ).",
                "restore the image, or make a new list",
            )
    indices = tuple(places[name] for name, _ in wanted)
    digests = tuple(digest for _, digest in wanted)
    return CalibrationSet(samples, indices, digests, f"list {path.name}", tuple(stored))


def select_calibration(recipe: Recipe, out: Path, console: Console) -> None:
    """Write the calibration list that a recipe would use."""
    if recipe.quantize is None or recipe.model.checkpoint is None:
        raise RecipeError(
            f"{recipe.name} calibrates no given checkpoint.",
            "name a quantized recipe such as int8_ptq, and its --ckpt",
        )
    network = rewrite(load_checkpoint(recipe.model.checkpoint, recipe.model.arch), recipe.rewrite)
    samples = labelled(recipe, "train")
    features = deep_features(network, samples, recipe.data)
    skip_bad = recipe.data.skip_bad_images
    chosen = select_images(samples, recipe.quantize.calibrate, recipe.seed, features, skip_bad)
    write_list(out, chosen)
    say(
        f"{len(chosen.indices)} of {len(samples):,} training images ({chosen.method}): {out}",
        console,
    )
