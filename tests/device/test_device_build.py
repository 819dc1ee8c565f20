import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakeboard import SURFACES, FakeGpu, fake_library
from qdq import SIDE, write_classifier

from care_compress.device.build import RTX_COMPUTE_CAPABILITIES, BuildOptions, build_engine
from care_compress.device.cuda import CudaGpu, load_cuda
from care_compress.device.deploy import build_file
from care_compress.device.enginefile import EngineOrigin, origin_path, read_engine, write_engine
from care_compress.device.layers import parse_inspector
from care_compress.device.library import Log, load_library, required_library, wrap_library
from care_compress.device.manifest import satisfies, version_numbers
from care_compress.device.problems import (
    BuildFailedError,
    DeployError,
    EngineMismatchError,
    TensorRtMissingError,
    UntypedModelError,
)
from care_compress.device.storage import digest_file


def quiet(phase: str, done: float | None) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def rtx() -> Any:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return load_library("tensorrt_rtx")


@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_nvidias_compiler_takes_the_graph_without_a_gpu(
    rtx: Any, tmp_path: Path, precision: str, batch: int | str
) -> None:
    onnx = write_classifier(tmp_path / "m.onnx", int8=precision == "int8", batch=batch)
    seen: list[float] = []

    def notify(phase: str, done: float | None) -> None:
        if done is not None:
            seen.append(done)

    engine = tmp_path / "m.engine"
    sizes = (1, 2, 4) if batch == "batch" else None
    options = BuildOptions(precision, batch=sizes, timing_cache=tmp_path / "cache")
    about = build_file(rtx, None, onnx, digest_file(onnx), engine, options, notify)
    assert about["engine_sha256"] == digest_file(engine)
    assert about["compute_capabilities"] == list(RTX_COMPUTE_CAPABILITIES)
    # The kernels of the compiled engine, without a GPU to load it.
    assert about["layers_from"] == "engine"
    stem = next(row for row in about["layers"] if "stem" in row["origin"])
    assert {row["precision"] for row in about["layers"]} >= {precision.upper()}, stem
    moved = about["traffic"]
    assert moved["kernels"] == len(about["layers"])
    assert moved["constant_bytes"] > 0 < moved["activation_bytes"]
    assert seen == sorted(seen) and seen[-1] > 0.5
    assert not (tmp_path / "cache").exists()  # with one, the compiler would ask for a GPU
    plan, _ = read_engine(engine, rtx, CudaGpu("a desktop", "8.9"), digest_file(onnx))
    assert plan == engine.read_bytes()


def test_the_parsers_reason_reaches_the_user(rtx: Any, tmp_path: Path) -> None:
    onnx = write_classifier(tmp_path / "m.onnx", int8=True, zero_point=3)
    with pytest.raises(UntypedModelError, match="node q: .*zero point is not supported") as error:
        build_engine(rtx, onnx, BuildOptions("int8"), quiet)
    assert "symmetric" in error.value.fix


