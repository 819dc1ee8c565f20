"""Every target file that ships loads, and a wrong one says what is wrong with it."""

from pathlib import Path

import pytest

from care_compress.errors import RecipeError
from care_compress.recipe.target import (
    TARGETS_DIR,
    all_targets,
    load_target,
    read_target,
    target_files,
)

FILES = sorted(TARGETS_DIR.rglob("*.yaml"))


def test_target_files_are_found():
    assert len(FILES) >= 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_target_loads_and_is_catalogued(path: Path):
    target = load_target(path.stem)
    assert target.name == path.stem
    assert target in all_targets()
    assert f"[{target.name}]({target.name}.yaml)" in (TARGETS_DIR / "README.md").read_text()


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_nvidia_takes_no_zero_point(target):
    if target.runtime.startswith("tensorrt"):
        assert (target.activations.dtype, target.activations.symmetric) == ("s8", True)
        assert not target.activations.per_channel_depthwise
        assert target.float_type == "fp16"
    else:
        assert target.activations.dtype == "u8"


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = (TARGETS_DIR / "tensorrt-rtx.yaml").read_text()
    assert text.count(old) == 1
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "key", "fix"),
    [
        (
            "builds_without_device:",
            "build_without_device:",
            "build_without_device",
            "did you mean builds_without_device?",
        ),
        (
            "compute_capabilities:",
            "compute_capability:",
            "needs.compute_capability",
            "did you mean compute_capabilities?",
        ),
        ("opset: 20", "opset: 17", "opset", "greater than or equal to 20"),
        ("dtype: s8", "dtype: i8", "activations.dtype", "'u8' or 's8'"),
        ("bits: [8]", "bits: [5]", "weights.bits", "8 or 4"),
        ("bits: [8]", "bits: []", "weights.bits", "at least 1"),
        ('"8.6"', "8.6", "needs.compute_capabilities", "string"),
        ("tensorrt-rtx>=1.7", "tensorrt rtx 1.7", "needs.packages", "no pip requirement"),
        ("device: rtx", "device: npu", "device", "tensorrt_rtx runs on device rtx"),
        ("symmetric: true\n  per_channel_d", "symmetric: yes please\n  per_channel_d", "", "bool"),
    ],
)
def test_a_mistake_names_file_key_and_fix(tmp_path: Path, old: str, new: str, key: str, fix: str):
    path = edited(tmp_path, old, new)
    with pytest.raises(RecipeError) as caught:
        read_target(path)
    message = str(caught.value)
    assert str(path) in message
    assert key in message
    assert fix in message


def test_the_file_name_is_the_name(tmp_path: Path):
    path = edited(tmp_path, "device: rtx", "device: rtx\nname: other")
    with pytest.raises(RecipeError, match="leave the key out"):
        read_target(path)


def test_a_file_without_keys(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    with pytest.raises(RecipeError, match="holds no keys"):
        read_target(path)


def test_an_unknown_target_suggests_the_nearest():
    with pytest.raises(RecipeError, match="did you mean openvino-cpu"):
        load_target("openvino_cpu")
    with pytest.raises(RecipeError, match="Targets: .*onnxruntime-cpu"):
        load_target("../recipes/fp32")


def test_no_files_at_all_is_an_error(tmp_path: Path):
    with pytest.raises(RecipeError, match="holds no target files"):
        target_files(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "one.yaml").write_text("")
    assert target_files(tmp_path) == [tmp_path / "below" / "one.yaml"]
