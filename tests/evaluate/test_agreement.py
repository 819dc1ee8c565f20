"""Whether a file is its model, decided by hand."""

import math

import pytest
import torch
from torch import Tensor

from care_compress.evaluate.agreement import Agreement, held_to

K = 4


def answers(count: int = 1000) -> Tensor:
    """Logits of 1 for one class in turn, and 0 for the others."""
    return torch.eye(K).repeat(count // K, 1)


def flipped(reference_NK: Tensor, images: int, margin: float) -> tuple[Tensor, Tensor]:
    """The first `images` answers change between two classes that lie `margin` apart."""
    model, file = reference_NK.clone(), reference_NK.clone()
    for row in range(images):
        first = int(model[row].argmax())
        second = (first + 1) % K
        model[row, second] = model[row, first] - margin
        file[row, second] = file[row, first] + 1e-6
    return model, file


def test_ties_excuse_a_flip_and_nothing_else_does() -> None:
    """At 25 dB demanded, classes nearer than 4 deviations of a 35 dB file are as good as equal.

    The power of these logits is about 1/4: a deviation of 0.5 / 10^(35/20) = 0.0089.
    """
    near = held_to(25.0, *flipped(answers(), 10, 0.02))
    assert (near.same, near.ties) == (990, 10) and near.holds
    assert near.percent == pytest.approx(99.0), "what is printed is what was the same"
    far = held_to(25.0, *flipped(answers(), 10, 0.05))
    assert (far.same, far.ties) == (990, 0)
    assert far.sqnr_db > 25 and not far.holds, "1 % of other answers, however near the logits"


def test_distance_decides_even_where_every_answer_is_the_same() -> None:
    model = answers()
    noise = torch.randn(model.shape, generator=torch.Generator().manual_seed(0))
    power = 10 ** (-20 / 20) * float(model.square().mean().sqrt())
    found = held_to(25.0, model, model + noise * power)
    assert found.sqnr_db == pytest.approx(20, abs=0.5) and found.percent > 99.5
    assert not found.holds and held_to(18.0, model, model + noise * power).holds


def test_half_a_percent_of_other_answers_is_the_limit() -> None:
    assert Agreement(1000, 995, 0, 60.0, 25.0).holds
    assert Agreement(1000, 990, 5, 60.0, 25.0).holds
    assert not Agreement(1000, 994, 0, 60.0, 25.0).holds
    assert not Agreement(1000, 1000, 0, 24.9, 25.0).holds


def test_the_same_logits_are_exact() -> None:
    found = held_to(25.0, answers(), answers())
    assert found.exact and found.holds and found.sqnr_db == math.inf and str(found) == "exact"