def test_a_cut_graph_is_named_and_leaves_no_engine(rtx: Any, tmp_path: Path) -> None:
    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    onnx.write_bytes(onnx.read_bytes()[:500])
    with pytest.raises(UntypedModelError, match="m.onnx"):
        build_file(rtx, None, onnx, "", tmp_path / "m.engine", BuildOptions("int8"), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_compiler_that_fails_is_named_and_leaves_no_engine(rtx: Any, tmp_path: Path) -> None:
    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    # tensorrt-rtx has no lean runtime to put into a version-compatible engine.
    options = BuildOptions("int8", version_compatible=True)
    with pytest.raises(BuildFailedError, match="lean") as error:
        build_file(rtx, None, onnx, "", tmp_path / "m.engine", options, quiet)
    assert "--version-compatible" in error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("capability", ["8.7", "10.0"])
def test_a_gpu_the_compiler_does_not_know_is_named(
    rtx: Any, tmp_path: Path, capability: str
) -> None:
    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    options = BuildOptions("int8", compute_capabilities=(capability,))
    with pytest.raises(BuildFailedError, match=capability):
        build_engine(rtx, onnx, options, quiet)


def test_a_killed_build_leaves_no_engine(rtx: Any, tmp_path: Path) -> None:
    write_classifier(tmp_path / "m.onnx", int8=True)
    program = (
        "import sys, time; from pathlib import Path\n"
        "from care_compress.device import build, deploy, enginefile, library, storage\n"
        "real = storage.os.fsync\n"
        "def slow(handle):\n"
        "    print('writing', flush=True); time.sleep(60)\n"
        "storage.os.fsync = slow\n"
        "folder = Path(sys.argv[1])\n"
        "deploy.build_file(library.load_library('tensorrt_rtx'), None, folder / 'm.onnx', '',\n"
        "    folder / 'm.engine', build.BuildOptions('int8'), lambda phase, done: None)\n"
    )
    here = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(here)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "m.engine").exists()
    assert not (tmp_path / "m.engine.json").exists()


@pytest.mark.parametrize(
    ("claim", "int8", "half", "words"),
    [
        ("int8", False, True, "no QuantizeLinear"),
        ("fp16", False, False, "no FP16 tensor"),
    ],
)
def test_a_graph_of_another_precision_than_it_claims_is_refused(
    tmp_path: Path, claim: str, int8: bool, half: bool, words: str
) -> None:
    onnx = write_classifier(tmp_path / "m.onnx", int8=int8, half=half)
    with pytest.raises(UntypedModelError, match=words):
        build_engine(fake_library("11.4.1.5", FakeGpu()), onnx, BuildOptions(claim), quiet)


@pytest.mark.parametrize("version", SURFACES)
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_each_version_is_asked_in_its_own_words(
    tmp_path: Path, version: str, precision: str
) -> None:
    library = fake_library(version, FakeGpu())
    module = library.module
    onnx = write_classifier(tmp_path / "m.onnx", int8=precision == "int8", batch="batch")
    cache = tmp_path / "timing.cache"
    options = BuildOptions(
        precision,
        optimization_level=4,
        workspace_mib=256,
        strip_plan=True,
        timing_cache=cache,
        batch=(1, 2, 4),
    )
    with pytest.MonkeyPatch.context() as patch:
        # The fake engine has fixed shapes only; what is asked of the builder is the point here.
        patch.setattr(module, "Runtime", lambda logger: _NoRuntime())
        built = build_engine(library, onnx, options, quiet)
    flags = {flag.name for (flag,) in module.done["set_flag"]}
    strongly = module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert module.done["network"] == 1 << int(strongly)
    assert flags == {"STRIP_PLAN", "REFIT_IDENTICAL"}
    assert not any("permission" in warning for warning in built.warnings)
    assert all(layer.precision is None for layer in module.layers)
    assert module.done["avg_timing_iterations"] == 8
    assert module.done["builder_optimization_level"] == 4
    assert module.done["set_memory_pool_limit"] == [(module.MemoryPoolType.WORKSPACE, 256 << 20)]
    shapes = [(size, 3, SIDE, SIDE) for size in (1, 2, 4)]
    assert module.done["set_shape"] == [("image", *shapes)]
    assert module.done["profiling_verbosity"] is module.ProfilingVerbosity.DETAILED
    assert cache.read_bytes() == b"timings"
    assert built.layers_from == "network"


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_without_strong_typing_what_is_float32_is_held_there(
    tmp_path: Path, precision: str
) -> None:
    library = fake_library("10.3.0.30", FakeGpu())
    module = library.module
    module.NetworkDefinitionCreationFlag = type("Flags", (), {})
    onnx = write_classifier(tmp_path / "m.onnx", int8=precision == "int8", core=True)
    built = build_engine(library, onnx, BuildOptions(precision), quiet)
    assert module.done["network"] == 0
    flags = {flag.name for (flag,) in module.done["set_flag"]}
    assert flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS"} | ({"INT8"} & {precision.upper()})
    held = {layer.name: layer.output_types for layer in module.layers if layer.precision}
    assert held == {"core": {0: "float32"}}, "the casts say their types themselves"
    assert any("1 layers are held in float32" in warning for warning in built.warnings)


