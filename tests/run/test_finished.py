"""A finished run, read again: which float weights are its own, and whether they still are."""

from pathlib import Path

import pytest

from care_compress.errors import CheckpointError
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.run.directory import Run
from care_compress.run.finished import SLIM_CUT, SLIM_HEALED, FinishedRun

SLIM = "slim={budget: {macs: 0.7}, heal: %s}"
HEAL = "{epochs: 1, batch_size: 4, learning_rate: 0.1}"


def finished(runs: Path, recipe: Recipe, *files: str) -> FinishedRun:
    """A run that left these files."""
    with Run(runs, "mine").open(recipe, {}) as run:
        for name in files:
            path = run.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
            run.record_output(path)
    return FinishedRun(run.path, recipe, {})


def test_a_run_that_healed_quantized_the_healed_network(tmp_path: Path) -> None:
    files = (SLIM_CUT, SLIM_HEALED)
    cut = finished(tmp_path / "cut", load_recipe("fp32", [SLIM % "null"]), *files)
    healed = finished(tmp_path / "healed", load_recipe("fp32", [SLIM % HEAL]), *files)
    assert cut.checked_checkpoint() == cut.path / SLIM_CUT
    assert healed.checked_checkpoint() == healed.path / SLIM_HEALED


@pytest.mark.parametrize("slim", ["slim=null", SLIM % HEAL])
def test_weights_that_are_not_what_the_run_left_are_refused(slim: str, tmp_path: Path) -> None:
    trains = "train={epochs: 1, batch_size: 4, learning_rate: 0.1}"
    recipe = load_recipe("fp32", ["model={arch: care_nano}", trains, slim])
    run = finished(tmp_path, recipe, "float/model.safetensors", SLIM_HEALED)
    path = run.checked_checkpoint()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    with pytest.raises(CheckpointError, match="is not the float model that mine was made from"):
        run.checked_checkpoint()
    path.write_bytes(whole)
    assert run.checked_checkpoint() == path


def test_a_checkpoint_of_the_users_is_known_by_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(b"weights")
    recipe = load_recipe("fp32", [f"model.checkpoint={path}"])
    with Run(tmp_path, "mine").open(recipe, {}) as run:
        run.record_input("checkpoint", {"sha256": "of other weights"})
    found = FinishedRun(run.path, recipe, {})
    assert found.start_sha256 == "of other weights"
    with pytest.raises(CheckpointError, match="is not the float model"):
        found.checked_checkpoint()
