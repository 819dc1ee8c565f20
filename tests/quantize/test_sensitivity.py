import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from quantized import KEPT, SIZE, W4A4, batches, images, network, quantized, section
from rich.console import Console
from torch import Tensor

from care_compress.data.loader import Batch
from care_compress.errors import RecipeError, RunError
from care_compress.pipeline import run_sensitivity
from care_compress.quantize import search as mixed
from care_compress.quantize import sensitivity as measured
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.plots import pareto, short_name
from care_compress.quantize.ptq import PtqJob, planned
from care_compress.quantize.search import LADDER, Trial, search_bits
from care_compress.quantize.sensitivity import (
    Answered,
    SiteJob,
    effect,
    load_job,
    logits_of,
    measure_sensitivity,
    only,
    quantized_sites,
    save_job,
)
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.recipe import load_recipe
from care_compress.tasks.distance import EXACT_DB
from care_compress.tasks.known import task_called

TASK = task_called("classification")


def job(model: QuantizedCare, x: Sequence[Tensor], labels: Tensor) -> SiteJob:
    """What sites are measured on, by this process."""
    return SiteJob(TASK, model, section(), KEPT, tuple(batched(x, labels)))


def batched(x: Sequence[Tensor], labels: Tensor) -> list[Batch]:
    """Images in memory as batches."""
    parts = labels.split([len(one) for one in x])
    return [Batch(one, part, part) for one, part in zip(x, parts, strict=True)]


def silent(sites: int) -> None:
    """No progress."""


def test_the_site_with_the_fewest_bits_is_the_hardest(tmp_path: Path) -> None:
    hard = "heads.fc"
    rule = {"site": hard, "weight": 4, "input": 4}
    model = quantized(section(rule, bias_correction=False)).model
    x = torch.split(images(16, seed=4), 8)
    labels = torch.zeros(16, dtype=torch.int64)
    found = measure_sensitivity(job(model, x, labels), tmp_path / "s.json", "key", silent)
    assert found[0].site == hard
    assert {one.site for one in found} == set(quantized_sites(model))
    (it,) = (one for one in found if one.site == hard)
    assert it.alone.sqnr_db < found[-1].alone.sqnr_db - 10
    assert it.left_out.sqnr_db > found[-1].left_out.sqnr_db + 1, "without it the rest is better"
    model.enable(True)
    assert all(quantizer.enabled for quantizer in model.quantizers()), "left as it was found"


def test_it_goes_on_where_it_stopped_and_only_for_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = job(quantized(section()).model, [images(4)], torch.zeros(4, dtype=torch.int64))
    cache = tmp_path / "s.json"

    measured_sites = itertools.count(1)

    def stop_early(sites: int) -> None:
        if sites == 1 and next(measured_sites) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(few, cache, "a", stop_early)
    assert len(json.loads(cache.read_text())["sites"]) == 5
    calls = []
    monkeypatch.setattr(
        measured, "only", lambda model, sites: (calls.append(sites), only(model, sites))
    )
    whole = measure_sensitivity(few, cache, "a", silent)
    assert len(calls) == 2 * (len(whole) - 5)
    measure_sensitivity(few, cache, "a", silent)
    assert len(calls) == 2 * (len(whole) - 5), "a third time measures nothing"
    measure_sensitivity(few, cache, "b", silent)
    assert len(calls) == 2 * (2 * len(whole) - 5), "other content, other measurement"


def test_a_job_that_travels_measures_the_same_bits(tmp_path: Path) -> None:
    plain = section(bias_correction=False)
    held = tuple(batched([images(8)], torch.zeros(8).long()))
    here = SiteJob(TASK, quantized(plain).model, plain, KEPT, held)
    digest = save_job(here, tmp_path)
    there = load_job(tmp_path, digest)
    for site in quantized_sites(here.model)[::7]:
        assert here.effects(site) == there.effects(site)
    (tmp_path / "images.pt").write_bytes(b"others")
    with pytest.raises(RunError, match="does not see"):
        load_job(tmp_path, digest)


def test_no_difference_is_no_effect() -> None:
    logits = torch.randn(8, 5)
    batches = batched([torch.zeros(8, 3, 1, 1)], torch.zeros(8, dtype=torch.int64))
    same = effect(TASK, *[Answered.of(TASK, logits, batches)] * 2)
    assert (same.sqnr_db, same.drop) == (EXACT_DB, 0.0) and abs(same.kl) < 1e-12


