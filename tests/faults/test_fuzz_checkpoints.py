"""Checkpoints that are damaged, lie, or want to run code: read, or refused and not executed."""

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import LONGEST_LINE, Cases, damaged, memory_limit, obeyed, sealed, tree
from quantized import quantized, section
from safetensors.torch import save as save_safetensors

import care_compress
from care_compress.cli import main
from care_compress.errors import CheckpointError, UnsafeCheckpointError
from care_compress.model.care import Care
from care_compress.model.checkpoint import load_checkpoint, save_checkpoint
from care_compress.quantize.artifact import save_quantized
from care_compress.recipe.sections import RewriteSection
from care_compress.runtime.artifact import open_predictor

CASES = Cases("checkpoints")
CPU = torch.device("cpu")
State = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _limits() -> Iterator[None]:
    with memory_limit():
        yield


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return dict(care_compress.build_model("care_nano", num_classes=3).eval().state_dict())


@pytest.fixture(scope="module")
def originals(state: State, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same weights in every form that is read, and a quantized model."""
    folder = tmp_path_factory.mktemp("originals")
    torch.save({"state_dict": state, "epoch": 3}, folder / "zip.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    half = {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    }
    torch.save(half, folder / "half.pt")
    model = care_compress.build_model("care_nano", num_classes=3).eval()
    save_checkpoint(model, folder / "plain.safetensors", {})
    save_quantized(
        quantized(section()).model,
        section(),
        RewriteSection(fold_norms=False),
        folder / "quantized.safetensors",
    )
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check(path: Path) -> str | Care:
    """Opened as `load_checkpoint` does and as every measuring verb does; nothing else happens."""
    before = tree(path.parent)

    def load() -> Care | None:
        if b"care_compress_quantized" in path.read_bytes()[:4096]:
            predict = open_predictor(str(path), CPU)
            assert predict(torch.zeros(1, 3, 32, 32)).shape == (1, predict.num_classes)
            return None
        return load_checkpoint(path)

    with sealed(path.parent, Path(tempfile.gettempdir())):
        found = CASES.attempt(load)
    assert tree(path.parent) == before
    if isinstance(found, Care):
        finite = (torch.isfinite(value).all() for value in found.state_dict().values())
        assert all(finite) and found.num_classes >= 1
    return found  # type: ignore[return-value]


ORIGINALS = ("zip.pth", "legacy.pth", "half.pt", "plain.safetensors", "quantized.safetensors")


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("name", ORIGINALS)
def test_damaged(name: str, part: int, originals: dict[str, bytes], tmp_path: Path) -> None:
    check_one = tmp_path / name
    if part == 0:
        check_one.write_bytes(originals[name])
        assert not isinstance(check(check_one), str), "the original itself is read"
    rng = random.Random(100 * ORIGINALS.index(name) + part)
    for _ in range(6):
        check_one.write_bytes(damaged(originals[name], rng))
        check(check_one)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".safetensors"])
def test_random_bytes(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"random{suffix}"
    rng = random.Random(suffix)
    starts = (
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04\x95",
        b"\x1f\x8b",
        struct.pack("<Q", 40) + b"{",
    )
    for start in starts:
        for size in (0, 1, 7, 8, 300, 70_000):
            path.write_bytes(start + rng.randbytes(size))
            assert isinstance(check(path), str)


class _Runs:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _raw(function: str, argument: str) -> bytes:
    """A pickle that calls module.name; Python's own pickler would refuse to write some of them."""
    module, _, name = function.rpartition(".")
    return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()


CALLS = (
    "os.system",
    "posix.system",
    "nt.system",
    "subprocess.call",
    "subprocess.Popen",
    "builtins.eval",
)
CALLS += (
    "builtins.exec",
    "builtins.open",
    "builtins.getattr",
    "builtins.__import__",
    "shutil.rmtree",
)
CALLS += (
    "pickle.loads",
    "marshal.loads",
    "types.CodeType",
    "importlib.import_module",
    "runpy.run_path",
)
CALLS += (
    "operator.attrgetter",
    "functools.partial",
    "webbrowser.open",
    "socket.socket",
    "pty.spawn",
)
CALLS += (
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.serialization.load",
    "numpy.load",
)
CALLS += ("torch._utils._rebuild_tensor", "care_compress.cli.main", "code.interact", "ctypes.CDLL")
CALLS += ("os.system\x1b[2J", "[bold]os.system", "a" * 5000, "os.\nsystem", "é.ü")


@pytest.mark.parametrize("wrapped", ["bare", "in a zip", "in a state dict"])
def test_pickles_that_would_run_code(wrapped: str, tmp_path: Path, state: State) -> None:
    path = tmp_path / "hostile.pth"
    for call in CALLS:
        content = _raw(call, f"touch {tmp_path}/pwned")
        if wrapped == "in a zip":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("archive/data.pkl", content)
                archive.writestr("archive/version", "3\n")
                archive.writestr("archive/byteorder", "little")
            content = buffer.getvalue()
        elif wrapped == "in a state dict":
            content = b"\x80\x02}(X\x01\x00\x00\x00w" + content[:-1] + b"u."
        path.write_bytes(content)
        assert isinstance(check(path), str), f"{call} was read"
    assert not (tmp_path / "pwned").exists()


def test_what_python_pickles_and_runs(tmp_path: Path, state: State) -> None:
    """The very objects that run when `pickle.load` reads them; here they do not."""
    ran = tmp_path / "pwned"
    chain = _Runs(getattr, _Runs(__import__, "os"), "system")
    for hostile in (
        _Runs(os.system, f"touch {ran}"),
        _Runs(exec, f"open({str(ran)!r}, 'w')"),
        _Runs(open, str(ran), "w"),
        _Runs(os.mkdir, str(ran)),
        _Runs(print, chain),
        _Runs(type, "X", (), {}),
        _Runs(collections.deque, [1]),
        argparse.Namespace(func=_Runs(os.system, f"touch {ran}")),
    ):
        for content in (hostile, {"state_dict": state, "args": hostile}, [hostile], {"w": hostile}):
            torch.save(content, tmp_path / "hostile.pth")
            assert isinstance(check(tmp_path / "hostile.pth"), str)
            (tmp_path / "bare.pt").write_bytes(pickle.dumps(content))
            assert isinstance(check(tmp_path / "bare.pt"), str)
    assert not ran.exists()
    with pytest.raises(UnsafeCheckpointError, match="system"):
        torch.save({"x": _Runs(os.system, "true")}, tmp_path / "named.pth")
        load_checkpoint(tmp_path / "named.pth")


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def wrong_states(state: State) -> dict[str, Any]:
    """Things that `torch.save` writes and that are no weights of a CARE."""
    first = next(name for name, value in state.items() if value.dim() == 4)
    weight = state[first]
    big = torch.zeros(1).as_strided((1 << 40,), (0,))

    def having(**changes: Any) -> State:
        return {**state, **{name.replace("__", "."): value for name, value in changes.items()}}

    head = "head.fc.weight"
    counter = next(name for name in state if name.endswith("num_batches_tracked"))
    variance = next(name for name in state if name.endswith("running_var"))
    wrong: dict[str, Any] = {
        "nothing": {},
        "None": None,
        "a number": 3,
        "a text": "weights",
        "a list": list(state.values()),
        "a tensor": weight,
        "a module's attributes": {"state_dict": {"state_dict": state}},
        "an empty state": {"state_dict": {}},
        "numbers as names": dict(enumerate(state.values())),
        "tuples as names": {(name, 1): value for name, value in state.items()},
        "only the prefix": {"module.": weight},
        "a prefix a thousand times": {"module." * 1200 + n: v for n, v in state.items()},
        "numpy arrays": {name: np.zeros(3) for name in state},
        "extra": having(other__weight=weight),
        "a hostile name": having(**{"\x1b[2J[bold]": weight}),
        "a long name": having(**{"n" * 100_000: weight}),
        "nested deeply": {"state_dict": state, "args": _nested(150)},
        "an ordered dict": collections.OrderedDict(state),
        "a list inside": {**state, first: [1, 2]},
    }
    for name, value in {
        "missing": None,
        "transposed": weight.transpose(0, 1),
        "flat": weight.reshape(-1),
        "a scalar": torch.tensor(1.0),
        "no values": torch.zeros(0),
        "no values of that size": torch.zeros(weight.shape[0], 0, *weight.shape[2:]),
        "NaN": torch.full_like(weight, float("nan")),
        "infinite": torch.full_like(weight, float("inf")),
        "float64": weight.double() * 1e300,
        "float16": weight.half(),
        "bfloat16": weight.bfloat16(),
        "float8": weight.to(torch.float8_e4m3fn),
        "int8": weight.to(torch.int8),
        "bool": weight > 0,
        "complex": weight.to(torch.complex64),
        "quantized": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "sparse": weight.to_sparse(),
        "on meta": weight.to("meta"),
        "one number for all": torch.zeros(1).expand(weight.shape),
        "a trillion": big,
        "with a gradient": torch.nn.Parameter(weight),
        "conjugated": torch.conj(weight.to(torch.complex64)),
        "65 dimensions": weight.reshape(weight.shape + (1,) * 60),
    }.items():
        changed = dict(state)
        if value is None:
            del changed[first]
        else:
            changed[first] = value
        wrong[f"{name} in {first}"] = changed
    for name, value in {
        "no class": state[head][:0],
        "one dimension": state[head][0],
        "a trillion classes": torch.zeros(1).as_strided((1 << 40, state[head].shape[1]), (0, 0)),
        "other classes than the bias": torch.zeros(9, state[head].shape[1]),
    }.items():
        wrong[f"a head of {name}"] = {**state, head: value}
    for name, value in {
        "a float": torch.tensor(float("nan")),
        "complex": torch.tensor(1j),
        "many": torch.zeros(1 << 12),
        "a trillion": big,
        "sparse": torch.zeros(1).to_sparse(),
        "a text": "7",
        "a bool": torch.tensor(True),
    }.items():
        wrong[f"a counter that is {name}"] = {**state, counter: value}
    wrong["a negative variance"] = {**state, variance: -state[variance] - 1}
    return wrong


def test_wrong_tensors(tmp_path: Path, state: State) -> None:
    path = tmp_path / "wrong.pth"
    for name, content in wrong_states(state).items():
        torch.save(content, path)
        found = check(path)
        fits = (
            "float16",
            "bfloat16",
            "gradient",
            "ordered",
            "nested",
            "one number",
            "prefix a",
        )
        assert isinstance(found, str) or any(part in name for part in fits), name


def _safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


QUANTIZED = "care_compress_quantized"


def lying_headers() -> dict[str, bytes]:
    deep = b"[" * 100_000 + b"]" * 100_000
    about = {"arch": "care_nano", "num_classes": 3, "resolution": 32, "rewrite": {}, "quantize": {}}
    found = {
        "nothing": b"",
        "a length alone": struct.pack("<Q", 8),
        "a huge length": _safetensors({}, length=1 << 62),
        "the hugest length": _safetensors({}, length=(1 << 64) - 1),
        "a length of 90 MB": _safetensors({}, length=90_000_000),
        "one byte too long": _safetensors({}, length=3),
        "no JSON": _safetensors(b"{{{{"),
        "no UTF-8": _safetensors(b"\xff\xfe{}"),
        "deep JSON": _safetensors(deep),
        "a list": _safetensors([1]),
        "empty": _safetensors({}),
        "a key twice": _safetensors(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2 + b'"b":1}'
        ),
        "beyond the end": _safetensors({"w": _entry(offsets=(0, 1 << 40))}, bytes(4)),
        "backwards": _safetensors({"w": _entry(offsets=(4, 0))}, bytes(4)),
        "overlapping": _safetensors({"a": _entry(), "b": _entry(offsets=(2, 6))}, bytes(6)),
        "the same place": _safetensors({"a": _entry(), "b": _entry()}, bytes(4)),
        "with a hole": _safetensors({"a": _entry(), "b": _entry(offsets=(8, 12))}, bytes(12)),
        "unused bytes": _safetensors({"w": _entry()}, bytes(400)),
        "a negative offset": _safetensors({"w": _entry(offsets=(-4, 0))}, bytes(4)),
        "a fraction": _safetensors({"w": _entry(offsets=(0.5, 4))}, bytes(4)),
        "a shape that overflows": _safetensors({"w": _entry(shape=[1 << 32, 1 << 32])}, bytes(4)),
        "a negative shape": _safetensors({"w": _entry(shape=[-1])}, bytes(4)),
        "a shape that is too large": _safetensors({"w": _entry(shape=[1000])}, bytes(4)),
        "an empty shape": _safetensors({"w": _entry(shape=[])}, bytes(4)),
        "10,000 dimensions": _safetensors({"w": _entry(shape=[1] * 10_000)}, bytes(4)),
        "an unknown dtype": _safetensors({"w": _entry("F33")}, bytes(4)),
        "complex": _safetensors({"w": _entry("C64", offsets=(0, 8))}, bytes(8)),
        "bool": _safetensors({"w": _entry("BOOL", offsets=(0, 1))}, bytes(1)),
        "float8": _safetensors({"w": _entry("F8_E8M0", offsets=(0, 1))}, bytes(1)),
        "float4": _safetensors({"w": _entry("F4", shape=[2], offsets=(0, 1))}, bytes(1)),
        "metadata alone": _safetensors({"__metadata__": {"a": "b"}}),
        "metadata that is none": _safetensors({"__metadata__": 3}),
        "metadata of numbers": _safetensors({"__metadata__": {"a": 1}}),
        "a hostile name": _safetensors({"\x1b[2J[bold]": _entry()}, bytes(4)),
    }
    said: dict[str, Any] = {
        "is no JSON": "{",
        "is null": "null",
        "is a list": "[1]",
        "is deep": deep.decode(),
        "is empty": "{}",
        "has no rules": json.dumps(about),
        "has another arch": json.dumps({**about, "arch": "../../x"}),
        "has a billion classes": json.dumps(
            {**about, "num_classes": 10**9, "quantize": {"rules": [{"weight": 8}]}}
        ),
        "has no class": json.dumps({**about, "num_classes": 0}),
        "has a huge resolution": json.dumps({**about, "resolution": 10**6}),
        "has no number": json.dumps({**about, "num_classes": "3"}),
        "has NaN": json.dumps({**about, "resolution": float("nan")}),
        "has no weights": json.dumps({**about, "quantize": {"rules": [{"weight": 8}]}}),
        "has a rule for nothing": json.dumps(
            {**about, "quantize": {"rules": [{"site": "x", "weight": 8}]}}
        ),
        "has another target": json.dumps(
            {**about, "quantize": {"target": "../x", "rules": [{"weight": 8}]}}
        ),
    }
    for name, text in said.items():
        found[f"a quantized header that {name}"] = _safetensors({"__metadata__": {QUANTIZED: text}})
    return found


@pytest.mark.parametrize("name", lying_headers())
def test_lying_safetensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lying.safetensors"
    path.write_bytes(lying_headers()[name])
    assert isinstance(check(path), str)


def test_wrong_tensors_in_safetensors(tmp_path: Path, state: State) -> None:
    path = tmp_path / "wrong.safetensors"
    for name, value in wrong_states(state).items():
        plain = isinstance(value, dict) and all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided
            and not v.is_quantized and v.device.type == "cpu" and v.numel() < 1 << 30
            and not v.is_conj()
            for k, v in value.items()
        )  # fmt: skip
        if plain and "dimensions" not in name:
            path.write_bytes(
                save_safetensors({k: v.detach().clone().contiguous() for k, v in value.items()})
            )
            check(path)


