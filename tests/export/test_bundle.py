import ast
import dataclasses
import io
import json
import os
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from comparison import engine_speed
from qdq import make_content

from care_compress import device
from care_compress.device.manifest import open_bundle
from care_compress.errors import CareError
from care_compress.evaluate.device_measurements import DeviceResultsError, import_results
from care_compress.export.bundle import BundleContent, Runtime, device_script, write_bundle

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> BundleContent:
    return make_content(tmp_path_factory.mktemp("content"))


def test_equal_content_makes_equal_bytes(
    content: BundleContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_bundle(content, tmp_path / "a" / "one.tar.gz").read_bytes()
    (tmp_path / "b").mkdir()
    moved = make_content(tmp_path / "b")
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    mask = os.umask(0o077)
    try:
        second = write_bundle(moved, tmp_path / "c" / "two.tar.gz").read_bytes()
    finally:
        os.umask(mask)
    assert first == second
    changed = dataclasses.replace(content, fingerprint="0" * 64)
    assert write_bundle(changed, tmp_path / "three.tar.gz").read_bytes() != first


def test_a_bundle_holds_what_a_board_needs_and_nothing_of_this_machine(
    content: BundleContent, tmp_path: Path
) -> None:
    archive = write_bundle(content, tmp_path / "bundle.tar.gz")
    with tarfile.open(archive) as file:
        members = {member.name: member for member in file.getmembers()}
        file.extractall(tmp_path, filter="data")
    folder = tmp_path / "mine-tensorrt-orin"
    assert {name.removeprefix("mine-tensorrt-orin/") for name in members} == {
        "README.md",
        "care_deploy.py",
        "manifest.json",
        "int8.onnx",
        "fp16.onnx",
        "samples/pixels.npy",
        "samples/labels.npy",
        "samples/logits_int8.npy",
        "samples/logits_fp16.npy",
        "examples/cpp/CMakeLists.txt",
        "examples/cpp/main.cpp",
        "examples/cpp/model.h",
        "examples/deepstream/labels.txt",
        "examples/deepstream/nvinfer_int8.txt",
        "examples/deepstream/nvinfer_fp16.txt",
        "examples/triton/care_int8/config.pbtxt",
        "examples/triton/care_int8/labels.txt",
        "examples/triton/care_fp16/config.pbtxt",
        "examples/triton/care_fp16/labels.txt",
        "examples/docker/Dockerfile",
    }
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members.values()} == {
        (0, 0, 0, "", "")
    }
    assert members["mine-tensorrt-orin/care_deploy.py"].mode == 0o755
    assert members["mine-tensorrt-orin/int8.onnx"].mode == 0o644
    bundle = open_bundle(folder, ("tensorrt",))
    assert bundle.models == ("fp16", "int8")
    assert np.array_equal(bundle.array("pixels"), content.pixels)
    assert np.array_equal(bundle.array("logits_int8"), content.logits["int8"])
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files - set(bundle.manifest["files"]) == {"manifest.json"}
    readme = (folder / "README.md").read_text()
    for verb in ("build", "verify", "bench"):
        assert f"\n    python3 care_deploy.py {verb}\n" in readme
    assert "{" not in readme
    assert len(readme.splitlines()) < 110
    made = (str(path.relative_to(folder)) for path in folder.glob("examples/**/*.*"))
    for name in ("README.md", "manifest.json", "care_deploy.py", *made):
        content_of = (folder / name).read_bytes()
        assert (
            str(Path.home()).encode() not in content_of and str(tmp_path).encode() not in content_of
        )
    assert list(tmp_path.glob(".*.tmp")) == []


def scripts() -> dict[str, dict[str, str]]:
    """The modules in each script, by runtime and path."""
    found = {}
    for runtime in get_args(Runtime):
        with zipfile.ZipFile(io.BytesIO(device_script(runtime))) as archive:
            found[runtime] = {name: archive.read(name).decode() for name in archive.namelist()}
    return found


@pytest.mark.parametrize("runtime", get_args(Runtime))
def test_the_one_file_is_python_3_10_and_needs_no_more_than_numpy(runtime: Runtime) -> None:
    assert device_script(runtime) == device_script(runtime)
    modules = scripts()[runtime]
    source = "".join(modules.values())
    assert ("cudaMalloc" in source) == (runtime == "tensorrt"), "no code that cannot be used"
    at_top, anywhere = set(), set()
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text, feature_version=(3, 10))):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                ours = f"{(node.module or '').replace('.', '/')}.py"
                assert not ours.startswith("care_compress") or ours in modules, (name, ours)
                names = {(node.module or "").split(".")[0]}
            else:
                continue
            anywhere |= names
            if node.col_offset == 0:
                at_top |= names
        # Annotations of numpy's own cannot be evaluated by the numpy of JetPack 6.
        assert "NDArray" not in text or "from __future__ import annotations" in text, name
    others = anywhere - set(sys.stdlib_module_names)
    assert others == {"numpy", "PIL", "care_compress"}
    assert "PIL" not in at_top
    # What came after Python 3.10 and a 3.11 interpreter would not notice.
    for newer in ("tomllib", "StrEnum", "ExceptionGroup", "datetime.UTC", "Self"):
        assert newer not in source


