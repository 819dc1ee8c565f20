import argparse
import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import published_state

import care_compress
from care_compress.errors import CheckpointError, UnsafeCheckpointError
from care_compress.model.care import Care
from care_compress.model.checkpoint import save_checkpoint, state_digest


@pytest.fixture(scope="module")
def nano() -> Care:
    torch.manual_seed(0)
    return care_compress.build_model("care_nano", num_classes=6).eval()


def assert_same(loaded: Care, original: Care) -> None:
    assert (loaded.arch, loaded.num_classes) == (original.arch, original.num_classes)
    assert not loaded.training
    expected = original.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


TRAINING_EXTRAS = {
    "args": argparse.Namespace(lr=1e-3, output=pathlib.PurePosixPath("/out"), dims=[1, (2, 3)]),
    "best": np.float64(78.4),
    "epoch": 299,
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", ["", "state_dict", "state_dict_ema", "model"])
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt"])
def test_every_published_form_loads(
    nano: Care, tmp_path: Path, suffix: str, key: str, prefix: str
) -> None:
    state = {prefix + name: tensor for name, tensor in nano.state_dict().items()}
    path = tmp_path / f"model{suffix}"
    torch.save({key: state, **TRAINING_EXTRAS} if key else state, path)
    assert_same(care_compress.load_checkpoint(path), nano)


@pytest.mark.parametrize("arch", ["care_s0", "care_s1", "care_s2"])
def test_published_sizes_are_told_apart(arch: str, tmp_path: Path) -> None:
    torch.save({"state_dict": published_state(arch)}, tmp_path / "model.pth")
    loaded = care_compress.load_checkpoint(tmp_path / "model.pth", arch=arch)
    assert (loaded.arch, loaded.num_classes) == (arch, 1000)


def test_averaged_weights_are_preferred(nano: Care, tmp_path: Path) -> None:
    raw = {name: torch.zeros_like(tensor) for name, tensor in nano.state_dict().items()}
    torch.save({"state_dict": raw, "state_dict_ema": nano.state_dict()}, tmp_path / "m.pth")
    assert_same(care_compress.load_checkpoint(tmp_path / "m.pth"), nano)


def test_safetensors_round_trip(nano: Care, tmp_path: Path) -> None:
    save_checkpoint(nano, tmp_path / "model.safetensors", {"made_by": "a test"})
    assert_same(care_compress.load_checkpoint(tmp_path / "model.safetensors"), nano)


def test_equal_weights_are_equal_bytes(nano: Care, tmp_path: Path) -> None:
    contents = set()
    for i in range(5):
        path = tmp_path / f"{i}.safetensors"
        save_checkpoint(nano, path, {"made_by": "a test", "seed": "0", "top1": "1"})
        contents.add(path.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stem.0.bias", torch.zeros(16).to_sparse(), "no float weight"),
        ("stem.0.bias", torch.zeros(16, dtype=torch.int8), "no float weight"),
        ("stem.0.bias", torch.zeros(16, dtype=torch.complex64), "no float weight"),
        ("stem.1.running_var", torch.full((16,), -1.0), "negative variance"),
    ],
)
def test_tensors_that_are_no_float_weights_are_named(
    nano: Care, tmp_path: Path, name: str, value: torch.Tensor, message: str
) -> None:
    torch.save({**nano.state_dict(), name: value}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        care_compress.load_checkpoint(tmp_path / "m.pth")


def test_half_precision_and_missing_counters_load(nano: Care, tmp_path: Path) -> None:
    state = {
        name: tensor.half()
        for name, tensor in nano.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "half.pth")
    loaded = care_compress.load_checkpoint(tmp_path / "half.pth")
    assert loaded.head.fc.weight.dtype == torch.float32


def test_the_built_in_weights_load() -> None:
    model = care_compress.load_checkpoint("builtin:care_nano_shapes")
    assert model.arch == "care_nano"
    with pytest.raises(CheckpointError, match="care_nano_shapes"):
        care_compress.load_checkpoint("builtin:care_nano_shape")


class Hostile:
    """Runs a command when unpickled by anything less careful."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.witness}",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["beside", "inside", "namespace", "whole", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_never_runs(
    nano: Care, tmp_path: Path, where: str, zipped: bool
) -> None:
    witness = tmp_path / "executed"
    evil = Hostile(witness)
    content = {
        "beside": {"state_dict": nano.state_dict(), "extra": evil},
        "inside": {"state_dict": {**nano.state_dict(), "stem.0.bias": evil}},
        "namespace": {"state_dict": nano.state_dict(), "args": argparse.Namespace(x=evil)},
    }.get(where, evil)
    path = tmp_path / "evil.pth"
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match="nothing was executed"):
        care_compress.load_checkpoint(path)
    assert not witness.exists()
    pickle.loads(path.read_bytes()) if where == "plain pickle" else torch.load(
        path, weights_only=False
    )
    assert witness.exists(), "otherwise this file was harmless and the test proves nothing"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncation_is_named_at_every_length(nano: Care, tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(nano.state_dict(), whole)
    else:
        save_checkpoint(nano, whole, {})
    content = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for size in [0, 1, 7, 8, 100, len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            care_compress.load_checkpoint(cut)


def test_random_bytes_never_end_in_anything_but_a_named_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for case in range(200):
        magic = [b"", b"\x80\x02", b"PK\x03\x04"][case % 3]
        path = tmp_path / f"noise{case}{['.pth', '.safetensors'][case % 2]}"
        path.write_bytes(magic + rng.bytes(int(rng.integers(1, 3000))))
        with pytest.raises(CheckpointError):
            care_compress.load_checkpoint(path)


def test_a_wrong_arch_says_what_differs_and_what_would_fit(nano: Care, tmp_path: Path) -> None:
    torch.save(nano.state_dict(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"is a care_nano, not a care_s0: .*arch=care_nano"):
        care_compress.load_checkpoint(tmp_path / "m.pth", arch="care_s0")


def test_an_altered_network_names_the_nearest_size(nano: Care, tmp_path: Path) -> None:
    state = nano.state_dict()
    state["stem.0.weight"] = torch.zeros(16, 3, 8, 8)
    state["surprise"] = torch.zeros(1)
    del state["stages.3.blocks.1.token_mixer.qk.bias"]
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as caught:
        care_compress.load_checkpoint(tmp_path / "m.pth")
    message = str(caught.value)
    assert "nearest is care_nano, with 3 differences" in message
    assert "stem.0.weight is 16x3x8x8 instead of 16x3x4x4" in message
    assert "qk.bias is missing" in message and "surprise is unknown" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(nano: Care, tmp_path: Path, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in nano.state_dict().items()}
    state["stages.2.blocks.0.gamma"][3] = value
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"stages.2.blocks.0.gamma holds 1 NaN"):
        care_compress.load_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, torch.zeros(3), {"a": {"b": 1}}])
def test_files_without_weights_are_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        care_compress.load_checkpoint(tmp_path / "m.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a file"):
        care_compress.load_checkpoint(tmp_path / "absent.pth")


def test_a_digest_knows_names_shapes_types_and_values() -> None:
    zeros = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},  # the same bytes
        {"a": torch.full((2, 3), -0.0)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ]
    digests = {state_digest(state) for state in (zeros, *others)}
    assert len(digests) == 6
    ordered = {"a": torch.zeros(1), "b": torch.ones(1)}
    assert state_digest(ordered) == state_digest(dict(reversed(ordered.items())))
    strided = torch.arange(6.0).reshape(2, 3).T
    assert state_digest({"a": strided}) == state_digest({"a": strided.contiguous()})