def test_the_command_leaves_a_table_a_plot_and_a_file(tmp_path: Path) -> None:
    few = ["quantize.calibrate.images=32"]
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    found = run_sensitivity(load_recipe("int8_ptq", few), tmp_path, "s", 16, console)
    shown = console.export_text()
    assert short_name(found[0].site) in shown
    assert (tmp_path / "s" / "sensitivity.svg").read_text().startswith("<?xml")
    assert len(json.loads((tmp_path / "s" / "sensitivity.json").read_text())["sites"]) == len(found)


def test_the_search_ends_with_the_cheapest_network_within_the_budget() -> None:
    x = images(24, seed=6)
    wanted = network()(x)

    def judge(model: QuantizedCare) -> float:
        """Stands for a drop: logit noise in percent of the signal."""
        noise = (logits_of(model, [x]) - wanted).square().sum() / wanted.square().sum()
        return 100 * float(noise)

    search = {"trials": 6, "minutes": 5, "images": 8}
    chosen = section(search=search)
    trials: list[Trial] = []
    found = search_bits(PtqJob(network(), SIZE, 0, batches), chosen, 2.0, judge, trials.append)
    assert 2 <= len(found.trials) <= 6 and trials == found.trials
    within = [trial for trial in found.trials if trial.within]
    assert within and not all(trial.within for trial in found.trials)
    assert judge(found.quantized.model) == min(within, key=lambda t: t.cost).drop <= 2.0
    widths = {d.precision for d in found.quantized.model.plan.decisions if d.site.weighted}
    assert widths <= set(LADDER) and len(widths) > 1, "mixed"
    again = quantized(found.section).model
    assert torch.equal(again(x), found.quantized.model(x)), "the rules it found are a recipe"


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step as noisy as every other: for tests of what a search does with them."""
    monkeypatch.setattr(mixed, "_noises", lambda *given: dict.fromkeys(given[2], 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("reachable", [True, False])
def test_a_cost_to_reach_is_enough_where_the_drop_allows_it(reachable: bool, noises: None) -> None:
    def cost(chosen: QuantizeSection) -> float:
        plan = planned(network(), chosen, SIZE)[1]
        return float(sum(decision.bit_operations for decision in plan.decisions))

    limit = 1.1 * cost(section())  # that of 8 bits everywhere
    found = search_bits(
        PtqJob(network(), SIZE, 0, batches),
        section(search={"trials": 4, "minutes": 5, "max_cost": limit}),
        50.0,
        lambda model: 0.0 if reachable or not quantized_sites(model) else 100.0,
        lambda trial: None,
    )
    assert (found.cost <= limit) == reachable
    assert found.cost == pytest.approx(cost(found.section))
    if reachable:
        assert len(found.trials) == 1 and found.cost > 0.8 * limit, "no further than asked for"


@pytest.mark.slow
def test_a_budget_that_nothing_holds_ends_in_float_not_in_an_error(noises: None) -> None:
    found = search_bits(
        PtqJob(network(), SIZE, 0, batches),
        section(search={"trials": 2, "minutes": 5, "images": 8}),
        0.0,
        lambda model: 1.0 if quantized_sites(model) else 0.0,
        lambda trial: None,
    )
    assert not quantized_sites(found.quantized.model)


@pytest.mark.slow
def test_a_search_that_cannot_hold_the_budget_says_why(noises: None) -> None:
    loud = {"role": "residual_add", "input": 8}
    chosen = section(loud, search={"trials": 1, "minutes": 5, "images": 8})
    with pytest.raises(RecipeError, match="already loses 3.00 points"):
        search_bits(
            PtqJob(network(), SIZE, 0, batches), chosen, 0.5, lambda m: 3.0, lambda trial: None
        )


@pytest.mark.parametrize("name", ["fp32", "int8_ptq_nncf"])
def test_a_recipe_without_sites_of_ours_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no plan of ours"):
        run_sensitivity(load_recipe(name), tmp_path, "s", 16, Console(quiet=True))


def test_the_front_has_no_trial_that_another_beats() -> None:
    trials = [Trial(1, 5.0, 0.1, True), Trial(2, 3.0, 0.4, True), Trial(3, 4.0, 0.5, False)]
    assert pareto(trials) == [trials[1], trials[0]]
    assert quantized(section(W4A4)).model.plan.macs > 0
