"""Sweeps on Ray: every trial is a run, what fails is a row, and what is there is taken over."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import sweeping
from rich.console import Console
from sweeping import sweep_of, times_made, trivial

from care_compress.report.write import page_html
from care_compress.sweep import driver as driving
from care_compress.sweep.driver import SPARE, SweepOptions, run_sweep

ray = pytest.importorskip("ray", reason="needs the ray extra")
from ray.cluster_utils import Cluster  # noqa: E402

# A worker cannot import what lies beside the tests.
ray.cloudpickle.register_pickle_by_value(sweeping)

SCHEMA = Path(page_html.__code__.co_filename).with_name("sweep.schema.json")
IMAGES = "quantize.calibrate.images"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head with two cores."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20},
    )
    yield str(cluster.address)
    cluster.shutdown()


def read(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    jsonschema.validate(value, json.loads(SCHEMA.read_text()))
    return value


def test_failures_are_rows_and_the_best_is_within_the_budgets(address: str, tmp_path: Path) -> None:
    overrides = {IMAGES: [4, 8, 13, 14, 100]}
    budget = {"max_top1_drop": 0.2, "max_size": 0.05}
    sweep = sweep_of(tmp_path, overrides=overrides, budget=budget)
    runs, options = tmp_path / "runs", SweepOptions(address)
    assert run_sweep(sweep, runs, options, trivial, QUIET) == 0
    value = read(runs / "tiny_sweep")
    rows = {row["point"][IMAGES]: row for row in value["trials"]}
    assert {images for images, row in rows.items() if row["status"] == "failed"} == {13, 14}
    assert "thirteen" in rows[13]["reason"] and "take another" in rows[13]["reason"]
    assert "WorkerCrashedError" in rows[14]["reason"]
    assert value["best"] == rows[8]["name"], "4 loses too much, 100 is too large"
    page = (runs / "tiny_sweep" / "sweep.html").read_text()
    assert rows[13]["name"] in page and "thirteen" in page and rows[8]["command"] in page


def test_nothing_within_the_budgets_is_exit_code_1(address: str, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, overrides={IMAGES: [2]}, budget={"max_top1_drop": 0.1})
    assert run_sweep(sweep, tmp_path / "runs", SweepOptions(address), trivial, QUIET) == 1
    assert read(tmp_path / "runs" / "tiny_sweep")["best"] is None


def test_a_second_time_nothing_is_made_and_more_is_added(address: str, tmp_path: Path) -> None:
    runs, options = tmp_path / "runs", SweepOptions(address)
    run_sweep(sweep_of(tmp_path, overrides={IMAGES: [4, 8]}), runs, options, trivial, QUIET)
    wider = sweep_of(tmp_path, overrides={IMAGES: [2, 4, 8]})
    run_sweep(wider, runs, options, trivial, QUIET)
    rows = {row["point"][IMAGES]: row for row in read(runs / "tiny_sweep")["trials"]}
    assert {images: row["taken_over"] for images, row in rows.items()} == {
        2: False,
        4: True,
        8: True,
    }
    assert set(times_made(runs / "tiny_sweep").values()) == {1}
    damaged = runs / "tiny_sweep" / rows[4]["name"] / "manifest.json"
    damaged.write_text('{"outputs": {"gone.bin": "00"}}')
    run_sweep(wider, runs, options, trivial, QUIET)
    assert times_made(runs / "tiny_sweep")[rows[4]["name"]] == 2, "it is not whole"


def test_optuna_goes_on_from_what_it_asked_for(address: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the ray extra")
    asked = {
        "overrides": {IMAGES: {"low": 1, "high": 4096, "scale": "log"}},
        "search": "optuna",
        "objective": {"metric": "top1"},
        "budget": {"max_size": 0.1},
    }
    runs, options = tmp_path / "runs", SweepOptions(address)
    run_sweep(sweep_of(tmp_path, trials=4, **asked), runs, options, trivial, QUIET)
    first = {row["name"] for row in read(runs / "tiny_sweep")["trials"]}
    run_sweep(sweep_of(tmp_path, trials=16, **asked), runs, options, trivial, QUIET)
    value = read(runs / "tiny_sweep")
    assert first <= {row["name"] for row in value["trials"]}
    assert set(times_made(runs / "tiny_sweep").values()) == {1}
    (best,) = (row for row in value["trials"] if row["name"] == value["best"])
    assert 10 <= best["point"][IMAGES] <= 100, "the best within the budget has 100 images"


@pytest.mark.slow
def test_a_thousand_trials_are_never_in_flight_at_once(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    class Watched(driving.Driver):
        def _take_in(self, reference: Any) -> None:
            nonlocal most
            most = max(most, len(self.waiting))
            super()._take_in(reference)

    monkeypatch.setattr(driving, "Driver", Watched)
    overrides = {
        IMAGES: {"low": 20, "high": 1019, "step": 1},
        "quantize.calibrate.batch_size": [1],
    }
    run_sweep(
        sweep_of(tmp_path, overrides=overrides),
        tmp_path / "r",
        SweepOptions(address),
        trivial,
        QUIET,
    )
    value = read(tmp_path / "r" / "tiny_sweep")
    assert len(value["trials"]) == 1000
    assert all(row["status"] == "finished" for row in value["trials"])
    assert most <= 2 + SPARE
    page = (tmp_path / "r" / "tiny_sweep" / "sweep.html").stat().st_size
    assert page < 3e6


def test_a_node_that_is_lost_costs_only_what_ran_on_it(tmp_path: Path) -> None:
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        second = cluster.add_node(**small)
        cluster.wait_for_nodes()
        runs = tmp_path / "runs"
        overrides = {IMAGES: [20 + number for number in range(8)]}
        slow = {"quantize.calibrate.batch_size": 500}  # a trivial trial sleeps so many ms
        sweep = sweep_of(tmp_path, overrides=overrides, set=slow)

        def lose() -> None:
            while len(times_made(runs / "tiny_sweep")) < 3:
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)

        losing = threading.Thread(target=lose)
        losing.start()
        assert run_sweep(sweep, runs, SweepOptions(cluster.address), trivial, QUIET) == 0
        losing.join()
    finally:
        cluster.shutdown()
    value = read(runs / "tiny_sweep")
    assert [row["status"] for row in value["trials"]] == ["finished"] * 8
    assert sum(times_made(runs / "tiny_sweep").values()) > 8, "one was begun again"
    expected = {20 + number: 90.0 - 1 / (20 + number) for number in range(8)}
    assert {row["point"][IMAGES]: row["top1"] for row in value["trials"]} == expected
