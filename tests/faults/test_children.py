"""Helpers that die and clocks that jump: one line, no hang, and the same result in the end."""

import contextlib
import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty import Product, assert_same, small_recipe

from care_compress.data.listing import EncodedSamples

YEAR = 365 * 86400.0


def _killed_like_by_the_kernel(marker: Path, after: int) -> None:
    """The process that decodes this many images is killed, once; nothing of its own runs."""
    decode, seen, parent = EncodedSamples.image, 0, os.getpid()

    def image(self: EncodedSamples, index: int) -> Any:
        nonlocal seen
        seen += os.getpid() != parent
        if seen > after and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, index)

    EncodedSamples.image = image  # type: ignore[method-assign]


@pytest.mark.parametrize("after", [0, 20, 40])
def test_a_child_killed_as_for_want_of_memory(
    product: Product, tmp_path: Path, undisturbed: dict[str, Any], after: int
) -> None:
    marker = tmp_path / "killed"
    process = product.start(functools.partial(_killed_like_by_the_kernel, marker, after))
    assert process.wait(90) == 2, process.said
    assert marker.exists() and len(process.errors) == 1
    assert "a decoding process died" in process.errors[0] and "data.workers" in process.errors[0]
    assert_same(product.finish(), undisturbed)


def test_workers_killed_from_outside_at_any_moment(
    product: Product, undisturbed: dict[str, Any]
) -> None:
    rng, deaths = random.Random(3), 0
    for attempt in range(4):
        process = product.start()
        while not (found := process.children()) and not process.ends_within(0.005):
            pass
        time.sleep(attempt * 0.02 * rng.random())  # later ones may die with their work done
        for worker in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        code = process.wait(120)
        assert code in (0, 2), process.said
        if code == 2:
            deaths += 1
            assert len(process.errors) == 1 and "a decoding process died" in process.errors[0]
        else:
            shutil.rmtree(product.run)
    assert deaths, "no death mattered, so the test proves nothing"
    assert_same(product.finish(), undisturbed)


def _jump(seed: int) -> None:
    """The clock of the day stands anywhere within thirty years, another place at every look."""
    rng, now = random.Random(seed), time.time
    time.time = lambda: now() + rng.uniform(-15, 15) * YEAR  # type: ignore[assignment]
    time.time_ns = lambda: int(time.time() * 1e9)  # type: ignore[assignment]


def test_clocks_that_jump_change_nothing(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    path = small_recipe(
        tmp_path / "recipe", ["onnxruntime-cpu", "openvino-cpu", "tensorrt-jetson-orin"], workers=1
    )
    images = sorted((tmp_path / "recipe" / "images").rglob("*.png"))
    for number, image in enumerate(images):
        moment = (number % 3 - 1) * 60 * YEAR + 10 * YEAR  # in 1920, 1980 and 2040
        os.utime(image, (moment, moment))
    product = Product(path, tmp_path / "runs")
    assert product.start(functools.partial(_jump, 1)).wait() == 0
    left = product.left()
    for file in product.run.rglob("*.*"):
        os.utime(file, (50 * YEAR, 100 * YEAR))
    again = product.start(functools.partial(_jump, 2))
    assert again.wait() == 0
    assert "made again" not in again.said
    assert_same(product.left(), left)
    assert same_but_for_the_folder(left, undisturbed)


def same_but_for_the_folder(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The images lie elsewhere, which recipe and results say; every model is the same."""
    models = {".safetensors", ".onnx", ".xml", ".bin", ".npy"}
    weights = [
        {name: digest for name, digest in left["files"].items() if Path(name).suffix in models}
        for left in (one, other)
    ]
    accuracies = [left["results"]["candidates"] for left in (one, other)]
    return weights[0] == weights[1] and accuracies[0] == accuracies[1]
