"""Killed anywhere, the same command ends with what an undisturbed run leaves, bit for bit."""

import json
import random
import shutil
import signal
import time
from itertools import count
from typing import Any

import pytest
from faulty import LONGEST, Product, assert_same, kill_at_border, kill_at_write

MOMENTS = 30
IN_ONE_RUN = 5  # kills, before it may come to its end
STAGES = [
    "train", "calibration", "ptq", "evaluate ptq", "qat", "evaluate qat",
    "export onnxruntime-cpu", "export openvino-cpu", "export tensorrt-jetson-orin",
    "export samples",
]  # fmt: skip


def stages_done(product: Product) -> int:
    path = product.run / "manifest.json"
    return len(json.loads(path.read_text())["stages"]) if path.exists() else 0


def test_the_stages_are_all_that_there_are(finished: Product) -> None:
    manifest = json.loads((finished.run / "manifest.json").read_text())
    assert list(manifest["stages"]) == STAGES, "a new stage is to be killed at its borders too"


def test_sigkill_at_random_moments(product: Product, undisturbed: dict[str, Any]) -> None:
    """Runs that are killed, started again, killed ... and finished, each begun anew."""
    began = time.monotonic()
    assert_same(product.finish(), undisturbed)
    whole = time.monotonic() - began
    rng, kills, at = random.Random(0), 0, []
    for number in count():
        shutil.rmtree(product.run)
        # The first kill of each is in another part of the pipeline: a run goes on where it was.
        moment = (number % IN_ONE_RUN + rng.random()) / IN_ONE_RUN
        for _ in range(IN_ONE_RUN):
            process = product.start()
            if process.ends_within(moment * whole):
                assert process.wait() == 0, process.said
                break
            process.signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kills += 1
            at.append(stages_done(product))
            moment = rng.random() / 2
            assert time.monotonic() - began < 3 * LONGEST
        assert_same(product.finish(), undisturbed)
        if kills >= MOMENTS:
            break
    print(f"stages done at each kill: {at}")
    assert len(set(at)) >= 5, "the kills were not spread over the pipeline"


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_sigkill_at_the_border_of_every_stage(
    product: Product, undisturbed: dict[str, Any], written: bool
) -> None:
    for number, stage in enumerate(STAGES):
        process = product.start(kill_at_border(stage, written))
        assert process.wait() == -signal.SIGKILL, process.said
        assert stages_done(product) == number + written
    assert_same(product.finish(), undisturbed)


def test_sigkill_while_a_file_is_put_into_its_place(
    product: Product, undisturbed: dict[str, Any]
) -> None:
    rng = random.Random(1)
    for _ in range(8):
        process = product.start(kill_at_write(rng.randint(1, 16)))
        assert process.wait() in (0, -signal.SIGKILL), process.said
    assert_same(product.finish(), undisturbed)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_order_and_going_on(
    product: Product, undisturbed: dict[str, Any], signum: signal.Signals
) -> None:
    rng, stops, begun = random.Random(int(signum)), 0, 0
    for _ in range(6):
        process = product.start()
        if process.ends_within(1 + rng.random() * 6):
            break
        workers = process.children()
        process.signal(signum)
        assert process.wait(60) == 128 + signum, process.said
        # Before the run is opened there is nothing to go on with.
        said = f"stopped by {signum.name}"
        assert process.errors in ([said], [f"{said}; the same command goes on"])
        begun += process.errors != [said]
        assert not any(worker.is_running() for worker in workers), "a worker was left behind"
        assert not list(product.run.rglob(".*.tmp"))
        stops += 1
    assert stops and begun, "no run was ever stopped, so the test proves nothing"
    assert_same(product.finish(), undisturbed)


def test_a_second_process_on_the_run_is_refused(product: Product) -> None:
    first = product.start()
    while not (product.run / "manifest.json").exists() and not first.ends_within(0.05):
        pass
    second = product.start()
    assert second.wait() == 2
    assert len(second.errors) == 1 and "another process is working in" in second.errors[0]
    assert first.wait() == 0, first.said
