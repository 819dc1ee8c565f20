"""What decides that the slim stage is made again, its images, and what healing learns from."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from quantized import care, images
from torch import Tensor, nn

from care_compress import machine
from care_compress.model.care import Care
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.recipe.slim import HealSection
from care_compress.run.finished import SLIM_HEALED
from care_compress.slim import stage
from care_compress.slim.heal import Follower, FollowWhole
from care_compress.tasks.known import task_called

TASK = task_called("classification")


def recipe(**values: object) -> Recipe:
    return load_recipe("fp32", [], {"slim": {"budget": {"macs": 0.7}}, **values})


def samples(content: str) -> Any:
    return SimpleNamespace(content_digest=lambda: content)


def context(folder: Path) -> Any:
    world = SimpleNamespace(is_main=True, device=torch.device("cpu"), wait=lambda: None)
    return SimpleNamespace(world=world, run=SimpleNamespace(path=folder), bad=None)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What each stage says that it is made from; no stage is made."""
    found: dict[str, dict[str, Any]] = {}

    def once(context: Any, name: str, made_from: dict[str, Any], *more: Any, **how: Any) -> None:
        found[name] = made_from

    monkeypatch.setattr(stage, "once", once)
    monkeypatch.setattr(stage, "check_classes", lambda *given: None)
    monkeypatch.setattr(stage, "load_checkpoint", lambda path: None)
    return found


def slim(folder: Path, asked: Recipe, model: Care) -> None:
    assert asked.slim is not None
    given: Any = None
    stage.slimmed(context(folder), asked, asked.slim, model, given, given)


def test_a_cut_is_made_again_for_other_images_another_network_or_another_clock(
    noted: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = care(4)

    def made_from(content: str = "a", whole: Care = model, **budget: float) -> dict[str, Any]:
        monkeypatch.setattr(stage, "labelled", lambda recipe, split: samples(content))
        slim(tmp_path, recipe(**({"slim.budget": budget} if budget else {})), whole)
        return noted["slim"]

    usual = made_from()
    assert usual == made_from()
    assert made_from("b") != usual and made_from(whole=care(4, seed=1)) != usual
    timed = made_from(latency=0.8)
    other: Any = SimpleNamespace(cpu=SimpleNamespace(kind="another"))
    monkeypatch.setattr(machine, "read_machine", lambda: other)
    assert made_from(latency=0.8) != timed
    assert made_from() == usual, "counted costs are the same everywhere"


def test_a_healing_is_done_again_for_other_images_another_start_or_another_course(
    noted: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    given: Any = None

    def made_from(
        content: str = "a", start: int = 0, teacher: int = 0, **course: object
    ) -> dict[str, Any]:
        networks = care(4, seed=teacher), samples(content), given, care(4, seed=start)
        section = HealSection.model_validate(course)
        stage.followed(context(tmp_path), recipe(), *networks, section, SLIM_HEALED)
        return noted["slim model"]

    usual = made_from()
    assert usual == made_from()
    for change in ({"content": "b"}, {"start": 1}, {"teacher": 1}, {"learning_rate": 1e-5}):
        assert made_from(**change) != usual, change


def test_weights_that_an_earlier_recipe_healed_do_not_pass_for_this_ones(
    noted: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever reads a run takes the healed weights where they are there."""
    monkeypatch.setattr(stage, "labelled", lambda recipe, split: samples("a"))
    healed = tmp_path / SLIM_HEALED
    healed.parent.mkdir(parents=True)
    healed.touch()
    slim(tmp_path, recipe(), care(4))
    assert not healed.exists()


@pytest.mark.parametrize(
    ("side", "asked", "held"),
    [(112, 1024, 1024), (224, 1024, 1024), (448, 1024, 256), (448, 80, 64)],
)
def test_images_to_refit_on_take_the_same_memory_at_any_size(
    side: int, asked: int, held: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twice the side are four times the pixels; too few would not determine a layer."""
    chosen: list[int] = []

    def prepared(*given: Any, indices: list[int], **more: Any) -> Iterator[Any]:
        chosen.extend(indices)
        yield SimpleNamespace(images=None)

    monkeypatch.setattr(stage, "prepared_batches", prepared)
    made = recipe(**{"data.resolution": side, "slim.images": asked})
    assert made.slim is not None
    stage.refit_images(context(tmp_path), made, made.slim, cast(Any, range(5000)))
    assert len(chosen) == held


class Student(nn.Module):
    """Gives out what it is told to."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.answer, []


def test_the_whole_network_teaches_as_it_is_deployed() -> None:
    """By the statistics it was trained with, which the images of a batch do not change."""
    whole, x = care(4), images(4)
    with torch.no_grad():
        taught = whole(x)
    section = HealSection(features=0.0)
    objective = FollowWhole(TASK, whole, section, torch.device("cpu"))
    answer = taught.roll(1, dims=1)
    expected = float(TASK.following(answer, taught, section.temperature))
    assert expected != pytest.approx(float(TASK.following(taught, answer, 2.0)), rel=1e-3)
    for _ in range(2):
        outcome = objective(Student(answer), x, torch.zeros(4, 4), 0.5)
        assert float(outcome.loss) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(outcome.logits, answer)


def test_both_heads_learn() -> None:
    """What is deployed is their mean, so that is what is compared with the teacher's."""
    model, x = care(4), images(4)
    answer, features = Follower(model).train()(x)
    assert len(features) == 4
    model.eval()
    (answer - answer.detach() + 1).square().sum().backward()
    for head in (model.head, model.dist_head):
        assert head.fc.weight.grad is not None and head.fc.weight.grad.any()
    with torch.no_grad():
        torch.testing.assert_close(Follower(model).eval()(x), model(x))
