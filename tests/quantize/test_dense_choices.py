"""Sites and bits of networks for masks and boxes, chosen by what their own metric loses."""

import json
from pathlib import Path

import pytest
import torch
from every_task import SIDE, network_for, painted, photos
from rich.console import Console

from care_compress.data.loader import BadImages, prepared_batches
from care_compress.errors import RecipeError
from care_compress.model.care import build_model
from care_compress.model.checkpoint import save_checkpoint
from care_compress.model.rewrite import rewrite
from care_compress.pipeline import run_sensitivity
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import PtqJob
from care_compress.quantize.search import search_bits
from care_compress.quantize.sensitivity import (
    MODEL_FILE,
    Answered,
    SiteJob,
    effect,
    load_job,
    save_job,
)
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.tasks.known import TASKS, task_called

DENSE = {"segmentation": "miou", "detection": "map50"}


def section(**settings: object) -> QuantizeSection:
    rules = [{"weight": 8, "input": 8}, {"role": "residual_add", "input": "float"}]
    said = {"target": None, "rules": rules, **settings}
    return QuantizeSection.model_validate_json(json.dumps(said))


@pytest.mark.parametrize("task", DENSE)
def test_sites_are_measured_in_the_metric_of_the_task_and_travel(task: str, tmp_path: Path) -> None:
    painted(tmp_path / "images", task)
    data = DataSection(source=str(tmp_path / "images"), resolution=SIDE)
    classes = TASKS[task].samples(data, "train").classes
    torch.manual_seed(0)
    model = build_model("care_nano", len(classes), kind=TASKS[task].kind)
    save_checkpoint(model.eval(), tmp_path / "model.safetensors", {})
    asked = {
        "model.checkpoint": str(tmp_path / "model.safetensors"),
        "data.source": str(tmp_path / "images"),
        "data.resolution": SIDE,
        "data.workers": 0,
        "quantize.calibrate.images": 4,
    }
    made: list[SiteJob] = []

    def few(job: SiteJob, sites: object) -> object:
        """Every site with the effects of the first: a hundred of them would take a minute."""
        made.append(job)
        digest = save_job(job, tmp_path)
        first = job.effects("stem.0")
        assert load_job(tmp_path, digest).effects("stem.0") == first, "the same bits elsewhere"
        assert isinstance(sites, list)
        yield from ((site, first) for site in sites)

    recipe = load_recipe(f"{TASKS[task].recipes}int8_ptq", [], asked)
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    found = run_sensitivity(recipe, tmp_path, "s", 4, console, few)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    assert written["images"] == 4 and len(written["sites"]) == len(found)
    for one in written["sites"].values():
        assert list(one["alone"]) == ["sqnr_db", "kl", DENSE[task]]
    assert TASKS[task].metric.name in console.export_text()
    (job,) = made
    assert all(batch.annotations for batch in job.batches)
    assert (tmp_path / MODEL_FILE).is_file()


@pytest.mark.parametrize("task", DENSE)
def test_an_effect_is_by_how_much_one_score_is_below_the_other(task: str, tmp_path: Path) -> None:
    painted(tmp_path, task)
    own = task_called(task)
    data = DataSection(source=str(tmp_path), resolution=SIDE, workers=0)
    samples = own.samples(data, "val")
    batches = list(prepared_batches(samples, data, 4, bad=BadImages(), indices=range(6)))
    torch.manual_seed(0)
    models = [
        build_model("care_nano", len(samples.classes), kind=own.kind).eval() for _ in range(2)
    ]
    with torch.no_grad():
        said = [
            Answered.of(own, torch.cat([one(batch.images) for batch in batches]), batches)
            for one in models
        ]
    found = effect(own, said[1], said[0])
    key = own.metric.key
    assert found.drop == said[0].score.metrics()[key] - said[1].score.metrics()[key]
    assert found.kl > 0 and said[0].score.images == 6
    assert effect(own, said[0], said[0]).drop == 0


@pytest.mark.parametrize(
    "task", ["segmentation", pytest.param("detection", marks=pytest.mark.slow)]
)
def test_bits_are_searched_for_any_task(task: str) -> None:
    network = rewrite(network_for(task))
    x = photos(8)

    def batches() -> object:
        yield x

    job = PtqJob(network, SIDE, 0, batches)  # type: ignore[arg-type]
    chosen = section(search={"trials": 2, "minutes": 5, "images": 8})
    drops = iter((5.0, 0.1, 5.0))
    found = search_bits(job, chosen, 0.5, lambda model: next(drops), lambda trial: None)
    searched = {rule.site for rule in found.section.rules if rule.site}
    assert any(site.startswith("heads.") for site in searched), "the head, too"
    assert found.trials[0].cost < found.cost and isinstance(found.quantized.model, QuantizedCare)
    with pytest.raises(RecipeError, match=f"max_{DENSE[task]}_drop"):
        search_bits(job, chosen, 0.5, lambda model: 3.0, lambda trial: None)
