"""Graphs and engines of anyone: run, or refused by name, even if the runtime would crash of them.

Each case runs in a process of its own, as the product runs it first; what comes through the probe
has to work in the process that uses it, or to end there in a named error.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import LONGEST_LINE, Cases, Named, damaged, obeyed, tree
from graphs import SIZE, onnx_file
from onnx import TensorProto, helper, numpy_helper
from quantized import care

from care_compress.cli import main
from care_compress.errors import TargetError
from care_compress.export.to_onnx import float_graph
from care_compress.model.rewrite import rewrite
from care_compress.runtime import probe as probing
from care_compress.runtime.artifact import input_size, open_predictor
from care_compress.runtime.probe import probe

onnx_ir = pytest.importorskip("onnx_ir")
CASES = Cases("graphs")
SECONDS = 20
CRASHED: list[str] = []  # what would have taken the product's own process with it


def _in_child(call: Callable[[], None]) -> str:
    """'' if it works, the message of a named error, or how the process ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its default is to end the process
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            call()
            told = b""
        except Named as error:
            told = b"named: " + str(error).encode(errors="replace")
        except BaseException as error:
            told = f"raw: {type(error).__name__}: {error}".encode(errors="replace")
        os.write(writing, told[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return f"crash: signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else told


def check(path: Path, named: bool = False) -> None:
    """Probe and open as `accuracy` does; a crash in here has to be a named error of the probe."""
    before = tree(path.parent)

    def use() -> None:
        try:
            child = {".onnx": probing._onnxruntime, ".xml": probing._openvino}.get(path.suffix)
            if child is not None:
                child(path, SIZE)
        except Exception as error:
            raise TargetError(f"refused by the probe: {error}") from error
        os.write(2, b"")
        input_size(path, SIZE)
        predict = open_predictor(str(path), torch.device("cpu"), threads=1)
        logits = predict(torch.zeros(2, 3, SIZE, SIZE))
        assert logits.shape == (2, predict.num_classes)

    told = _in_child(use)
    if told.startswith("crash"):
        CRASHED.append(f"{path.name}: {told}")
        with pytest.raises(TargetError):
            probe(path, SIZE, SECONDS)
    assert not told.startswith("raw"), told
    assert told or not named, "this one was refused until now"
    if told:
        CASES.refused += 1
    else:
        CASES.worked += 1
    assert tree(path.parent) == before


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A real export of a CARE for both runtimes, and a classifier of three operations."""
    folder = tmp_path_factory.mktemp("originals")
    onnx_ir.save(float_graph(rewrite(care(3)), SIZE, 1), folder / "care.onnx")
    onnx_file(folder / "small.onnx", size=None)
    convert = (
        "import sys; sys.modules['openvino_telemetry'] = None\n"
        "import openvino, pathlib\n"
        "for path in sorted(pathlib.Path('.').glob('*.onnx')):\n"
        "    openvino.save_model(openvino.convert_model(path), path.with_suffix('.xml'))\n"
    )
    # Not in this process: what holds OpenVINO's threads cannot be forked.
    subprocess.run([sys.executable, "-c", convert], cwd=folder, check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("name", "count"), [("small.onnx", 50), ("care.onnx", 40)])
def test_damaged_onnx(name: str, count: int, originals: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(originals[name])
    check(path)
    assert CASES.worked, "the original runs"
    rng = random.Random(name)
    for _ in range(count):
        path.write_bytes(damaged(originals[name], rng))
        check(path)


@pytest.mark.parametrize(("name", "count"), [("small", 30), ("care", 14)])
def test_damaged_openvino(
    name: str, count: int, originals: dict[str, bytes], tmp_path: Path
) -> None:
    xml, weights = tmp_path / f"{name}.xml", tmp_path / f"{name}.bin"
    rng = random.Random(name)
    for number in range(count):
        xml.write_bytes(originals[f"{name}.xml"])
        weights.write_bytes(originals[f"{name}.bin"])
        if number:
            chosen = rng.choice((xml, xml, weights))
            chosen.write_bytes(damaged(chosen.read_bytes(), rng))
        check(xml)
    text = originals["small.xml"].decode()
    for old, new in (
        ("32", "-1"),
        ("32", "99999999999"),
        ("size=", "size='1' x="),
        ("MatMul", "TensorIterator"),
    ):
        xml.write_text(text.replace(old, new))
        check(xml)
    for content in (
        "",
        "<net/>",
        "<net>" * 50_000,
        '<!DOCTYPE n [<!ENTITY a "b">]><net>&a;</net>',
        "\0",
        text[:900],
    ):
        xml.write_text(content)
        check(xml, named=True)
    xml.write_text(text)
    weights.unlink()
    check(xml, named=True)
    os.mkfifo(tmp_path / "pipe.xml")
    with pytest.raises(TargetError):
        open_predictor(str(tmp_path / "pipe.xml"), torch.device("cpu"))


def _value(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Any = ()) -> Any:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _external(location: str, **more: str) -> Any:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        weight.external_data.add(key=key, value=value)
    return weight


IMAGE = _value("x", [1, 3, SIZE, SIZE])
LOGITS = _value("y", [1, 4])
MEANS = [
    helper.make_node("GlobalAveragePool", ["x"], ["m"]),
    helper.make_node("Flatten", ["m"], ["f"]),
]
HEAD = [*MEANS, helper.make_node("MatMul", ["f", "w"], ["y"])]
WEIGHT = numpy_helper.from_array(np.ones((3, 4), np.float32), "w")


def _loop(iterations: int) -> Any:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["v", "v"], ["v2"])],
        "body",
        [
            _value("i", [], TensorProto.INT64),
            _value("c", [], TensorProto.BOOL),
            _value("v", [1, 4]),
        ],
        [_value("c2", [], TensorProto.BOOL), _value("v2", [1, 4])],
    )
    many = numpy_helper.from_array(np.array(iterations, np.int64), "n")
    true = numpy_helper.from_array(np.array(True), "t")
    nodes = [*HEAD[:2], helper.make_node("MatMul", ["f", "w"], ["s"])]
    nodes.append(helper.make_node("Loop", ["n", "t", "s"], ["y"], body=body))
    return _model(nodes, [IMAGE], [LOGITS], [WEIGHT, many, true])


def _filled(size: int) -> Any:
    """A constant that the runtime is told to make: nothing in the file, everything in memory."""
    shape = numpy_helper.from_array(np.array([size], np.int64), "s")
    nodes = [*HEAD[:2], helper.make_node("MatMul", ["f", "w"], ["l"])]
    nodes += [
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["r"], keepdims=0),
    ]
    nodes += [helper.make_node("Add", ["l", "r"], ["y"])]
    return _model(nodes, [IMAGE], [LOGITS], [WEIGHT, shape])


def odd_models() -> dict[str, Any]:
    huge = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40, 4], raw_data=b"")
    negative = TensorProto(name="w", data_type=1, dims=[-3, 4], raw_data=bytes(48))
    few = TensorProto(name="w", data_type=1, dims=[3, 4], raw_data=bytes(8))
    found = {
        "no nodes": _model([], [IMAGE], [IMAGE]),
        "no input": _model([helper.make_node("Identity", ["w"], ["y"])], [], [_value("y", [3, 4])], [WEIGHT]),
        "no output": _model(HEAD, [IMAGE], [], [WEIGHT]),
        "two inputs": _model(HEAD, [IMAGE, _value("z", [1])], [LOGITS], [WEIGHT]),
        "two outputs": _model(HEAD, [IMAGE], [LOGITS, _value("f", [1, 3])], [WEIGHT]),
        "a cycle": _model([helper.make_node("Add", ["x", "y"], ["y"])], [IMAGE], [IMAGE]),
        "a long cycle": _model([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Add", ["a", "x"], ["b"])], [IMAGE], [_value("b", None)]),
        "an unknown operation": _model([helper.make_node("Nothing", ["x"], ["y"])], [IMAGE], [LOGITS]),
        "an unknown domain": _model([helper.make_node("Run", ["x"], ["y"], domain="evil")], [IMAGE], [LOGITS]),
        "three dimensions": _model([helper.make_node("Identity", ["x"], ["y"])], [_value("x", [3, 32, 32])], [_value("y", [3, 32, 32])]),
        "an image back": _model([helper.make_node("Identity", ["x"], ["y"])], [IMAGE], [_value("y", [1, 3, SIZE, SIZE])]),
        "a scalar": _model([helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)], [IMAGE], [_value("y", [])]),
        "whole numbers": _model([*MEANS, helper.make_node("Cast", ["f"], ["y"], to=TensorProto.INT64)], [IMAGE], [_value("y", [1, 3], TensorProto.INT64)]),
        "texts": _model([*MEANS, helper.make_node("Cast", ["f"], ["y"], to=TensorProto.STRING)], [IMAGE], [_value("y", [1, 3], TensorProto.STRING)]),
        "bytes in": _model([helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT), helper.make_node("Flatten", ["c"], ["y"])], [_value("x", [1, 3, SIZE, SIZE], TensorProto.UINT8)], [_value("y", [1, 3 * SIZE * SIZE])]),
        "channels last": _model([helper.make_node("Flatten", ["x"], ["y"])], [_value("x", [1, SIZE, SIZE, 3])], [_value("y", [1, 3072])]),
        "one channel": _model([helper.make_node("Flatten", ["x"], ["y"])], [_value("x", [1, 1, SIZE, SIZE])], [_value("y", [1, 1024])]),
        "a huge image": _model(HEAD, [_value("x", [1, 3, 65000, 65000])], [LOGITS], [WEIGHT]),
        "a huge batch": _model(HEAD, [_value("x", [1 << 31, 3, SIZE, SIZE])], [LOGITS], [WEIGHT]),
        "no batch": _model(HEAD, [_value("x", [0, 3, SIZE, SIZE])], [LOGITS], [WEIGHT]),
        "a negative side": _model(HEAD, [_value("x", [1, 3, -5, SIZE])], [LOGITS], [WEIGHT]),
        "unknown classes": _model(HEAD, [IMAGE], [_value("y", [1, "K"])], [numpy_helper.from_array(np.ones((3, 4), np.float32), "w")]),
        "a wrong promise": _model(HEAD, [IMAGE], [_value("y", [1, 400])], [WEIGHT]),
        "a huge weight": _model(HEAD, [IMAGE], [LOGITS], [huge]),
        "a negative weight": _model(HEAD, [IMAGE], [LOGITS], [negative]),
        "a short weight": _model(HEAD, [IMAGE], [LOGITS], [few]),
        "a weight of texts": _model(HEAD, [IMAGE], [LOGITS], [helper.make_tensor("w", TensorProto.STRING, [1], [b"x"])]),
        "a weight twice": _model(HEAD, [IMAGE], [LOGITS], [WEIGHT, WEIGHT]),
        "4 TB": _filled(1 << 40),
        "64 GB": _filled(1 << 34),
        "overflow": _filled(1 << 62),
        "an endless loop": _loop(1 << 62),
        "a short loop": _loop(3),
        "an opset of the future": _model(HEAD, [IMAGE], [LOGITS], [WEIGHT]),
        "a hostile name": _model([*MEANS, helper.make_node("MatMul", ["f", "\x1b[2J"], ["y"])], [IMAGE], [LOGITS]),
        "deep names": _model([helper.make_node("Identity", ["x"], ["n" * 100_000])], [IMAGE], [_value("n" * 100_000, [1, 3, SIZE, SIZE])]),
        "many nodes": _model([helper.make_node("Relu", [f"v{n}" if n else "x"], [f"v{n + 1}"]) for n in range(5000)], [IMAGE], [_value("v5000", [1, 3, SIZE, SIZE])]),
    }  # fmt: skip
    found["an opset of the future"].opset_import[0].version = 9999
    places = [
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "absent.bin",
        "",
        ".",
        "/dev/zero",
        "pipe.bin",
        "link.bin",
        "a\0b",
    ]
    places += ["\x1b[2J", "x" * 5000, "weights.bin", "folder"]
    for place in places:
        found[f"weights in {place[:20]!r}"] = _model(HEAD, [IMAGE], [LOGITS], [_external(place)])
    for key, value in (
        ("offset", "-1"),
        ("offset", "99999999999999"),
        ("length", "99999999999999"),
        ("offset", "x"),
        ("length", "-4"),
    ):
        found[f"weights of {key} {value}"] = _model(
            HEAD, [IMAGE], [LOGITS], [_external("weights.bin", **{key: value})]
        )
    return found


MUST_BE_NAMED = (
    "cycle",
    "unknown",
    "input",
    "no output",
    "two",
    "huge",
    "TB",
    "GB",
    "overflow",
    "endless",
    "texts",
)
MUST_BE_NAMED += (
    "etc/passwd",
    "absent",
    "dev/zero",
    "whole numbers",
    "scalar",
    "image back",
    "dimensions",
    "future",
)


def test_odd_onnx(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.ones(12, np.float32).tobytes())
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.bin")
    path = tmp_path / "odd.onnx"
    for name, model in odd_models().items():
        path.write_bytes(model.SerializeToString())
        check(path, named=any(part in name for part in MUST_BE_NAMED) and name != "unknown classes")


def test_what_is_no_graph(tmp_path: Path) -> None:
    rng = random.Random(0)
    for suffix in (".onnx", ".xml"):
        path = tmp_path / f"random{suffix}"
        for content in (
            b"",
            b"\0",
            b"{}",
            b"<?xml version='1.0'?>",
            rng.randbytes(9),
            rng.randbytes(9999),
            b"\x0a" * 9999,
        ):
            path.write_bytes(content)
            check(path, named=True)
    for name in (
        "absent.onnx",
        "",
        "x.engine",
        "a\0.onnx",
        "x" * 5000 + ".onnx",
        ".onnx",
        "\udc80.xml",
        "x.txt",
    ):
        with pytest.raises(Named):
            open_predictor(str(tmp_path / name), torch.device("cpu"))
        CASES.refused += 1


def test_engines_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is code: without the description of one's own build it is not even read."""
    (tmp_path / "x.engine").write_bytes(b"ftrt" + bytes(100))
    (tmp_path / "x.onnx").write_bytes(b"graph")
    texts = [
        "",
        "null",
        "[]",
        "{}",
        '{"library": 3}',
        '{"library": "os"}',
        '{"library": "../x"}',
        "[" * 100_000,
    ]
    texts += [
        '{"library": "tensorrt"}',
        '{"library": "tensorrt", "kind": "care-engine"}',
        '{"layers": 3}',
        "\0",
        "{",
    ]
    for text in texts:
        (tmp_path / "x.engine.json").write_text(text)
        with pytest.raises(Named):
            open_predictor(str(tmp_path / "x.engine"), torch.device("cpu"))
        with pytest.raises(SystemExit) as ended:
            main(["layers", str(tmp_path / "x.engine")])
        assert ended.value.code == 2
        CASES.refused += 2
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "x.engine.json").write_text('{"library": "evil"}')
    with pytest.raises(Named, match="no TensorRT"):
        open_predictor(str(tmp_path / "x.engine"), torch.device("cpu"))
    assert not (tmp_path / "pwned").exists(), "importing a module runs it"


def test_a_crash_a_hang_and_a_bomb_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real child process, which ends in each of the three ways."""
    path = onnx_file(tmp_path / "four.onnx")
    probe(path, SIZE)
    with pytest.raises(TargetError, match="busy for more than 0"):
        probe(path, SIZE, longest=0.01)
    path.write_bytes(_loop(1 << 62).SerializeToString())
    with pytest.raises(TargetError, match="busy for more than 3 seconds"):
        probe(path, SIZE, longest=3)
    path.write_bytes(_filled(1 << 40).SerializeToString())
    with pytest.raises(TargetError, match="no classifier|crash"):
        probe(path, SIZE)
    dying = tmp_path / "sitecustomize.py"
    dying.write_text(
        "import os, sys\nif 'probe' in ' '.join(sys.orig_argv): os.kill(os.getpid(), 11)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(TargetError, match="crash .SIGSEGV"):
        probe(path, SIZE)
    CASES.refused += 4


def test_the_command_line_says_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = odd_models()
    Path("weights.bin").write_bytes(bytes(48))
    chosen = [
        "a cycle",
        "no input",
        "two outputs",
        "a huge weight",
        "a long cycle",
        "4 TB",
        "a hostile name",
    ]
    for name in chosen:
        Path("odd.onnx").write_bytes(models[name].SerializeToString())
        verbs = [
            ["layers", "odd.onnx"],
            ["accuracy", "odd.onnx", "--data", "builtin:shapes", "--res", "32"],
        ]
        verbs += [["latency", "odd.onnx"]]
        verbs += (
            [["compare", "odd.onnx", "odd.onnx", "--data", "builtin:shapes", "--res", "32"]]
            if name == "a cycle"
            else []
        )
        for verb in verbs:
            with pytest.raises(SystemExit) as ended:
                main(verb)
            out, err = capfd.readouterr()
            assert ended.value.code == 2 and err.count("\n") == 1 and "Error: " in err, (
                name,
                verb,
                err,
            )
            assert (
                obeyed(err[:-1]) == "" and len(err) < LONGEST_LINE and "Traceback" not in out + err
            )
            CASES.refused += 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["accuracy", "junk.onnx", "--data", "builtin:shapes", "--res", "32"],
        ["plan", "junk.yaml"],
        ["plan", "fp32", "--ckpt", "junk.pth"],
        ["accuracy", "junk.pth", "--data", "junk.zip", "--res", "32"],
        ["nonsense\x1b[2J"],
    ],
)
def test_as_a_user_types_it(arguments: list[str], tmp_path: Path) -> None:
    """A process of its own, with everything that Python and the libraries may say on the way."""
    for suffix in ("onnx", "yaml", "pth", "zip"):
        (tmp_path / f"junk.{suffix}").write_bytes(b"\x80junk")
    for more in ([], ["--debug"]):
        command = [sys.executable, "-m", "care_compress", *arguments, *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
        err = done.stderr.decode()
        if more and "nonsense" not in arguments[0]:
            assert done.returncode == 1 and "Traceback" in err
        else:
            assert done.returncode == 2 and err.count("\n") == 1 and obeyed(err[:-1]) == "", err
        CASES.refused += 1
    assert len(list(tmp_path.iterdir())) == 4


def test_there_were_enough_cases() -> None:
    print("crashes that only the probe survived:", CRASHED)
    assert json.dumps(CRASHED) and tempfile.gettempdir()
    CASES.assert_enough()
