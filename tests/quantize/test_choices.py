"""What a search, a measurement of sites and the quantize stages decide by, without a network."""

from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from care_compress.data.loader import Batch
from care_compress.quantize import search, stages
from care_compress.quantize.ptq import PtqJob
from care_compress.quantize.search import (
    Step,
    Trial,
    _noises,
    _ordered_steps,
    noises_here,
    search_bits,
)
from care_compress.quantize.selection import digests_of
from care_compress.quantize.sensitivity import SiteJob, measure_sensitivity
from care_compress.quantize.spec import Decision, Plan, Site, TensorSpec
from care_compress.quantize.stages import _calibration, quantized, trained_quantized
from care_compress.recipe.quantize import QuantizeSection, RuleSection, SearchSection
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import RewriteSection
from care_compress.tasks.known import task_called

NOISE = {"a": 1.0, "b": 3.0, "c": 0.5}


class Noisy:
    """Answers with its images, and each site that is quantized adds its noise to the first one."""

    task = "classification"

    def __init__(self) -> None:
        self.sites = [SimpleNamespace(site=site, enabled=True) for site in NOISE]

    def quantizers(self) -> Iterator[Any]:
        return iter(self.sites)

    def enable(self, on: bool) -> None:
        for one in self.sites:
            one.enabled = on

    def __call__(self, images: Tensor) -> Tensor:
        logits = images.clone()
        logits[:, 0] += sum(NOISE[one.site] for one in self.sites if one.enabled)
        return logits


def job(batches: Any = None) -> PtqJob:
    return PtqJob(cast(Any, SimpleNamespace(task="classification")), 32, 0, batches)


SECTION = QuantizeSection(target=None, rules=(RuleSection.model_validate({"weight": 8}),))


def test_a_sites_noise_is_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        search, "quantize_network", lambda job, section: SimpleNamespace(model=Noisy())
    )

    def batches() -> Generator[Tensor]:
        yield torch.randn(40, 4)

    found = _noises(job(batches), SECTION, list(NOISE), "w8a8", noises_here)
    assert found == pytest.approx({site: noise**2 / 4 for site, noise in NOISE.items()}, rel=1e-4)


def test_a_site_is_measured_alone_and_left_out_of_all_others(tmp_path: Path) -> None:
    model, images = Noisy(), [torch.zeros(8, 2) + torch.tensor([0.0, 10.0])]
    labels = torch.ones(8, dtype=torch.int64)
    batches = tuple(Batch(one, labels, labels) for one in images)
    task = task_called("classification")
    sites = SiteJob(task, cast(Any, model), SECTION, RewriteSection(), batches)
    found = measure_sensitivity(sites, tmp_path / "s.json", "k", lambda sites: None)
    assert [one.site for one in found] == ["b", "a", "c"], "hardest first"
    power = {one.site: 100 / 10 ** (one.alone.sqnr_db / 10) for one in found}
    assert power == pytest.approx({"b": 9.0, "a": 1.0, "c": 0.25})
    rest = {one.site: 100 / 10 ** (one.left_out.sqnr_db / 10) for one in found}
    assert rest == pytest.approx({"b": 1.5**2, "a": 3.5**2, "c": 4.0**2})


MACS = {"cheap": 100, "dear": 10_000}


def fake_planned(network: object, section: QuantizeSection, resolution: int) -> tuple[None, Plan]:
    """Two weighted sites, each as its last rule says."""
    decisions = []
    for name, macs in MACS.items():
        input_, weight = TensorSpec(8), TensorSpec(8)
        for rule in section.rules:
            if rule.site == name and rule.input is not None and rule.weight is not None:
                input_, weight = TensorSpec(rule.input.bits), TensorSpec(rule.weight.bits)
        site = Site(name, "pointwise", 0, 0, "inter1", macs, 1, 1, False, True)
        decisions.append(Decision(site, input_, weight, 1, 1))
    return None, Plan(tuple(decisions), (), None, resolution)


