"""Bytes that a run takes, estimated from how many numbers it stores and in how many bits."""

import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import pytest

from care_compress.errors import RunError
from care_compress.preflight import Size, Space, check_space, needed_space
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.target import load_target

# So many parameters that everything else hardly counts.
MANY = Size(parameters=100_000_000, sites=1, classes=2)
Usage = namedtuple("Usage", "total used free")


def folders(
    recipe: str, targets: Sequence[str] = (), size: Size = MANY, *settings: str
) -> dict[str, float]:
    """Bytes for each parameter, by folder."""
    chosen = load_recipe(recipe, settings)
    space = needed_space(chosen, size, None, [load_target(name) for name in targets])
    return {name: taken / size.parameters for name, taken in space.folders.items()}


@pytest.mark.parametrize(
    ("recipe", "target", "bytes_each"),
    [
        ("fp32", "onnxruntime-cpu", 4),
        ("int8_ptq", "onnxruntime-cpu", 1),
        ("int8_ptq", "openvino-cpu", 1),
        ("int8_ptq", "tensorrt-gpu", 1 + 2),  # beside it stands float16, which it has to beat
        ("int8_ptq", "tensorrt-rtx", 1 + 2 + 2 * 2.7),  # two engines
    ],
)
def test_a_file_takes_the_bytes_of_its_numbers(recipe: str, target: str, bytes_each: float) -> None:
    assert folders(recipe, [target])["exports"] == pytest.approx(bytes_each, abs=0.2)


def test_files_of_every_target_add_up() -> None:
    both = folders("int8_ptq", ["onnxruntime-cpu", "openvino-cpu"])["exports"]
    assert both == pytest.approx(2, abs=0.05)


def test_a_training_keeps_two_states_of_weights_and_moments() -> None:
    """And the averaged weights, where it averages; beside them the weights themselves."""
    kept = folders("fp32_shapes", (), MANY, "train.ema_decay=null")["float"]
    assert kept == pytest.approx(4 + 2 * 3 * 4, abs=0.05)
    averaged = folders("fp32_shapes", (), MANY, "train.ema_decay=0.99")["float"]
    assert averaged - kept == pytest.approx(2 * 4, abs=0.05)
    found = folders("int8_qat", (), MANY, "quantize.qat.ema_decay=null")
    assert found["ptq"] == pytest.approx(4, abs=0.05)
    assert found["qat"] == pytest.approx(4 + 2 * 3 * 4, abs=0.05)
    assert found["float"] == 0, "it starts from a checkpoint that is elsewhere"


def test_samples_take_a_byte_for_each_colour_of_a_pixel() -> None:
    """64 images travel to a device; an NPU's file goes to no bundle."""
    tiny = Size(parameters=1, sites=0, classes=0)

    def exports(target: str, resolution: int) -> float:
        return folders("int8_ptq", [target], tiny, f"data.resolution={resolution}")["exports"]

    more = exports("onnxruntime-cpu", 200) - exports("onnxruntime-cpu", 100)
    assert more == 64 * 3 * (200**2 - 100**2)
    assert exports("openvino-npu", 200) == exports("openvino-npu", 100)


def test_answers_take_four_bytes_for_each_class_and_image() -> None:
    def exports(classes: int, images: int) -> float:
        size = Size(parameters=1, sites=0, classes=classes)
        setting = f"export.images={images}"
        return folders("int8_ptq", ["openvino-npu"], size, setting)["exports"]

    assert exports(1000, 50) - exports(0, 50) == 4 * 1000 * 50


def test_a_tenth_must_be_free_beyond_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run and the system's temporary files lie on one file system here: both count."""
    space = Space({"exports": 600_000, "records": 300_000}, temporary=100_000)
    assert space.total == 900_000
    for free, enough in ((1_100_000, True), (1_099_000, False), (990_001, False)):
        usage = Usage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
        if enough:
            check_space(space, tmp_path / "run")
        else:
            with pytest.raises(RunError, match="make room"):
                check_space(space, tmp_path / "run")
