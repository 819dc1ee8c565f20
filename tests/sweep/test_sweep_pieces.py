"""How images are shared out: pieces that are whole batches, and scores in the images' own order."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from care_compress.evaluate.scoring import Scored, ScoringJob
from care_compress.recipe.sections import DataSection
from care_compress.sweep import scores
from care_compress.sweep.scores import GROWTH, SECONDS, scores_on

BATCH = 4


def shared_out(
    images: int, took: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[Scored]]:
    """Pieces as workers take them, two at a time, and scores as they come back: the later first."""
    given: list[list[int]] = []

    def in_pieces(cluster: Any, task: Any, job: Any, parts: Iterator[Any], *rest: Any) -> Any:
        while taken := [part for _, part in zip(range(2), parts, strict=False)]:
            given.extend(list(part) for _, part in taken)
            for first, part in reversed(taken):
                yield (first, part), (Scored(len(part), None, {str(first): ""}), took)

    monkeypatch.setattr(scores, "in_pieces", in_pieces)
    job = ScoringJob("file", "digest", DataSection(source="builtin:shapes"), "l", BATCH, "cpu")
    nothing: Any = None
    indices: Sequence[int] = [10 * number for number in range(images)]
    return given, list(scores_on(nothing)(job, indices))


@pytest.mark.parametrize("took", [1e-6, 0.5, SECONDS, 60.0])
@pytest.mark.parametrize("images", [1, BATCH, 203])
def test_every_image_is_in_one_piece_and_its_score_in_its_place(
    images: int, took: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, found = shared_out(images, took, monkeypatch)
    assert [one for piece in pieces for one in piece] == [10 * n for n in range(images)]
    assert all(len(piece) % BATCH == 0 for piece in pieces[:-1]), "as one process has them"
    starts = [int(next(iter(one.skipped))) for one in found]
    assert starts == sorted(starts) and sum(one.images for one in found) == images


def test_pieces_grow_until_they_take_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [len(piece) // BATCH for piece in shared_out(4000, 1e-6, monkeypatch)[0]]
    assert max(quick) > 100 and quick[:2] == [1, 1]
    assert all(later <= GROWTH**2 * one for one, later in zip(quick, quick[2:], strict=False))
    slow = [len(piece) // BATCH for piece in shared_out(400, 60.0, monkeypatch)[0]]
    assert set(slow) == {1}, "a batch takes longer than that"
