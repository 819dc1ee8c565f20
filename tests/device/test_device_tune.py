"""tune on the stand-in: the field, what fails in it, what a killed one takes over, the way home."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fakeboard import FakeGpu, FakeTensorRt
from qdq import IMAGES, MEAN, STD, make_content, write_classifier
from rich.console import Console

from care_compress.device.app import main
from care_compress.device.cuda import Cuda
from care_compress.device.deploy import Host
from care_compress.device.images import normalize_pixels
from care_compress.device.library import wrap_library
from care_compress.evaluate.device_field import device_field, field_tables
from care_compress.evaluate.device_measurements import (
    device_measurements,
    device_rows,
    fastest_of,
    import_results,
)
from care_compress.export.bundle import BundleContent, Model, unpack_bundle, write_bundle
from care_compress.files import sha256_file

VERSION = "10.16.1.11"


def with_variant(folder: Path, batch: int | str) -> BundleContent:
    """A bundle of int8, fp16 and int8-late, whose batch is free or fixed."""
    content = make_content(folder)
    models, logits = {}, {}
    for name in ("int8", "fp16", "int8-late"):
        path = write_classifier(folder / f"{name}.onnx", int8="int8" in name, batch=batch)
        models[name] = Model((path,), sha256_file(path), 20.0)
        session = onnxruntime.InferenceSession(str(path))
        floats = normalize_pixels(content.pixels, MEAN, STD)
        rows = [session.run(None, {"image": floats[i : i + 1]})[0] for i in range(IMAGES)]
        logits[name] = np.concatenate(rows)
    return dataclasses.replace(
        content,
        models=models,
        logits=logits,
        input_shape=(batch, *content.input_shape[1:]),
        output_shape=(batch, *content.output_shape[1:]),
    )


class Board:
    """A board that counts what it builds, and fails where it is told to."""

    def __init__(self, folder: Path, content: BundleContent) -> None:
        self.bundle = unpack_bundle(write_bundle(content, folder / "bundle.tar.gz"), folder)
        self.gpu = FakeGpu()
        self.module = FakeTensorRt(VERSION, self.gpu)
        self.built: list[str] = []
        self.fail: Callable[[str], None] = lambda name: None
        real = self.module._build

        def build(network: Any, config: Any, logger: Any) -> Any:
            level = self.module.done.get("builder_optimization_level")
            shapes = self.module.done.get("set_shape", [()])[0][1:2]
            name = f"{Path(network.path).stem}-o{level}-b{shapes[0][0] if shapes else 1}"
            self.built.append(name)
            self.module.fails_with, self.module.noise = "", 0.0
            self.fail(name)
            return real(network, config, logger)

        self.module._build = build  # type: ignore[method-assign]
        self.host = Host(
            lambda name: wrap_library(self.module, "tensorrt", VERSION),
            lambda: Cuda(self.gpu),
            folder / "root",
        )

    def run(self, verb: str, *options: str) -> int:
        return main([verb, "--bundle", str(self.bundle), *options], self.host)

    def tune(self, *options: str) -> int:
        return self.run("tune", "--seconds", "0.01", *options)

    @property
    def results(self) -> Any:
        return json.loads((self.bundle / "results.json").read_text())

    @property
    def rows(self) -> Any:
        return self.results["candidates"]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> BundleContent:
    return with_variant(tmp_path_factory.mktemp("fixed"), 1)


@pytest.fixture
def board(fixed: BundleContent, tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path, fixed)
    yield board
    assert board.gpu.alive == {}


FIELD = {f"{model}-o{level}-b1" for model in ("int8", "fp16", "int8-late") for level in (3, 5)}


def test_every_model_is_built_at_both_levels_and_the_fastest_kept(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board.tune() == 0
    assert set(board.built) == FIELD == board.rows.keys()
    for row in board.rows.values():
        assert row["state"] == "passed" and row["accuracy"]["passed"] and row["reason"] == ""
        assert row["speed"]["runs"] >= 50 and row["speed"]["cuda_graph"] is True
    p50 = {name: row["speed"]["latency_ms"]["p50"] for name, row in board.rows.items()}
    winner = min(p50, key=lambda name: p50[name])
    assert board.results["winner"] == winner
    assert "kept: the fastest" in capsys.readouterr().out
    for model, engine in board.results["models"].items():
        best = min((n for n in p50 if board.rows[n]["model"] == model), key=lambda n: p50[n])
        assert engine["engine_sha256"] == board.rows[best]["engine_sha256"]
        assert engine["engine_sha256"] == sha256_file(board.bundle / f"{model}.engine")
        assert engine["speed"]["latency_ms"]["p50"] == p50[best]
    explained = {name for name, row in board.rows.items() if row["layer_times"]}
    assert winner in explained and len(explained) == 2
    assert not (board.bundle / "candidates").exists()
    assert board.run("verify") == 0, "the engines that were kept are where other verbs look"


def test_open_batches_are_tried_at_three_sizes(tmp_path: Path) -> None:
    board = Board(tmp_path / "there", with_variant(tmp_path, "batch"))
    assert board.tune("--model", "int8", "--model", "fp16") == 0
    sizes = {name.rpartition("-b")[2] for name in board.built}
    assert sizes == {"1", "4", "8"} and len(board.built) == 12
    assert {row["speed"]["batch"] for row in board.rows.values()} == {1, 4, 8}
    assert board.results["winner"].endswith("-b1"), "latency decides"
    assert board.results["models"]["int8"]["speed"]["batch"] == 1


def test_a_plain_build_leaves_the_variants_out(board: Board) -> None:
    assert board.run("build") == 0
    assert {path.name for path in board.bundle.glob("*.engine")} == {"int8.engine", "fp16.engine"}
    assert board.run("build", "--model", "int8-late") == 0
    assert (board.bundle / "int8-late.engine").is_file()
    assert board.run("build", "--model", "int8-early") == 2


def test_what_does_not_compile_or_verify_is_a_row_with_its_reason(
    board: Board, tmp_path: Path
) -> None:
    def fail(name: str) -> None:
        if name == "int8-o3-b1":
            board.module.fails_with = "no tactic for node 7"
        if name == "int8-late-o5-b1":
            board.module.noise = 3.0
        if name == "int8-late-o3-b1":
            raise RuntimeError("bindings say no")

    board.fail = fail
    assert board.tune() == 0
    rows = board.rows
    assert rows["int8-o3-b1"]["state"] == "failed"
    assert "no tactic for node 7" in rows["int8-o3-b1"]["reason"]
    assert "RuntimeError: bindings say no" in rows["int8-late-o3-b1"]["reason"]
    late = rows["int8-late-o5-b1"]
    assert late["state"] == "failed" and late["reason"].startswith("it answers otherwise")
    assert late["accuracy"]["passed"] is False and late["speed"] is None
    assert {name for name, row in rows.items() if row["speed"]} == {
        "int8-o5-b1", "fp16-o3-b1", "fp16-o5-b1",
    }  # fmt: skip
    assert board.results["models"].keys() == {"int8", "fp16"}
    # At home the whole field is known, reasons included.
    import_results(board.bundle / "results.json", tmp_path / "mine")
    (found,) = device_measurements(tmp_path / "mine")
    field = device_field("mine", found)
    assert field is not None and field["winner"] == board.results["winner"]
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))
    for table in field_tables(field):
        console.print(table)
    text = console.export_text()
    assert "no tactic for node 7" in text and "kept: the fastest" in text
    assert "float products" in text and "1.500 ms" in text, "the head of the stand-in"
    assert dict(device_rows("mine", "int8", found)).keys() == {"mine", "mine fp16"}
    assert fastest_of(found, "int8") == "int8"


def test_where_nothing_passes_the_reasons_come_home(board: Board, tmp_path: Path) -> None:
    def fail(name: str) -> None:
        board.module.fails_with = "no tactic"

    board.fail = fail
    assert board.tune() == 1
    assert board.results["winner"] is None and board.results["models"] == {}
    import_results(board.bundle / "results.json", tmp_path / "mine")
    (found,) = device_measurements(tmp_path / "mine")
    assert all("no tactic" in row["reason"] for row in found["candidates"].values())


def test_a_tune_that_is_killed_goes_on_where_it_was(board: Board) -> None:
    def fail(name: str) -> None:
        if len(board.built) == 4:
            raise SystemExit  # as good as a kill: nothing catches it

    board.fail = fail
    with pytest.raises(SystemExit):
        board.tune()
    first = list(board.built)
    assert board.rows[first[3]]["state"] == "begun"
    board.fail = lambda name: None
    assert board.tune() == 0
    assert board.built[4:] == [first[3], *sorted(FIELD - set(first), key=board.built.index)]
    assert len(board.built) == 7, "three were taken over"
    assert board.tune() == 0
    assert len(board.built) == 7, "and a finished tune builds and times nothing again"


def test_what_ends_the_program_every_time_is_tried_no_third_time(board: Board) -> None:
    def crash(name: str) -> None:
        if name == "int8-o5-b1":
            raise SystemExit

    board.fail = crash
    for _ in range(2):
        with pytest.raises(SystemExit):
            board.tune()
    assert board.tune() == 0
    assert "ended 2 times" in board.rows["int8-o5-b1"]["reason"]
    assert board.built.count("int8-o5-b1") == 2


def test_what_the_user_stops_is_no_crash(board: Board) -> None:
    def stop(name: str) -> None:
        if name == "int8-o5-b1" and len(board.built) < 20:
            raise KeyboardInterrupt

    board.fail = stop
    for _ in range(3):
        assert board.tune() == 130
    board.fail = lambda name: None
    assert board.tune() == 0
    assert board.rows["int8-o5-b1"]["state"] == "passed"


def test_memory_that_was_missing_is_asked_for_again(board: Board) -> None:
    assert board.tune("--model", "fp16") == 0
    board.gpu.failing["cudaMalloc"] = 2
    board.tune("--model", "int8")
    assert {row["state"] for row in board.rows.values()} == {"passed", "lost"}
    assert "made-up error 2" in board.rows["int8-o3-b1"]["reason"]
    board.gpu.failing.clear()
    assert board.tune() == 0
    assert {row["state"] for row in board.rows.values()} == {"passed"}


def test_another_power_mode_is_measured_anew_and_built_from_what_is_there(board: Board) -> None:
    assert board.tune("--power-mode", "15W") == 0
    assert board.tune("--power-mode", "MAXN") == 0
    modes = {row["speed"]["during"]["power_mode"] for row in board.rows.values()}
    assert modes == {"MAXN"}


def test_another_tensorrt_takes_nothing_over(board: Board) -> None:
    assert board.tune("--model", "fp16") == 0
    before = len(board.built)
    later = FakeTensorRt("11.4.1.5", board.gpu)
    library = wrap_library(later, "tensorrt", "11.4.1.5")
    host = dataclasses.replace(board.host, load_library=lambda name: library)
    where = ["--bundle", str(board.bundle), "--seconds", "0.01", "--model", "fp16"]
    assert main(["tune", *where], host) == 0
    assert before == len(board.built), "the other one built"
    assert board.results["board"]["library_version"] == "11.4.1.5"
    assert board.rows.keys() == {"fp16-o3-b1", "fp16-o5-b1"}


def test_an_engine_that_was_replaced_is_not_taken_for_the_winner(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board.tune() == 0
    board.fail = lambda name: setattr(board.module, "noise", 1e-7)
    assert board.run("build", "--int8-only") == 0
    assert board.tune() == 2
    assert "int8.engine was replaced" in capsys.readouterr().err