def test_zips_that_unpack_to_more(tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte, as weights and as the pickle itself."""
    path = tmp_path / "bomb.pth"
    zeros = bytes(1 << 20)
    for name in ("archive/data.pkl", "archive/data/0", "archive/other", "x"):
        for count in (300, 1000):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/version", "3\n")
                with archive.open(name, "w", force_zip64=True) as file:
                    for _ in range(count):
                        file.write(zeros)
            assert isinstance(check(path), str)
    inner = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", inner)
    assert isinstance(check(path), str)


def test_storages_that_promise_more(tmp_path: Path) -> None:
    """Legacy pickles allocate what they promise before they read it."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    rng = random.Random(1)
    for wanted in (1 << 20, 1 << 31, 1 << 40, 1 << 62):
        long = pickle.dumps(wanted, protocol=2)[2:-1]
        for marker in (b"K\x04", b"J\x04\x00\x00\x00", b"\x04\x00\x00\x00\x00\x00\x00\x00"):
            (tmp_path / "promise.pt").write_bytes(content.replace(marker, long))
            check(tmp_path / "promise.pt")
    for opcode in (
        b"\x8c",
        b"X\xff\xff\xff\x7f",
        b"\x8d" + b"\xff" * 8,
        b"T\xff\xff\xff\x7f",
        b"\x95" + b"\xff" * 8,
    ):
        (tmp_path / "promise.pt").write_bytes(b"\x80\x02" + opcode + rng.randbytes(40))
        assert isinstance(check(tmp_path / "promise.pt"), str)


def test_what_is_no_checkpoint(tmp_path: Path, originals: dict[str, bytes]) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "endless.pth").symlink_to("/dev/zero")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    names = [
        str(tmp_path / entry)
        for entry in ("pipe.pth", "folder.pth", "endless.pth", "loop.safetensors")
    ]
    names += [
        "",
        "a\0b.pth",
        "x" * 5000 + ".pth",
        "~nobody-at-all/x.pth",
        "builtin:",
        "builtin:../x",
        "builtin:\0",
    ]
    for name in [*names, "\udc80.pth", "\x1b[2J.pth"]:
        assert isinstance(CASES.attempt(lambda name=name: load_checkpoint(name)), str)  # type: ignore[misc]
        assert isinstance(CASES.attempt(lambda name=name: open_predictor(name, CPU)), str)  # type: ignore[misc]
    crossed = {
        "zip.safetensors": "zip.pth",
        "plain.pth": "plain.safetensors",
        "quantized.pt": "quantized.safetensors",
    }
    for wrong, name in crossed.items():
        (tmp_path / wrong).write_bytes(originals[name])
        assert isinstance(check(tmp_path / wrong), str)
    for mode in ("w", "w:gz"):
        with tarfile.open(tmp_path / "archive.pth.tar", mode) as tar:
            tar.add(Path(__file__), "storages")
        assert isinstance(check(tmp_path / "archive.pth.tar"), str)


