"""A stage is done once: again only where something it came from, or what it left, is another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from care_compress.errors import DamagedRunError
from care_compress.recipe.recipe import load_recipe
from care_compress.run import stages
from care_compress.run.context import RunContext
from care_compress.run.directory import Run
from care_compress.run.processes import World
from care_compress.run.stages import once


class Stage:
    """A stage that writes one file and counts how often it was done."""

    def __init__(self, root: Path) -> None:
        self.root, self.done, self.made_from = root, 0, {"images": "a", "recipe": [1, 2]}
        self.handed_in: list[Any] = []
        self.name = "run"

    def __call__(self, repair: bool = False) -> tuple[Any, RunContext]:
        """As a new process does it: its value, and the context afterwards."""
        run = Run(self.root, self.name)
        with run.open(load_recipe("fp32"), {}, repair):
            context = RunContext(run, World(), Console(quiet=True), repair=repair)
            context.bad.reasons["earlier"] = "cut short"

            def make() -> Any:
                self.done += 1
                (run.path / "out.bin").write_bytes(b"result")
                run.record_output(run.path / "out.bin")
                run.record_input("checkpoint", "abc")
                context.bad.reasons["one.png"] = "no image"
                context.spend("work", 2.5)
                return {"top1": 90.0}

            handed = self.handed_in
            value = once(context, "stage", self.made_from, make, handed_in=handed)
        return value, context


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    made()
    assert made.done == 1
    yield made


def test_what_is_taken_over_is_told_as_if_it_were_done(stage: Stage) -> None:
    value, context = stage()
    assert stage.done == 1 and value == {"top1": 90.0}
    assert context.seconds == {"work": 2.5}
    assert context.bad.reasons == {"earlier": "cut short", "one.png": "no image"}
    assert context.run.stage("stage") is not None


def test_anything_it_is_made_from_makes_it_again(stage: Stage) -> None:
    for number, changed in enumerate(
        ({"images": "b"}, {"recipe": [2, 1]}, {"new": None}, {"images": 0}), 2
    ):
        stage.made_from = {**stage.made_from, **changed}
        stage()
        assert stage.done == number, changed
    del stage.made_from["new"]
    stage()
    assert stage.done == 6, "what no longer counts is a change, too"
    stage()
    assert stage.done == 6


def test_another_library_makes_it_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    real, other = stages.installed_versions, dict[str, str]()
    for number, name in enumerate(("torch", "torchao", "numpy"), 2):
        other = {**other, name: "0.0"}  # the others stay as they were at the time before
        monkeypatch.setattr(stages, "installed_versions", lambda names, other=other: {
            **real(names), **{key: value for key, value in other.items() if key in names}
        })  # fmt: skip
        stage()
        assert stage.done == number, name


def test_code_that_is_handed_in_counts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.handed_in = [load_recipe]
    stage()
    assert stage.done == 2
    known = stages._digests()
    monkeypatch.setattr(stages, "_digests", lambda: {**known, "care_compress.recipe.recipe": "x"})
    stage()
    assert stage.done == 3


def test_a_file_that_is_gone_is_made_again_and_a_damaged_one_only_when_asked(stage: Stage) -> None:
    path = stage.root / "run" / "out.bin"
    path.unlink()
    stage()
    assert stage.done == 2
    path.write_bytes(b"resulT")
    with pytest.raises(DamagedRunError, match=r"out\.bin is not what stage wrote"):
        stage()
    stage(repair=True)
    assert stage.done == 3 and path.read_bytes() == b"result"


def test_a_stage_that_fails_is_done_again_and_its_files_are_not_trusted(stage: Stage) -> None:
    stage.made_from["images"] = "b"
    run = Run(stage.root, "run")
    with run.open(load_recipe("fp32"), {}):
        context = RunContext(run, World(), Console(quiet=True))

        def fails() -> None:
            known = json.loads((run.path / "manifest.json").read_text())["stages"]
            assert known == {}, "on the disk, too: the process may be killed now"
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            once(context, "stage", stage.made_from, fails)
        assert run.stage("stage") is None
        assert context.bad.reasons == {} and context.seconds == {}
    stage.made_from["images"] = "a"
    stage()
    assert stage.done == 2


def sibling(stage: Stage, name: str) -> tuple[Stage, Path]:
    """The same stage in another run of the same folder."""
    other = Stage(stage.root)
    other.made_from, other.name = dict(stage.made_from), name
    return other, stage.root / name


@pytest.fixture
def shared(tmp_path: Path) -> Stage:
    (tmp_path / stages.SHARED).mkdir()
    made = Stage(tmp_path)
    made()
    return made


def test_runs_that_share_make_a_stage_once(shared: Stage) -> None:
    other, run = sibling(shared, "other")
    value, context = other()
    assert (other.done, value, context.seconds) == (0, {"top1": 90.0}, {"work": 2.5})
    assert (run / "out.bin").read_bytes() == b"result"
    other()
    assert other.done == 0, "it is the run's own now"
    different, _ = sibling(shared, "different")
    different.made_from["images"] = "b"
    different()
    assert different.done == 1
    third, _ = sibling(shared, "third")
    third()
    assert third.done == 0, "each has its own"


def test_what_was_damaged_in_the_run_that_made_it_is_made_again(shared: Stage) -> None:
    (shared.root / "run" / "out.bin").write_bytes(b"resulT")
    other, run = sibling(shared, "other")
    other()
    assert other.done == 1 and (run / "out.bin").read_bytes() == b"result"
    third, _ = sibling(shared, "third")
    third()
    assert third.done == 0, "taken over from the one that is whole"


def test_runs_that_do_not_share_take_nothing_over(stage: Stage) -> None:
    other, _ = sibling(stage, "other")
    other()
    assert other.done == 1


def test_what_a_sibling_made_of_other_things_since_is_not_taken_over(shared: Stage) -> None:
    other, _ = sibling(shared, "other")
    shared.made_from["images"] = "b"
    shared()
    other()
    assert (shared.done, other.done) == (2, 1)


def test_a_value_that_was_edited_in_a_siblings_manifest_is_not_taken_over(shared: Stage) -> None:
    path = shared.root / "run" / "manifest.json"
    path.write_text(path.read_text().replace("90.0", "99.0"))
    other, _ = sibling(shared, "other")
    value, _ = other()
    assert other.done == 1 and value == {"top1": 90.0}


def test_times_of_a_stage_add_up(tmp_path: Path) -> None:
    context = RunContext(Run(tmp_path, "run"), World(), Console(quiet=True))
    context.spend("evaluate", 2.0)
    with context.apart():
        context.spend("evaluate", 5.0)
    context.spend("evaluate", 0.5)
    assert context.seconds == {"evaluate": 2.5}
