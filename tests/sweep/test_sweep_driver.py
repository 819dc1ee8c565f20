"""Sweeps on Ray: every trial is a run, what fails is a row, and what is there is taken over."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeping import run, sweep_of, times_made

from care_compress.console import Terminal
from care_compress.signals import stops_in_order
from care_compress.sweep import driver as driving
from care_compress.sweep.cluster import Cluster, open_cluster
from care_compress.sweep.driver import SPARE

ray = pytest.importorskip("ray", reason="needs the ray extra")
clusters = pytest.importorskip("ray.cluster_utils")

IMAGES = "quantize.calibrate.images"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one core each, on this machine; workers start once for all tests."""
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    nodes = clusters.Cluster(initialize_head=True, head_node_args=small)
    nodes.add_node(**small)
    with open_cluster(str(nodes.address)) as cluster:
        yield cluster
    nodes.shutdown()


def test_failures_are_rows_and_the_best_is_within_the_budgets(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "LOST", 0)  # what crashes here would crash again
    overrides = {IMAGES: [4, 8, 13, 14, 100]}
    budget = {"max_top1_drop": 0.2, "max_size": 0.05}
    sweep = sweep_of(tmp_path, overrides=overrides, budget=budget)
    code, value = run(cluster, sweep, tmp_path / "runs")
    assert code == 0
    rows = {row["point"][IMAGES]: row for row in value["trials"]}
    assert {images for images, row in rows.items() if row["status"] == "failed"} == {13, 14}
    assert "thirteen" in rows[13]["reason"] and "take another" in rows[13]["reason"]
    assert "WorkerCrashedError" in rows[14]["reason"]
    assert value["best"] == rows[8]["name"], "4 loses too much, 100 is too large"
    page = (tmp_path / "runs" / "sweep.html").read_text()
    assert rows[13]["name"] in page and "thirteen" in page and rows[8]["command"] in page


def test_nothing_within_the_budgets_is_exit_code_1(cluster: Cluster, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, overrides={IMAGES: [2]}, budget={"max_top1_drop": 0.1})
    code, value = run(cluster, sweep, tmp_path / "runs")
    assert code == 1 and value["best"] is None


def test_a_second_time_nothing_is_made_and_more_is_added(cluster: Cluster, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run(cluster, sweep_of(tmp_path, overrides={IMAGES: [4, 8]}), runs)
    wider = sweep_of(tmp_path, overrides={IMAGES: [2, 4, 8]})
    rows = {row["point"][IMAGES]: row for row in run(cluster, wider, runs)[1]["trials"]}
    taken = {images: row["taken_over"] for images, row in rows.items()}
    assert taken == {2: False, 4: True, 8: True}
    assert set(times_made(runs).values()) == {1}
    damaged = runs / rows[4]["name"] / "manifest.json"
    damaged.write_text('{"outputs": {"gone.bin": "00"}}')
    run(cluster, wider, runs)
    assert times_made(runs)[rows[4]["name"]] == 2, "it is not whole"


def test_trainings_that_cannot_win_are_stopped(cluster: Cluster, tmp_path: Path) -> None:
    overrides = {IMAGES: [100, 90, 80, 70, 2]}
    asked = {"overrides": overrides, "stopping": {"first": 3, "factor": 3}}
    runs = tmp_path / "runs"
    code, value = run(cluster, sweep_of(tmp_path, **asked), runs)
    rows = {row["point"][IMAGES]: row for row in value["trials"]}
    assert code == 0 and rows[100]["status"] == "finished"
    assert rows[2]["status"] == "stopped" and "after 3 validations" in rows[2]["reason"]
    again = {
        row["name"]: row for row in run(cluster, sweep_of(tmp_path, **asked), runs)[1]["trials"]
    }
    assert again[rows[2]["name"]]["taken_over"], "what was stopped is not begun again"
    _, whole = run(cluster, sweep_of(tmp_path, overrides=overrides), runs)
    assert {row["status"] for row in whole["trials"]} == {"finished"}


def test_optuna_goes_on_from_what_it_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the ray extra")
    asked = {
        "overrides": {IMAGES: {"low": 1, "high": 4096, "scale": "log"}},
        "search": "optuna",
        "objective": {"metric": "top1"},
        "budget": {"max_size": 0.1},
    }
    runs = tmp_path / "runs"
    _, value = run(cluster, sweep_of(tmp_path, trials=4, **asked), runs)
    first = {row["name"] for row in value["trials"]}
    _, value = run(cluster, sweep_of(tmp_path, trials=16, **asked), runs)
    assert first <= {row["name"] for row in value["trials"]}
    assert set(times_made(runs).values()) == {1}
    (best,) = (row for row in value["trials"] if row["name"] == value["best"])
    assert 10 <= best["point"][IMAGES] <= 100, "the best within the budget has 100 images"


@pytest.mark.slow
def test_a_thousand_trials_are_never_in_flight_at_once(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    class Watched(driving.Driver):
        def _take_in(self, reference: Any) -> None:
            nonlocal most
            most = max(most, len(self.waiting))
            super()._take_in(reference)

    monkeypatch.setattr(driving, "Driver", Watched)
    overrides = {IMAGES: {"low": 20, "high": 1019, "step": 1}}
    quick = {"quantize.calibrate.batch_size": 1}
    runs = tmp_path / "runs"
    _, value = run(cluster, sweep_of(tmp_path, overrides=overrides, set=quick), runs)
    assert len(value["trials"]) == 1000
    assert all(row["status"] == "finished" for row in value["trials"])
    assert most <= 2 + SPARE
    assert (runs / "sweep.html").stat().st_size < 3e6


def test_a_signal_while_it_waits_ends_it_as_every_verb(cluster: Cluster, tmp_path: Path) -> None:
    slow = {"quantize.calibrate.batch_size": 3000}  # a trivial trial sleeps so many ms
    runs = tmp_path / "runs"
    told = io.StringIO()

    def stop() -> None:
        while not times_made(runs):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(SystemExit) as ended, stops_in_order(Terminal(file=told)):
        run(cluster, sweep_of(tmp_path, overrides={IMAGES: [21, 22, 23]}, set=slow), runs)
    stopping.join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert "the same command goes on" in told.getvalue()
    assert (runs / "sweep.html").exists(), "what was known by then"
