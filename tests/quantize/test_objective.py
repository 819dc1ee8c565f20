"""What QAT minimises, by hand: distillation, labels, the pull to the grid, what decays."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.qat import (
    FollowFloat,
    dampening,
    grouped,
    qat_fingerprint,
)
from care_compress.quantize.spec import TensorSpec
from care_compress.recipe.quantize import QatSection
from care_compress.tasks.classification import Classification

TAUGHT = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
LEARNED = torch.tensor([[1.0, 0.5, -2.0], [0.0, 2.0, 1.0]])
LABELS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


class Teacher(nn.Module):
    """Says `TAUGHT` to anything."""

    def stage_outputs(self, images: Tensor) -> list[Tensor]:
        return [torch.full((2, 4, 1, 1), 2.0)]

    def answer(self, features: list[Tensor]) -> Tensor:
        return TAUGHT


class Student(nn.Module):
    """Says `LEARNED` to anything; its stage outputs are half of the teacher's."""

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return LEARNED, [torch.full((2, 4, 1, 1), 1.0)]


def loss(**settings: float) -> float:
    plan = QatSection.model_validate({"labels": 0.0, "features": 0.0, **settings})
    objective = FollowFloat(Classification(), cast(Any, Teacher()), plan)
    return float(objective(Student(), torch.zeros(2, 3, 4, 4), LABELS, 0.5).loss)


def divergence(temperature: float) -> float:
    """Mean of KL(teacher || student), sum by sum."""
    total = 0.0
    for taught, learned in zip(TAUGHT.tolist(), LEARNED.tolist(), strict=True):
        p = [math.exp(value / temperature) for value in taught]
        q = [math.exp(value / temperature) for value in learned]
        for one, other in zip(p, q, strict=True):
            share, guess = one / sum(p), other / sum(q)
            total += share * math.log(share / guess)
    return total / len(TAUGHT)


def cross_entropy() -> float:
    hits = [LEARNED[0].softmax(0)[0], LEARNED[1].softmax(0)[2]]
    return -sum(math.log(float(hit)) for hit in hits) / 2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_student_is_held_to_the_teachers_softened_answers(temperature: float) -> None:
    assert loss(temperature=temperature) == pytest.approx(
        temperature**2 * divergence(temperature), rel=1e-5
    )


def test_labels_take_their_share_from_the_teacher() -> None:
    assert loss(labels=1.0) == pytest.approx(cross_entropy(), rel=1e-5)
    assert loss(labels=0.3) == pytest.approx(
        0.7 * 4 * divergence(2.0) + 0.3 * cross_entropy(), rel=1e-5
    )


def test_stage_outputs_count_by_their_relative_error() -> None:
    """Half of the teacher's everywhere is an error of a quarter of its power."""
    assert loss(features=3.0) - loss() == pytest.approx(3 * 0.25, rel=1e-5)


class OnGrid(QuantizedCare):
    """Says what `Student` says, and holds one row of weights of step 0.5."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.training = True
        quantizer = IntQuantizer(TensorSpec(4, "channel"), "site", "weight", 1)
        quantizer.set_qparams(torch.tensor([0.5]), torch.tensor([0]))
        self.own = quantizer
        self.row = nn.Parameter(torch.tensor([[0.6, -0.5, 1.4, 90.0]]))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return Student()(images)

    def integers(self, operand: str | None = None) -> Iterator[IntQuantizer]:
        yield self.own

    def weight(self, site: str) -> nn.Parameter:
        return self.row


def test_the_distance_to_the_grid_is_a_mean_over_weights_in_steps() -> None:
    """0.6 is 0.2 steps from the grid, as 1.4 is; what is cut off is on its end."""
    model = OnGrid()
    pull = dampening(model)
    assert float(pull.detach()) == pytest.approx((0.2**2 + 0.2**2) / 4, rel=1e-4)
    pull.backward()
    assert model.row.grad is not None
    assert (model.row.grad > 0).tolist() == [[True, False, False, False]], "0.6 goes down"
    assert (model.row.grad < 0).tolist() == [[False, False, True, False]], "1.4 goes up"


def test_the_pull_to_the_grid_comes_late_and_whole() -> None:
    model, images = OnGrid(), torch.zeros(2, 3, 4, 4)

    def at(progress: float, weight: float) -> float:
        plan = QatSection(dampening=weight)
        objective = FollowFloat(Classification(), cast(Any, Teacher()), plan)
        return float(objective(model, images, LABELS, progress).loss.detach())

    added = [at(progress, 2.0) - at(progress, 0.0) for progress in (0.0, 0.25, 0.5, 1.0)]
    pull = float(dampening(model).detach())
    early = 2 * pull * (1 - 0.5**0.5) / 2
    assert added == pytest.approx([0.0, early, pull, 2 * pull], rel=1e-2, abs=1e-5)


def test_matrices_decay_and_nothing_else() -> None:
    matrix, kernel = nn.Parameter(torch.ones(8, 4, 1, 1)), nn.Parameter(torch.ones(8, 1, 3, 3))
    bias, scale = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(1))
    plan = QatSection(weight_decay=0.1, scale_rate=7.0, freeze_scales=0.6)
    groups = grouped([matrix, kernel, bias], [scale], plan)
    decay = {id(p): group.weight_decay for group in groups for p in group.parameters}
    assert decay == {id(matrix): 0.1, id(kernel): 0.0, id(bias): 0.0, id(scale): 0.0}
    rate = {id(p): (group.rate, group.until) for group in groups for p in group.parameters}
    assert rate[id(scale)] == (7.0, 0.6)
    assert {rate[id(p)] for p in (matrix, kernel, bias)} == {(1.0, 1.0)}


def test_a_training_is_another_one_where_anything_that_decides_it_differs() -> None:
    def fingerprint(
        seed: int = 0, start: int = 0, teacher: int = 1, content: str = "a", epochs: int = 1
    ) -> str:
        data = SimpleNamespace(model_dump=lambda **_: {"resolution": 32})
        training = SimpleNamespace(
            recipe=SimpleNamespace(data=data, seed=seed),
            samples=SimpleNamespace(content_digest=lambda: content),
        )
        models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        for model, value in zip(models, (start, teacher), strict=True):
            nn.init.constant_(model.weight, value)
        return qat_fingerprint(QatSection(epochs=epochs), cast(Any, training), *models)

    usual = fingerprint()
    assert usual == fingerprint()
    others = [
        fingerprint(seed=1),
        fingerprint(start=2),
        fingerprint(teacher=2),
        fingerprint(content="b"),
        fingerprint(epochs=2),
    ]
    assert len({usual, *others}) == 6