def test_a_builder_that_times_once_only_is_left_alone(tmp_path: Path) -> None:
    library = fake_library("10.16.1.11", FakeGpu())
    library.module._surface["IBuilderConfig"].remove("avg_timing_iterations")
    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    try:
        build_engine(library, onnx, BuildOptions("int8"), quiet)
    finally:
        library.module._surface["IBuilderConfig"].append("avg_timing_iterations")
    assert "avg_timing_iterations" not in library.module.done


class _NoRuntime:
    engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> None:
        return None


@pytest.mark.parametrize("stored", [b"", b"of another version", b"timings"])
def test_a_timing_cache_that_does_not_fit_is_replaced(tmp_path: Path, stored: bytes) -> None:
    library = fake_library("10.16.1.11", FakeGpu())
    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    cache = tmp_path / "timing.cache"
    cache.write_bytes(stored)
    build_engine(library, onnx, BuildOptions("int8", timing_cache=cache), quiet)
    used = library.module.done["timing_cache"].stored
    assert used == (stored if stored == b"timings" else b"")
    assert cache.read_bytes() == b"timings"


def test_the_first_error_is_the_reason_and_memory_has_its_own_fix(tmp_path: Path) -> None:
    library = fake_library("10.13.3.9", FakeGpu())
    library.module.fails_with = "Error Code 2: OutOfMemory (no memory for tactic)"
    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    with pytest.raises(BuildFailedError, match="OutOfMemory") as error:
        build_engine(library, onnx, BuildOptions("int8"), quiet)
    assert "--workspace" in error.value.fix


def test_a_builder_that_is_interrupted_stops(tmp_path: Path) -> None:
    def interrupted(phase: str, done: float | None) -> None:
        if done is not None and done > 0.4:
            raise KeyboardInterrupt

    library = fake_library("11.4.1.5", FakeGpu())
    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    with pytest.raises(KeyboardInterrupt):
        build_engine(library, onnx, BuildOptions("int8"), interrupted)


def test_a_flag_that_a_version_lacks_is_named(tmp_path: Path) -> None:
    library = fake_library("11.4.1.5", FakeGpu())
    library.module.BuilderFlag = type("BuilderFlag", (), {})
    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    with pytest.raises(BuildFailedError, match="has no VERSION_COMPATIBLE"):
        build_engine(library, onnx, BuildOptions("int8", version_compatible=True), quiet)


def test_versions_are_read_and_compared_by_number() -> None:
    assert version_numbers("10.3.0.30.post1") == (10, 3, 0, 30)
    assert satisfies((10, 16, 1), "tensorrt>=10.3,<12")
    assert satisfies((10, 3, 0, 30), "tensorrt>=10.3,<12")
    assert not satisfies((10, 2, 9), "tensorrt>=10.3,<12")
    assert not satisfies((12, 0), "tensorrt>=10.3,<12")
    assert not satisfies((9,), "tensorrt>=10.3")
    assert required_library("tensorrt-rtx>=1.7,<2") == "tensorrt_rtx"
    with pytest.raises(TensorRtMissingError, match="numpy"):
        required_library("numpy>=2")
    with pytest.raises(TensorRtMissingError, match="too old"):
        wrap_library(object(), "tensorrt", "8.6.1")
    with pytest.raises(TensorRtMissingError, match="cannot be imported"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "tensorrt", None)
            load_library("tensorrt")


