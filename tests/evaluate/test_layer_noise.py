"""Noise of layers and histograms of what enters them, on quantizers worked out by hand."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from care_compress.evaluate import layer_noise
from care_compress.evaluate.layer_noise import BATCH, BINS, HARDEST, measure_layers
from care_compress.evaluate.site_outputs import Taken


@dataclass(eq=False)
class Rounds:
    """A quantizer of values from -1 to 1; its site answers with what leaves it."""

    site: str
    step: float
    operand: str = "input"
    spec: str = "A"

    def bounds(self, dims: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(self.step / 2)

    def cut(self, x: Tensor) -> int:
        return int((x.abs() > 1 + self.step / 2).sum())

    def __call__(self, x: Tensor) -> Tensor:
        return (x / self.step).round().mul(self.step).clamp(-1, 1)


@dataclass
class Network:
    """Quantizers one beside the other, each of them seeing the images."""

    quantizers: list[Rounds]
    on: bool = True
    plan: Any = field(init=False)

    def __post_init__(self) -> None:
        sites = dict.fromkeys(one.site for one in self.quantizers)
        decisions = [SimpleNamespace(site=SimpleNamespace(name=site)) for site in sites]
        self.plan = SimpleNamespace(decisions=decisions)

    def enable(self, on: bool) -> None:
        self.on = on


def run(model: Network, images: Tensor, seen: Any = None) -> Taken:
    sites: dict[str, Tensor] = {}
    for quantizer in model.quantizers:
        after = quantizer(images) if model.on else images
        sites.setdefault(quantizer.site, after)
        if seen is not None:
            seen(quantizer, images, after)
    return Taken(images, sites)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_noise, "run_graph", run)


def measured(quantizers: list[Rounds], *batches: Tensor) -> dict[str, Any]:
    model: Any = Network(quantizers)
    return measure_layers(model, batches)


def test_noise_is_of_all_images_against_the_network_without_rounding() -> None:
    # What is lost of 0.4 and 0.9 with a step of 0.5 is 0.1 each.
    images = [torch.full((BATCH + 1, 4), 0.4), torch.full((1, 4), 0.9)]
    found = measured([Rounds("a", 0.5)], *images)
    signal, noise = (BATCH + 1) * 0.4**2 + 0.9**2, (BATCH + 2) * 0.1**2
    (site,) = found["sites"]
    assert found["images"] == BATCH + 2
    assert site["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
    assert site["input_db"] == pytest.approx(site["sqnr_db"]), "it answers with its input"


def test_a_histogram_counts_values_of_all_images_and_what_was_cut_off() -> None:
    # 1.25 is half a step outside, which is no cut.
    images = torch.tensor([[-3.0, -1.0, 0.0, 0.1], [1.25, 1.5, 2.0, 0.5]]).repeat(BATCH, 1)
    (found,) = measured([Rounds("a", 0.5)], images)["histograms"]
    assert (found["values"], found["clipped"]) == (8 * BATCH, 3 * BATCH)
    assert (found["observed"], found["range"], found["steps"]) == ([-3, 2], [-1, 1], [0.5, 0.5])
    assert found["bins"] == [-3, 2], "over all that was seen"
    assert len(found["before"]) == BINS and sum(found["before"]) == sum(found["after"]) == 8 * BATCH
    assert found["before"][0] == BATCH and found["after"][0] == 0, "-3 became -1"
    (small,) = measured([Rounds("a", 0.5)], 0.1 * images)["histograms"]
    assert small["bins"] == [-1, 1], "over all that the integers stand for"


def test_histograms_are_of_the_inputs_that_lose_most() -> None:
    steps = {f"s{number}": 0.5 / 2**number for number in range(HARDEST + 2)}
    images = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    order = [*reversed(steps.items())]
    found = measured([Rounds(site, step) for site, step in order], images)
    assert [one["site"] for one in found["histograms"]] == [f"s{n}" for n in range(HARDEST)]
    # Each bit more is 6 dB.
    told = {one["site"]: one["input_db"] for one in found["sites"]}
    assert all(3 < told[f"s{n + 1}"] - told[f"s{n}"] < 9 for n in range(HARDEST + 1))


def test_of_a_product_the_input_that_is_rounded_first_is_shown() -> None:
    images = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    alone = measured([Rounds("product", 0.1)], images)["histograms"]
    both = measured([Rounds("product", 0.1), Rounds("product", 1.0, "other")], images)["histograms"]
    assert both == alone