def test_every_module_for_devices_is_in_a_script() -> None:
    here = Path(device.__file__).parent
    packed = {Path(name).name for modules in scripts().values() for name in modules}
    assert {path.name for path in here.glob("*.py")} <= packed, "no one imports it"


@pytest.fixture
def measured() -> dict[str, Any]:
    """results.json of a board, as `verify` and `bench` leave it."""
    return {
        "format": 2,
        "kind": "care-deploy-results",
        "target": "tensorrt-orin",
        "run": "mine",
        "recipe": "int8",
        "fingerprint": "f" * 64,
        "bundle_sha256": DIGEST,
        "board": {
            "name": "NVIDIA Jetson AGX Orin Developer Kit",
            "gpu": {"name": "Orin", "compute_capability": "8.7"},
            "library": "tensorrt",
            "library_version": "10.3.0.30",
            "cuda": {"runtime": "12.6", "driver": "12.6"},
            "l4t": "36.4.3",
            "jetpack": "6.2",
            "jetpack_from": "package",
            "container": False,
            "python": "3.10.12",
            "architecture": "aarch64",
        },
        "models": {
            "int8": {
                "onnx_sha256": DIGEST,
                "engine_sha256": DIGEST,
                "size_bytes": 1000,
                "layers_from": "engine",
                "precisions": {"INT8": 3},
                "speed": {**engine_speed(1.25), "measured_at": "2026-11-20T10:00:00+00:00"},
            }
        },
        "measured_at": "2026-11-20T10:00:00+00:00",
    }


def take_home(measured: object, folder: Path, export: object = None) -> dict[str, Any]:
    file = folder / "results.json"
    file.write_text(measured if isinstance(measured, str) else json.dumps(measured))
    run_dir = folder / "mine"
    exported = run_dir / "exports" / "tensorrt-orin" / "export.json"
    exported.parent.mkdir(parents=True)
    if export is not None:
        exported.write_text(json.dumps(export))
    return import_results(file, run_dir)


@pytest.mark.parametrize(
    "export", [None, {}, {"fingerprint": "f" * 64, "models": {"int8": {"sha256": DIGEST}}}]
)
def test_a_boards_results_are_kept_under_its_name(
    measured: dict[str, Any], tmp_path: Path, export: object
) -> None:
    value = take_home(measured, tmp_path, export)
    board = "tensorrt-orin.nvidia-jetson-agx-orin-developer-kit"
    stored = tmp_path / f"mine/measured/{board}.maxn.json"
    assert json.loads(stored.read_text()) == value
    assert value["models"]["int8"]["speed"]["latency_ms"]["p99"] == 1.5
    measured["board"]["name"] = "NVIDIA Jetson Orin Nano"
    file = tmp_path / "results.json"
    file.write_text(json.dumps(measured))
    import_results(file, tmp_path / "mine")
    measured["models"]["int8"]["speed"]["during"]["power_mode"] = "15W"
    file.write_text(json.dumps(measured))
    import_results(file, tmp_path / "mine")
    assert len(list(stored.parent.iterdir())) == 3, "another board, and another power mode of it"


def edited(measured: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    at: Any = measured
    *folders, last = path.split(".")
    for key in folders:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return measured


SPEED = "models.int8.speed"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("kind", "care-engine", "kind"),
        ("format", 1, "format"),
        ("board", None, "board"),
        ("fingerprint", None, "fingerprint"),
        ("models", {}, "models"),
        ("models.int8.onnx_sha256", "abc", "onnx_sha256"),
        (f"{SPEED}.latency_ms.p50", float("nan"), "p50"),
        (f"{SPEED}.latency_ms.p50", float("inf"), "p50"),
        (f"{SPEED}.latency_ms.p90", None, "p90"),
        (f"{SPEED}.latency_ms.p99", "1.5", "p99"),
        (f"{SPEED}.throughput", -1.0, "throughput"),
        (f"{SPEED}.extra", 1, "extra"),
        ("target", "../../elsewhere", "no target's name"),
        ("run", "another", "another"),
    ],
)
def test_results_that_are_none_are_refused(
    measured: dict[str, Any], tmp_path: Path, path: str, value: object, words: str
) -> None:
    with pytest.raises(DeviceResultsError, match=words) as error:
        take_home(edited(measured, path, value), tmp_path)
    assert error.value.fix and isinstance(error.value, CareError)
    assert not (tmp_path / "mine" / "measured").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DeviceResultsError):
        take_home(text, tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceResultsError, match="none.json"):
        import_results(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(
    ("export", "words"),
    [
        ({"fingerprint": "e" * 64}, "another export"),
        ({"models": {"int8": {"sha256": "f" * 64}}}, "another graph"),
    ],
)
def test_results_of_another_export_are_refused(
    measured: dict[str, Any], tmp_path: Path, export: object, words: str
) -> None:
    with pytest.raises(DeviceResultsError, match=words):
        take_home(measured, tmp_path, export)