def test_each_failure_has_its_own_reason() -> None:
    log = Log()
    log.add("ERROR", "first\n  line")
    log.add("INTERNAL_ERROR", "what came of it")
    assert log.reason() == "first line"
    log.add("ERROR", "second")
    assert log.reason() == "second"
    assert log.reason() == "TensorRT gave no reason"
    for _ in range(2):
        log.add("WARNING", "once")
        log.add("INFO", "never")
    assert log.warnings == ["once"]


def test_a_failed_rewrite_does_not_pass_for_the_old_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "int8.engine"
    write_engine(engine, b"plan", _origin(), {})

    def full(path: Path, value: object) -> None:
        raise DeployError("the disk is full.")

    monkeypatch.setattr("care_compress.device.enginefile.write_json_whole", full)
    with pytest.raises(DeployError):
        write_engine(engine, b"other plan", _origin(), {})
    assert not origin_path(engine).exists()


# Recorded: the inspector of TensorRT 10 and of 11, and one without DETAILED verbosity.
_TEN = {
    "Layers": [
        {
            "Name": "stages.0.conv + stages.0.act",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "x",
                    "Dimensions": [1, 32, 56, 56],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
                }
            ],
            "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16 format"}],
            "Metadata": "[ONNX Layer: conv_1]\x1f[ONNX Layer: relu_1]\x1f[ONNX Layer: conv_1]",
        },
        {"Name": "copy", "LayerType": "Reformat", "Inputs": [], "Outputs": [], "Metadata": ""},
        {"Name": "stages.0.conv [profile 1]", "LayerType": "CaskConvolution"},
    ],
    "Bindings": ["image", "logits"],
}
_ELEVEN = {
    "Layers": [
        {
            "Name": "__myl_Fc",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Format": "Row major linear", "Datatype": "Half"}],
            "Outputs": [{"Name": "y", "Format": "Row major linear", "Datatype": "Float"}],
            "Metadata": "[ONNX Layer: head]",
        }
    ],
    "I/O Tensors": [{"Name": "image", "IOMode": "Input", "DataType": "Float"}],
}


def test_the_layers_of_both_inspectors_make_the_same_table() -> None:
    first, copy = parse_inspector(json.dumps(_TEN))
    assert (first.precision, first.output) == ("INT8", "FP16")
    assert first.origin == ("conv_1", "relu_1")
    assert copy.precision == "unknown"
    (gemm,) = parse_inspector(json.dumps(_ELEVEN))
    assert (gemm.precision, gemm.output, gemm.origin) == ("FP16", "FP32", ("head",))
    (plain,) = parse_inspector(json.dumps({"Layers": ["conv + relu"], "Bindings": []}))
    assert (plain.name, plain.precision, plain.origin) == (
        "conv + relu",
        "unknown",
        ("conv", "relu"),
    )


def _origin(**changes: Any) -> EngineOrigin:
    values = {
        "library": "tensorrt",
        "version": "10.3.0.30",
        "gpu": CudaGpu("Orin", "8.7"),
        "compute_capabilities": (),
        "onnx_sha256": "a",
        "version_compatible": False,
        "stripped": False,
    }
    return EngineOrigin(**{**values, **changes})


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (_origin(version="10.13.3.9"), "built by tensorrt 10.13.3.9; here is tensorrt 10.3.0.30"),
        (_origin(library="tensorrt_rtx", version="1.7"), "tensorrt_rtx"),
        (_origin(gpu=CudaGpu("Thor", "11.0")), "built for Thor"),
        (_origin(gpu=CudaGpu("Orin", "8.6")), "8.6"),
        (_origin(onnx_sha256="b"), "another ONNX"),
        (_origin(gpu=None, compute_capabilities=("8.9", "12.0")), "8.9, 12.0; Orin has 8.7"),
        (_origin(version="9.0", version_compatible=True), "9.0"),
        (_origin(version="10.13.3.9", version_compatible=True), "10.13.3.9"),
        (_origin(version="nonsense", version_compatible=True), "nonsense"),
    ],
)
def test_an_engine_that_cannot_run_here_is_refused_before_it_is_loaded(
    tmp_path: Path, origin: EngineOrigin, words: str
) -> None:
    engine = tmp_path / "int8.engine"
    write_engine(engine, b"plan", origin, {})
    with pytest.raises(EngineMismatchError, match=words) as error:
        read_engine(engine, fake_library("10.3.0.30", FakeGpu()), CudaGpu("Orin", "8.7"), "a")
    assert "build" in error.value.fix


