"""Whether a file is its model, decided by hand."""

import math

import pytest
import torch
from torch import Tensor

from care_compress.evaluate.agreement import Agreement, compare_logits, held_to

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
    """At 25 dB demanded, an exact implementation has 31: four of its deviations are a tie.

    The power of these logits is about 1/4: a deviation of 0.5 / 10^(31/20) = 0.014.
    """
    near = held_to(25.0, *flipped(answers(), 10, 0.03))
    assert (near.same, near.ties) == (990, 10) and near.holds
    assert near.percent == pytest.approx(99.0), "what is printed is what was the same"
    far = held_to(25.0, *flipped(answers(), 10, 0.08))
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


def test_of_few_images_one_may_answer_otherwise() -> None:
    """Seen: 63 of 64 images bit for bit or nearly, one over the edge, 43 dB where 31 are due."""
    assert Agreement(64, 63, 0, 43.4, 30.6).holds
    assert Agreement(64, 62, 1, 43.4, 30.6).holds, "a tie is none of them"
    assert not Agreement(64, 62, 0, 43.4, 30.6).holds
    assert not Agreement(64, 63, 0, 30.5, 30.6).holds
    assert Agreement(16, 15, 0, 43.4, 30.6).holds
    assert not Agreement(15, 14, 0, 43.4, 30.6).holds
    assert not Agreement(1, 0, 0, 43.4, 30.6).holds


def test_the_same_logits_are_exact() -> None:
    found = held_to(25.0, answers(), answers())
    assert found.exact and found.holds and found.sqnr_db == math.inf and str(found) == "exact"


def test_a_file_is_held_to_what_exact_implementations_differ_by() -> None:
    """To twice that noise, and to 50 dB where they hardly differ: a float model, in float16 too."""
    model = answers()
    noise = torch.randn(model.shape, generator=torch.Generator().manual_seed(0))

    def near(distance_db: float, exact_db: float) -> Agreement:
        power = 10 ** (-distance_db / 20) * float(model.square().mean().sqrt())
        return compare_logits(model, model + noise * power, exact_db)

    assert near(38.0, 43.0).holds and not near(36.0, 43.0).holds
    assert near(28.5, 34.0).holds and not near(27.0, 34.0).holds
    assert near(51.0, 120.0).holds and not near(49.0, 120.0).holds
    assert near(51.0, math.inf).holds and not near(25.0, math.inf).holds
