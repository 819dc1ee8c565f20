"""What a sweep file may say, and what is refused in one line before work starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeping import sweep_of
from typer.testing import CliRunner

from care_compress import cli, libraries
from care_compress.errors import CareError, RecipeError, TargetError
from care_compress.recipe.recipe import load_recipe
from care_compress.sweep.cluster import open_cluster
from care_compress.sweep.sections import RangeSection, Sweep, read_sweep
from care_compress.sweep.trials import Listed, make_search, trial_of

IMAGES = "quantize.calibrate.images"
METHOD = "quantize.calibrate.method"


def trials(sweep: Sweep) -> list[dict[str, Any]]:
    search = make_search(sweep, Path("runs"))
    assert isinstance(search, Listed)
    return [dict(trial.point) for trial in search.shown]


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    overrides = {IMAGES: [8, 16], METHOD: ["random", "stratified", "diverse"]}
    found = trials(sweep_of(tmp_path, recipes=["int8_ptq", "int8_naive"], overrides=overrides))
    assert len(found) == 12
    assert len({tuple(point.items()) for point in found}) == 12


def test_a_grid_with_a_limit_is_drawn_from_all_of_it(tmp_path: Path) -> None:
    overrides = {
        IMAGES: {"low": 1, "high": 1000, "step": 1},
        "seed": {"low": 0, "high": 10**6, "step": 1},
    }
    found = trials(sweep_of(tmp_path, overrides=overrides, trials=20))
    assert len(found) == 20
    assert max(point[IMAGES] for point in found) > 500 > min(point[IMAGES] for point in found)


@pytest.mark.parametrize(
    ("said", "values"),
    [
        ({"low": 8, "high": 32, "step": 8}, [8, 16, 24, 32]),
        ({"low": 0.1, "high": 0.3, "step": 0.1}, [0.1, 0.2, 0.3]),
        ({"low": 1e-6, "high": 1e-4, "count": 3, "scale": "log"}, [1e-6, 1e-5, 1e-4]),
        ({"low": 1, "high": 3, "count": 9}, [1, 2, 3]),
    ],
)
def test_a_range_holds_both_ends(said: dict[str, Any], values: list[float]) -> None:
    assert RangeSection(**said).values() == values


def test_what_is_drawn_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    overrides = {IMAGES: {"low": 8, "high": 512}, METHOD: ["random", "diverse"]}
    asked = {"overrides": overrides, "search": "random", "trials": 9}
    first, again = (trials(sweep_of(tmp_path, **asked)) for _ in range(2))
    other = trials(sweep_of(tmp_path, seed=1, **asked))
    assert first == again != other
    assert all(8 <= point[IMAGES] <= 512 and isinstance(point[IMAGES], int) for point in first)


def test_drawing_ends_where_the_space_does(tmp_path: Path) -> None:
    found = trials(sweep_of(tmp_path, overrides={IMAGES: [8, 16]}, search="random", trials=9))
    assert sorted(point[IMAGES] for point in found) == [8, 16]


def test_places_that_were_drawn_before_end_it_only_in_a_row(tmp_path: Path) -> None:
    overrides = {"seed": {"low": 1, "high": 100, "step": 1}}
    found = trials(sweep_of(tmp_path, overrides=overrides, search="random", trials=100))
    # Many draws come twice before the last few are found.
    assert len(found) == len({point["seed"] for point in found}) > 85


def last_asked(sweep: Sweep, over: float | None = None) -> float:
    """The mean of what a search asks for last, where the objective is the number of images."""
    search, asked = make_search(sweep, Path("runs")), []
    while (trial := search.ask()) is not None:
        images = float(trial.point[IMAGES])
        asked.append(images)
        missed = {} if over is None else {"max_size": images - over}
        search.tell(trial, {"objective": images, "over": missed})
    return sum(asked[-10:]) / 10


def test_a_search_goes_where_the_objective_is_better_and_the_budgets_hold(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the ray extra")
    asked = {"overrides": {IMAGES: {"low": 1, "high": 1000}}, "search": "optuna", "trials": 30}
    largest = last_asked(sweep_of(tmp_path, objective={"metric": "top1"}, **asked))
    smallest = last_asked(sweep_of(tmp_path, objective={"metric": "size"}, **asked))
    limited = sweep_of(tmp_path, objective={"metric": "top1"}, budget={"max_size": 1}, **asked)
    assert smallest < 250 < 750 < largest
    assert 250 < last_asked(limited, over=500.0) < 600


def test_two_points_that_make_one_recipe_are_one_trial(tmp_path: Path) -> None:
    own = load_recipe("int8_ptq").quantize
    assert own is not None
    sweep = sweep_of(tmp_path, overrides={IMAGES: [own.calibrate.images, own.calibrate.images]})
    assert len(trials(sweep)) == 1


def test_the_command_of_a_trial_makes_its_recipe(tmp_path: Path) -> None:
    values = {"set": {"export.targets": ["onnxruntime-cpu"], "quantize.equalize": "off"}}
    overrides = {"quantize.calibrate.percentile": [99.9]}
    sweep = sweep_of(tmp_path, **values, overrides=overrides, checkpoints=["a folder/it's.pth"])
    (point,) = trials(sweep)
    trial = trial_of(sweep, point, Path("runs"))
    import shlex

    words = shlex.split(trial.command)
    said = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert load_recipe(words[2], said) == trial.recipe


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"recipies": ["int8_ptq"]}, "unknown key recipies"),
        ({"recipes": []}, "recipes"),
        ({"recipes": ["int8_ptqq"]}, "did you mean int8_ptq"),
        ({"overrides": {IMAGES: []}}, IMAGES),
        ({"overrides": {IMAGES: 8}}, IMAGES),
        ({"overrides": {IMAGES: {"low": 9, "high": 8, "step": 1}}}, "range from 9 to 8 is empty"),
        ({"overrides": {IMAGES: {"low": 8, "high": 9}}}, "count or step"),
        ({"overrides": {IMAGES: {"low": 0, "high": 9, "count": 3, "scale": "log"}}}, "log range"),
        ({"overrides": {IMAGES: {"lo": 8, "high": 9}}}, "unknown key"),
        ({"overrides": {"quantize.calibrate.imags": [8]}}, "did you mean images"),
        ({"overrides": {IMAGES: ["many"]}}, "many"),
        ({"overrides": {IMAGES: [8]}, "set": {IMAGES: 9}}, "set the same value"),
        ({"overrides": {"seed": {"low": 0, "high": 10**6, "step": 1}}}, "1,000,001 combinations"),
        ({"search": "random"}, "needs trials"),
        ({"budget": {"max_latency": {"openvino-cpu": 3}}}, "judged and not measured"),
        ({"budget": {"min_speedup": {"openvino-cpu": 3}}}, "judged and not measured"),
        ({"stopping": {"first": 1}, "resources": {"gpus": 2}}, "trials of one process"),
        (
            {
                "checkpoints": ["a.pth", "b.pth"],
                "overrides": {"seed": {"low": 1, "high": 600, "step": 1}},
            },
            "1,200 combinations",
        ),
        ({"objective": {"metric": "latency"}}, "name it"),
        ({"timing": {"targets": ["openvino-cup"]}}, "did you mean openvino-cpu"),
        (
            {
                "set": {"export.targets": ["openvino-cpu"]},
                "timing": {"targets": ["onnxruntime-cpu"]},
            },
            "exports nothing to onnxruntime-cpu",
        ),
        ({"checkpoints": ["nowhere.pth"]}, "nowhere.pth is not a file"),
        ({"data": ["nowhere"]}, "nowhere does not exist"),
        ({"name": "../elsewhere"}, "no run name"),
        ({"resources": {"cpus": 1.5}}, "whole number"),
    ],
)
def test_what_cannot_work_is_one_line_before_work_starts(
    asked: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"recipes": ["int8_ptq"], **asked}))
    done = CliRunner().invoke(cli.app, ["sweep", str(path), "--runs", str(tmp_path / "runs")])
    assert isinstance(done.exception, CareError)
    assert told in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "runs").exists()


def test_without_ray_its_install_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(libraries.sys.modules, "ray", None)
    with pytest.raises(TargetError, match=r"ray is not installed.*care-compress\[ray\]|\.\[ray\]"):
        with open_cluster(None):
            pass


@pytest.mark.parametrize(
    ("address", "told"),
    [("127.0.0.1:1", "nobody answers"), ("ray://head:10001", "client"), ("head", "no address")],
)
def test_an_address_that_cannot_be_used_is_told_at_once(address: str, told: str) -> None:
    pytest.importorskip("ray", reason="needs the ray extra")
    with pytest.raises(CareError, match=told), open_cluster(address):
        pass


def test_a_plan_names_the_trials_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"recipes": ["int8_ptq"], "overrides": {IMAGES: [8, 16]}}))
    arguments = ["sweep", str(path), "--dry-run", "--runs", str(tmp_path / "runs")]
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "memory: at most about" in done.output and "for a trial" in done.output
    assert "2 trials" in done.output and "--set quantize.calibrate.images=8" in done.output
    assert not (tmp_path / "runs").exists()


def test_the_shipped_sweeps_are_valid() -> None:
    for name in ("int8_grid",):
        assert trials(read_sweep(name))


def test_unknown_sweeps_are_named() -> None:
    with pytest.raises(RecipeError, match="did you mean int8_grid"):
        read_sweep("int8_gird")