def test_the_command_line_says_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    originals: dict[str, bytes],
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(5)
    files = {
        "hostile.pth": _raw("os.system", "touch pwned"),
        "named.pth": _raw("os.\x1b[2Jsystem", "touch pwned"),
        "cut.pth": originals["zip.pth"][:5000],
        "cut.safetensors": originals["plain.safetensors"][:5000],
        "empty.pth": b"",
        "random.pt": rng.randbytes(999),
        "random.safetensors": rng.randbytes(999),
        "\x1b[2J[bold]\n.pth": b"x",
        **{f"lying{n}.safetensors": b for n, b in enumerate(list(lying_headers().values())[:12])},
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
        for verb in (
            ["plan", "int8_ptq", "--ckpt", name],
            ["accuracy", name, "--data", "builtin:shapes", "--res", "32"],
        ):

            def run(verb: list[str] = verb) -> int:
                with pytest.raises(SystemExit) as ended:
                    main(verb)
                return int(str(ended.value.code))

            with sealed(Path(tempfile.gettempdir())):
                assert CASES.attempt(run) == 2
            out, err = capfd.readouterr()
            assert out == "" and err.count("\n") == 1 and "CheckpointError: " in err, (
                name,
                out,
                err,
            )
            assert obeyed(err[:-1]) == "" and len(err) < LONGEST_LINE
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(files)
    with pytest.raises(CheckpointError):
        main(["plan", "int8_ptq", "--ckpt", "empty.pth", "--debug"])


def test_there_were_enough_cases() -> None:
    CASES.assert_enough()