@pytest.mark.parametrize(
    "origin",
    [
        _origin(),
        _origin(version="10.1.0", version_compatible=True),
        _origin(gpu=None, compute_capabilities=("8.6",)),
    ],
)
def test_an_engine_that_fits_is_read(tmp_path: Path, origin: EngineOrigin) -> None:
    engine = tmp_path / "int8.engine"
    write_engine(engine, b"plan", origin, {"precision": "int8"})
    library = fake_library("10.3.0.30", FakeGpu())
    assert read_engine(engine, library, CudaGpu("Orin", "8.7"), "a")[0] == b"plan"


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("10.3.0.30", "10.16.1.11", True),
        ("10.3.0.30", "11.4.1.5", True),
        ("11.4.1.5", "10.16.1.11", False),
        ("9.3.0", "11.4.1.5", False),
    ],
)
def test_a_version_compatible_engine_runs_where_nvidia_says_so(
    tmp_path: Path, built: str, here: str, runs: bool
) -> None:
    engine, library = tmp_path / "int8.engine", fake_library(here, FakeGpu())
    write_engine(engine, b"plan", _origin(version=built, version_compatible=True), {})
    if runs:
        assert read_engine(engine, library, CudaGpu("Orin", "8.7"), "a")[0] == b"plan"
    else:
        with pytest.raises(EngineMismatchError, match=built):
            read_engine(engine, library, CudaGpu("Orin", "8.7"), "a")


@pytest.mark.parametrize("damage", ["missing", "changed", "no description", "half a description"])
def test_a_damaged_engine_is_refused(tmp_path: Path, damage: str) -> None:
    engine = tmp_path / "int8.engine"
    write_engine(engine, b"plan", _origin(), {})
    if damage == "missing":
        engine.unlink()
    elif damage == "changed":
        engine.write_bytes(b"plam")
    elif damage == "no description":
        origin_path(engine).unlink()
    else:
        origin_path(engine).write_text(origin_path(engine).read_text()[:30])
    with pytest.raises(EngineMismatchError):
        read_engine(engine, fake_library("10.3.0.30", FakeGpu()), CudaGpu("Orin", "8.7"), "a")


@pytest.mark.gpu
def test_a_real_engine_runs(tmp_path: Path) -> None:
    from care_compress.device.session import Session

    try:
        cuda = load_cuda()
        library = load_library("tensorrt")
    except DeployError as error:
        pytest.skip(str(error))
    import numpy as np
    import onnxruntime

    onnx = write_classifier(tmp_path / "m.onnx", int8=True)
    engine = tmp_path / "m.engine"
    digest = digest_file(onnx)
    build_file(library, cuda.gpu(), onnx, digest, engine, BuildOptions("int8"), quiet)
    plan, about = read_engine(engine, library, cuda.gpu(), digest)
    assert about["layers_from"] == "engine"
    images = np.random.default_rng(0).normal(size=(3, 3, SIDE, SIDE)).astype(np.float32)
    reference = onnxruntime.InferenceSession(str(onnx))
    expected = np.concatenate(
        [reference.run(None, {"image": images[i : i + 1]})[0] for i in range(3)]
    )
    with Session(library, cuda, plan) as session:
        plain = session.run(images)
        session.capture()
        assert np.array_equal(session.run(images), plain)
        assert session.timed_run() < 1000
        assert sum(session.layer_milliseconds(5).values()) > 0
    assert np.allclose(plain, expected, rtol=0.05, atol=0.05)
