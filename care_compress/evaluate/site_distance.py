"""Where two models part: every site's output in both, in the order of the network."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from care_compress.evaluate.site_outputs import Taken, run_module, tap_file
from care_compress.tasks.distance import Distance, sqnr_db

NEAR_DB = 80.0  # above it only the order of float sums differs


@dataclass(frozen=True)
class Parting:
    """The site where two models part."""

    site: str
    sqnr_db: float
    before_db: float  # the lowest of the sites before it

    def __str__(self) -> str:
        return f"{self.site} ({self.sqnr_db:.1f} dB, before it {self.before_db:.1f})"


def sharpest_fall(distances_db: Mapping[str, float]) -> Parting | None:
    """Find the first site whose output differs: where the distance falls furthest.

    What comes after inherits it. None where every site is near.
    """
    before, furthest, found = math.inf, 0.0, None
    for site, distance in distances_db.items():
        reference = min(before, NEAR_DB)
        if reference - distance > furthest:
            furthest, found = reference - distance, Parting(site, distance, reference)
        before = min(before, distance)
    return found


@torch.no_grad()
def first_divergence(model: nn.Module, artifact: Path, sites: Iterable[str], image: Tensor) -> str:
    """Say where a file parts from the model it was made from."""
    expected = run_module(model, image).sites
    names = [name for name in sites if name in expected]
    found = tap_file(artifact, names)(image)
    distances = {
        name: sqnr_db(expected[name], found[name].reshape(expected[name].shape))
        for name in names
        if name in found
    }
    return str(sharpest_fall(distances) or "no layer that both name")


@dataclass(frozen=True)
class Version:
    """One form of the model."""

    name: str
    run: Callable[[Tensor], Taken]  # one image
    before: str | None  # the version it was made from; none for the first
    sites: tuple[str, ...] = ()  # that mean the same in both, in the order of the network
    targets: tuple[str, ...] = ()  # which it belongs to; none: all of them
    note: str = ""  # why it shows no sites, or not all of them


@dataclass(frozen=True)
class Absent:
    """A version that cannot be run here."""

    name: str
    why: str  # and how to get it

    def as_json(self) -> dict[str, Any]:
        """Return it as ``fidelity.json`` holds it."""
        return {"rung": self.name, "missing": self.why}


@dataclass
class VersionDistance:
    """One version beside the one before it, summed over images."""

    version: Version
    images: int = 0
    same: int = 0  # answers, as the version before
    same_as_float: int = 0
    logits: Distance = field(default_factory=Distance)
    to_float: Distance = field(default_factory=Distance)
    sites: dict[str, Distance] = field(default_factory=dict)

    def add(self, found: Taken, before: Taken, plain: Taken) -> None:
        """Count one image."""
        self.images += len(found.logits)
        self.logits.add(before.logits, found.logits)
        self.to_float.add(plain.logits, found.logits)
        answers = found.logits.argmax(dim=1)
        self.same += int((before.logits.argmax(dim=1) == answers).sum())
        self.same_as_float += int((plain.logits.argmax(dim=1) == answers).sum())
        for site in self.version.sites:
            expected, value = before.sites.get(site), found.sites.get(site)
            # A product of attention heads may leave a file in another layout, never another size.
            if expected is not None and value is not None and expected.numel() == value.numel():
                distance = self.sites.setdefault(site, Distance())
                distance.add(expected, value.reshape(expected.shape))

    @property
    def parts_at(self) -> Parting | None:
        """The site where the two part; none where all of them are near."""
        return sharpest_fall({site: one.shown_db for site, one in self.sites.items()})

    def as_json(self) -> dict[str, Any]:
        """Return it as ``fidelity.json`` holds it; 200 dB stand for no difference at all."""
        first, parting = self.version.before is None, self.parts_at
        return {
            "rung": self.version.name,
            "before": self.version.before,
            "targets": list(self.version.targets),
            "sqnr_db": None if first else self.logits.shown_db,
            "to_float_db": None if first else self.to_float.shown_db,
            "same_percent": 100 * self.same / self.images,
            "same_as_float_percent": 100 * self.same_as_float / self.images,
            "parts_at": None if parting is None else asdict(parting),
            "sites": {site: one.shown_db for site, one in self.sites.items()},
            "note": self.version.note,
        }


@torch.inference_mode()
def compare_versions(
    versions: Sequence[Version], images: Iterable[Tensor], notify: Callable[[str], None]
) -> list[VersionDistance]:
    """Run every version on every image, one at a time: all outputs of all are held.

    Each is compared with the one it was made from: logits, answers, and the output of every site
    that means the same in both. A step's own loss stands between two versions; what all of them
    lost together stands beside the float model.
    """
    steps = [VersionDistance(version) for version in versions]
    for number, image in enumerate(images, 1):
        notify(f"comparing on image {number}")
        taken: dict[str, Taken] = {}
        for step in steps:
            version = step.version
            found = taken[version.name] = version.run(image)
            step.add(found, taken[version.before or version.name], taken[versions[0].name])
    return steps