def steps_with(noise: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    monkeypatch.setattr(search, "planned", fake_planned)
    monkeypatch.setattr(search, "_noises", lambda *given: noise[given[3]])
    return _ordered_steps(job(), SECTION, SearchSection(), noises_here)


def test_most_cost_saved_for_the_least_noise_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dear site saves a hundred times as much for the same noise; steps go down in order."""
    alike = {
        "w8a8": dict.fromkeys(MACS, 1.0),
        "w4a8": dict.fromkeys(MACS, 2.0),
        "w4a4": dict.fromkeys(MACS, 3.0),
    }
    found = steps_with(alike, monkeypatch)
    assert found == [Step(site, precision) for site in ("dear", "cheap") for precision in alike]


def test_noise_counts_by_what_a_step_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4 bits the dear site is no worse than at 8: that step is free, whatever it had before."""
    noise = {
        "w8a8": {"cheap": 0.001, "dear": 50.0},
        "w4a8": {"cheap": 0.002, "dear": 50.0},
        "w4a4": {"cheap": 0.05, "dear": 5000.0},
    }
    found = [(step.site, step.precision) for step in steps_with(noise, monkeypatch)]
    assert found == [
        ("cheap", "w8a8"), ("cheap", "w4a8"), ("dear", "w8a8"),
        ("dear", "w4a8"), ("cheap", "w4a4"), ("dear", "w4a4"),
    ]  # fmt: skip


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Sixteen steps, each of which costs a tenth of a point and saves one of what is paid."""
    steps = [Step(f"s{number}", "w8a8") for number in range(16)]

    def lowered(section: QuantizeSection) -> set[str]:
        return {str(r.site) for r in section.rules if r.site and r.weight and r.weight.bits == 8}

    monkeypatch.setattr(search, "_ordered_steps", lambda *given: steps)
    monkeypatch.setattr(
        search,
        "quantize_network",
        lambda job, section: SimpleNamespace(model=SimpleNamespace(plan=lowered(section))),
    )
    monkeypatch.setattr(search, "planned", lambda net, section, size: (None, lowered(section)))
    monkeypatch.setattr(search, "_cost", lambda plan, section: 100.0 - len(plan))
    return steps


def hunted(search_: dict[str, object], judge: Any, budget: float) -> tuple[Any, list[Trial]]:
    trials: list[Trial] = []
    chosen = SECTION.model_copy(update={"search": SearchSection.model_validate(search_)})
    return search_bits(job(), chosen, budget, judge, trials.append), trials


def a_tenth_each(model: Any) -> float:
    return len(model.plan) / 10


def test_a_search_goes_as_far_as_the_budget_and_not_a_step_further(ladder: list[Step]) -> None:
    found, trials = hunted({"trials": 6}, a_tenth_each, 0.7)
    assert found.cost == 93.0 and len(trials) <= 6
    assert {trial.steps for trial in trials if trial.within} <= set(range(8))
    assert all(trial.within == (trial.drop <= 0.7) for trial in trials), "the budget may be spent"


def test_a_search_tries_single_further_steps_with_what_is_left(ladder: list[Step]) -> None:
    """The fifth step alone is ruinous; all others are free."""
    found, _ = hunted({"trials": 40}, lambda model: 9.0 if "s4" in model.plan else 0.0, 0.5)
    assert found.quantized.model.plan == {step.site for step in ladder} - {"s4"}


def test_a_cost_that_is_reached_is_enough(ladder: list[Step]) -> None:
    found, trials = hunted({"trials": 40, "max_cost": 90.0}, a_tenth_each, 5.0)
    assert found.cost == 90.0 and len(trials) == 1


def test_a_digest_of_pixels_knows_their_shape_and_colours() -> None:
    def digest(width: int, height: int, colour: tuple[int, int, int]) -> str:
        image = Image.new("RGB", (width, height), colour)
        return digests_of(cast(Any, SimpleNamespace(hashed=lambda i: (image, 0))), 0)[0]

    found = [digest(2, 8, (1, 2, 3)), digest(4, 4, (1, 2, 3)), digest(2, 8, (1, 3, 2))]
    assert len(set(found)) == 3 and found[0] == digest(2, 8, (1, 2, 3))


def calibration(images: int, size: int) -> Any:
    section = SimpleNamespace(calibrate=SimpleNamespace(batch_size=size))
    chosen = SimpleNamespace(indices=range(images))
    return _calibration(cast(Any, None), cast(Any, None), cast(Any, section), cast(Any, chosen))


def test_the_last_smaller_batch_counts() -> None:
    assert [calibration(n, 32).count for n in (1, 32, 33, 64)] == [1, 1, 2, 2]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What each stage says that it is made from; no stage is made."""
    found: dict[str, dict[str, Any]] = {}

    def once(context: Any, stage: str, made_from: dict[str, Any], *more: Any, **how: Any) -> None:
        found[stage] = made_from

    monkeypatch.setattr(stages, "once", once)
    return found


def context(folder: Path) -> Any:
    world = SimpleNamespace(is_main=True, device=torch.device("cpu"), wait=lambda: None)
    return SimpleNamespace(world=world, run=SimpleNamespace(path=folder))


def samples(content: str) -> Any:
    return SimpleNamespace(content_digest=lambda: content)


def linear(value: float) -> Any:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def ptq_made_from(
    noted: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, folder: Path,
    listed: str = "a", training: str = "t", weight: float = 1.0, searches: bool = False,
) -> dict[str, Any]:  # fmt: skip
    chosen = SimpleNamespace(listing=lambda: {"images": [listed]}, samples=samples(training))
    monkeypatch.setattr(stages, "calibration_images", lambda *given: chosen)
    more = ["quantize.search={trials: 1}"] if searches else []
    recipe = load_recipe("int8_ptq", more)
    assert recipe.quantize is not None
    quantized(
        context(folder), recipe, recipe.quantize, linear(weight), cast(Any, None),
    )  # fmt: skip
    return noted["ptq"]


def test_ptq_is_made_again_for_other_images_or_another_network(
    noted: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def made_from(**given: Any) -> dict[str, Any]:
        return ptq_made_from(noted, monkeypatch, tmp_path, **given)

    usual = made_from()
    assert usual == made_from()
    assert usual != made_from(listed="b")
    assert usual != made_from(weight=2.0)
    assert usual == made_from(training="u"), "only a search looks at images beside the list"
    assert made_from(searches=True) != made_from(searches=True, training="u")


def test_qat_is_made_again_for_other_images_or_another_start(
    noted: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = load_recipe("int8_qat")
    section = recipe.quantize
    assert section is not None and section.qat is not None

    def made_from(
        content: str = "a", start: bytes = b"s", weight: float = 1.0, teacher: float = 1.0
    ) -> dict[str, Any]:
        monkeypatch.setattr(stages, "labelled", lambda recipe, split: samples(content))
        path = tmp_path / "model.safetensors"
        path.write_bytes(start)
        trained_quantized(
            context(tmp_path), recipe, section, section.qat, linear(weight), linear(teacher), path,
            cast(Any, None),
        )  # fmt: skip
        return noted["qat"]

    usual = made_from()
    assert usual == made_from()
    for given in ({"content": "b"}, {"start": b"t"}, {"weight": 2.0}, {"teacher": 2.0}):
        assert made_from(**given) != usual, given


def test_calibration_images_are_chosen_again_where_there_are_others(
    noted: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = load_recipe("int8_ptq")
    assert recipe.quantize is not None
    listed = tmp_path / "list.json"
    monkeypatch.setattr(stages, "read_list", lambda path, samples: None)

    def made_from(content: str = "a", text: str | None = None) -> dict[str, Any]:
        monkeypatch.setattr(stages, "labelled", lambda recipe, split: samples(content))
        section = recipe.quantize
        assert section is not None
        if text is not None:
            listed.write_text(text)
            calibrate = section.calibrate.model_copy(update={"list": str(listed)})
            section = section.model_copy(update={"calibrate": calibrate})
        stages.calibration_images(context(tmp_path), recipe, section, linear(1.0))
        return noted["calibration"]

    assert made_from() == made_from() != made_from("b")
    assert made_from(text="{}") != made_from(text="[]"), "the file is what counts, not its name"
