import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from fakeboard import PROFILE, SURFACES, FakeGpu, FakeTensorRt, fake_host, fake_library
from PIL import Image
from qdq import SIDE, make_content, write_classifier

from care_compress.data.transforms import normalize
from care_compress.device.app import main
from care_compress.device.build import BuildOptions, build_engine
from care_compress.device.cuda import Cuda, load_cuda, runtime_candidates
from care_compress.device.deploy import Host
from care_compress.device.library import load_library, required_library, wrap_library
from care_compress.device.manifest import Bundle
from care_compress.device.problems import (
    BuildFailedError,
    DeployError,
    EngineMismatchError,
    NoGpuError,
    VerificationError,
)
from care_compress.device.samples import compare_outputs
from care_compress.device.session import Session
from care_compress.device.timing import BenchPlan, Timed, Timing, measure, verdict
from care_compress.device.verbs import format_table
from care_compress.errors import TargetError
from care_compress.evaluate.device_measurements import import_results
from care_compress.export.bundle import BundleContent, unpack_bundle, write_bundle
from care_compress.runtime.on_tensorrt import EnginePredictor


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> BundleContent:
    return make_content(tmp_path_factory.mktemp("content"))


@pytest.fixture
def bundle(content: BundleContent, tmp_path: Path) -> Path:
    """The unpacked bundle."""
    folder = unpack_bundle(write_bundle(content, tmp_path / "bundle.tar.gz"), tmp_path)
    assert folder == tmp_path / "mine-tensorrt-orin"
    return folder


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """A GPU on which nothing may be left behind."""
    gpu = FakeGpu()
    yield gpu
    assert gpu.alive == {}


Verb = Callable[..., int]


@pytest.fixture
def board(bundle: Path, tmp_path: Path, gpu: FakeGpu) -> Verb:
    """Runs a verb on a board with TensorRT 10.3."""

    def run(verb: str, *options: str, version: str = "10.3.0.30", on: FakeGpu = gpu) -> int:
        clock = tmp_path / "root/sys/class/devfreq/17000000.gpu/cur_freq"
        clock.parent.mkdir(parents=True, exist_ok=True)
        clock.write_text("612000000\n")
        host = fake_host(tmp_path / "root", version, on)
        return main([verb, "--bundle", str(bundle), *options], host)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("requirement", ["tensorrt>=10.3,<12", "tensorrt-rtx>=1.7,<2"])
def test_a_real_gpu_does_it_all(
    content: BundleContent, tmp_path: Path, requirement: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        load_library(required_library(requirement))
        load_cuda()
    except DeployError as error:
        pytest.skip(str(error))
    real = dataclasses.replace(content, requirement=requirement)
    bundle = unpack_bundle(write_bundle(real, tmp_path / "bundle.tar.gz"), tmp_path)
    where = ["--bundle", str(bundle)]
    assert main(["build", *where]) == 0
    assert json.loads((bundle / "int8.engine.json").read_text())["layers_from"] == "engine"
    assert main(["verify", *where]) == 0
    assert main(["bench", "--seconds", "0.5", *where]) == 0
    assert main(["bench", "--seconds", "0.5", "--no-cuda-graph", *where]) == 0
    assert main(["info", *where]) == 0
    import_results(bundle / "results.json", tmp_path / "mine")


def test_an_engine_is_a_predictor_like_any_other(
    board: Verb, bundle: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    assert board("build") == 0
    predict = EnginePredictor(bundle / "int8.engine", fake_host(tmp_path / "root", gpu=gpu))
    expected = np.load(bundle / "samples" / "logits_int8.npy")
    about = json.loads((bundle / "manifest.json").read_text())
    pixels = torch.from_numpy(np.load(bundle / "samples" / "pixels.npy"))
    logits = predict(normalize(pixels, tuple(about["mean"]), tuple(about["std"])))
    assert predict.num_classes == expected.shape[1]
    assert np.allclose(logits.numpy(), expected, atol=1e-3)
    predict.session.close()
    (bundle / "int8.engine.json").unlink()
    with pytest.raises(TargetError, match=r"has no int8.onnx and int8.engine.json beside it"):
        EnginePredictor(bundle / "int8.engine", fake_host(tmp_path / "root", gpu=gpu))


def results(bundle: Path) -> Any:
    return json.loads((bundle / "results.json").read_text())


@pytest.mark.parametrize("version", SURFACES)
def test_build_verify_bench_and_the_way_home(
    board: Verb,
    bundle: Path,
    tmp_path: Path,
    gpu: FakeGpu,
    version: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert board("build", version=version) == 0
    assert "1 INT8" in capsys.readouterr().out
    about = json.loads((bundle / "int8.engine.json").read_text())
    assert about["gpu"] == {"name": "Orin", "compute_capability": "8.7"}
    assert about["layers"][0]["origin"] == ["stem", "relu"]
    assert board("verify", version=version) == 0
    assert "PASSED" in capsys.readouterr().out
    assert board("bench", "--seconds", "0.05", version=version) == 0
    printed = capsys.readouterr().out
    assert "INT8" in printed and "CUDA graph: fp16, int8" in printed
    assert "while int8 ran: GPU at 612 to 612 MHz, ? °C at most" in printed
    assert "cudaGraphLaunch" in gpu.calls
    engine = results(bundle)["models"]["int8"]
    assert engine["accuracy"]["passed"] and engine["accuracy"]["agreement"] == 100
    assert engine["speed"]["runs"] >= 50
    latency = engine["speed"]["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    run_dir = tmp_path / "runs" / "mine"
    imported = import_results(bundle / "results.json", run_dir)
    assert imported["models"]["int8"]["speed"] == engine["speed"]
    assert imported["board"] == results(bundle)["board"]
    assert {layer["name"] for layer in engine["layer_times"]["layers"]} == PROFILE.keys()
    assert (run_dir / "measured" / "tensorrt-orin.orin.json").is_file()


def test_what_a_killed_build_left_is_cleared(board: Verb, bundle: Path) -> None:
    (bundle / ".int8.engine.abc.tmp").write_bytes(b"half")
    assert board("build") == 0
    assert list(bundle.glob(".*.tmp")) == []


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        (4, ["1", "2", "4"], "takes 4 images at once and no other number"),
        ("batch", ["8", "4", "2"], "do not rise from 1"),
        ("batch", ["0", "0", "0"], "do not rise from 1"),
    ],
)
def test_batches_that_cannot_be_are_named(
    tmp_path: Path, gpu: FakeGpu, shape: int | str, sizes: list[str], words: str
) -> None:
    onnx = write_classifier(tmp_path / "m.onnx", int8=False, batch=shape)
    wanted = tuple(int(size) for size in sizes)
    options = BuildOptions("fp16", batch=wanted)  # type: ignore[arg-type]
    with pytest.raises(BuildFailedError, match=words):
        build_engine(fake_library("10.16.1.11", gpu), onnx, options, lambda *args: None)


def test_a_failing_disk_is_one_line(
    board: Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("care_compress.device.manifest.digest_file", broken)
    assert board("info") == 2
    error = capsys.readouterr().err
    assert "Input/output error" in error and len(error.splitlines()) == 1


def test_without_a_cuda_graph_none_is_made(board: Verb, bundle: Path, gpu: FakeGpu) -> None:
    assert board("build", "--int8-only") == 0
    assert not (bundle / "fp16.engine").exists()
    assert board("bench", "--seconds", "0.01", "--no-cuda-graph") == 0
    assert "cudaGraphLaunch" not in gpu.calls
    assert results(bundle)["models"].keys() == {"int8"}
    assert results(bundle)["models"]["int8"]["speed"]["cuda_graph"] is False


def test_wrong_answers_fail_and_are_written_down(
    bundle: Path, tmp_path: Path, gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    module = FakeTensorRt("10.16.1.11", gpu)
    module.noise = 3.0
    library = wrap_library(module, "tensorrt", module.__version__)
    host = Host(lambda name: library, lambda: Cuda(gpu), tmp_path)
    where = ["--bundle", str(bundle)]
    assert main(["build", *where], host) == 0
    assert main(["verify", *where], host) == 1
    assert "FAILED" in capsys.readouterr().out
    assert results(bundle)["models"]["int8"]["accuracy"]["passed"] is False
    module.noise = float("nan")
    assert main(["build", *where], host) == 0
    assert main(["verify", *where], host) == 1
    assert "not finite" in capsys.readouterr().err


def test_a_rebuilt_engine_loses_the_figures_of_the_old_one(board: Verb, bundle: Path) -> None:
    assert board("build", "--int8-only") == 0
    assert board("verify") == 0
    assert board("build", "--int8-only", version="10.13.3.9") == 0
    assert board("bench", "--seconds", "0.01", version="10.13.3.9") == 0
    assert "accuracy" not in results(bundle)["models"]["int8"]


def test_accuracy_and_speed_are_of_one_engine(bundle: Path, tmp_path: Path, gpu: FakeGpu) -> None:
    module = FakeTensorRt("10.16.1.11", gpu)
    library = wrap_library(module, "tensorrt", module.__version__)
    host = Host(lambda name: library, lambda: Cuda(gpu), tmp_path)
    where = ["--bundle", str(bundle), "--int8-only"]
    assert main(["build", *where], host) == main(["verify", *where], host) == 0
    assert main(["bench", "--seconds", "0.01", *where], host) == 0
    assert {"accuracy", "speed"} <= results(bundle)["models"]["int8"].keys()
    module.noise = 1e-6  # another engine for the same board
    assert main(["build", *where], host) == main(["verify", *where], host) == 0
    assert "speed" not in results(bundle)["models"]["int8"]


def test_a_stripped_engine_gets_its_weights_back(board: Verb, bundle: Path) -> None:
    assert board("build", "--strip-plan") == 0
    assert json.loads((bundle / "int8.engine.json").read_text())["stripped"] is True
    assert board("verify") == 0


@pytest.mark.parametrize("batch", [4, "batch"])
def test_any_number_of_images_goes_through_an_engine_of_four(
    tmp_path: Path, gpu: FakeGpu, batch: int | str
) -> None:
    library = fake_library("11.4.1.5", gpu)
    onnx = write_classifier(tmp_path / "m.onnx", int8=False, batch=batch)
    options = BuildOptions("fp16", batch=(1, 4, 8) if batch == "batch" else None)
    built = build_engine(library, onnx, options, lambda phase, done: None)
    images = np.random.default_rng(0).normal(size=(10, 3, SIDE, SIDE)).astype(np.float32)
    reference = onnxruntime.InferenceSession(str(onnx))
    padded = np.concatenate([images, images[:2]])
    parts = [reference.run(None, {"image": padded[i : i + 4]})[0] for i in (0, 4, 8)]
    with Session(library, Cuda(gpu), built.plan) as session:
        assert session.batch == 4
        assert np.allclose(session.run(images), np.concatenate(parts)[:10], atol=1e-3)
        session.capture()
        assert np.allclose(session.run(images[:3]), parts[0][:3], atol=1e-3)
        with pytest.raises(EngineMismatchError, match="takes images of"):
            session.run(images[:, :, 1:])


def test_models_take_turns_until_all_have_enough_runs() -> None:
    turns: list[str] = []

    def run(name: str) -> float:
        time.sleep(0.001)
        if turns[-1:] != [name]:
            turns.append(name)
        return 1.0

    models = {name: Timed(2, partial(run, name)) for name in ("int8", "fp16")}
    plan = BenchPlan(seconds=0.02, warmup=0.002, turn=0.01, least_runs=30)
    timings = measure(models, plan, lambda text: None)
    assert turns[:6] == ["int8", "fp16"] * 3
    for timing in timings.values():
        assert len(timing.milliseconds) >= 30
        assert timing.seconds >= sum(timing.milliseconds) / 1000
        assert 0 < timing.throughput <= 2000


@pytest.mark.parametrize("verb", ["verify", "bench", "infer x.jpg"])
def test_an_engine_is_asked_for_first(
    board: Verb, verb: str, capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    if verb.startswith("infer"):
        random = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(random).save(bundle / "x.png")
        verb = f"infer {bundle / 'x.png'}"
    assert board(*verb.split()) == 2
    assert "build first" in capsys.readouterr().err


def test_another_gpu_and_another_version_are_refused(
    board: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board("build", "--int8-only") == 0
    assert board("verify", on=FakeGpu("Thor", (11, 0))) == 2
    assert "built for Orin" in capsys.readouterr().err
    assert board("verify", version="10.16.1.11") == 2
    error = capsys.readouterr().err
    assert error.startswith("EngineMismatchError: ") and "10.16.1.11" in error
    assert "Traceback" not in error
    assert board("verify", "--debug", version="10.16.1.11") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["build", "verify", "bench", "info"])
@pytest.mark.parametrize("name", ["int8.onnx", "samples/labels.npy", "care_deploy.py"])
def test_a_changed_file_is_refused_by_every_verb(
    board: Verb, bundle: Path, name: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    assert board(verb) == 2
    assert f"BundleDamagedError: {name} is not" in capsys.readouterr().err


def _missing(bundle: Path) -> None:
    (bundle / "fp16.onnx").unlink()


def _linked(bundle: Path) -> None:
    shutil.copy(bundle / "fp16.onnx", bundle / "copy")
    (bundle / "fp16.onnx").unlink()
    (bundle / "fp16.onnx").symlink_to("copy")


def _edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing, "fp16.onnx is missing"),
        (_linked, "fp16.onnx is missing"),
        (lambda b: (b / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda b: (b / "manifest.json").write_text("[]"), "manifest.json is missing"),
        (lambda b: _edit(b, lambda m: m.update(format=1)), "not a bundle"),
        (lambda b: _edit(b, lambda m: m["models"]["int8"].pop("limits")), "limits of model 'int8'"),
        (lambda b: _edit(b, lambda m: m["models"].update({"../x": m["models"]["int8"]})), "named"),
        (lambda b: _edit(b, lambda m: m["files"].update({"../x": "0"})), "outside the bundle"),
        (lambda b: _edit(b, lambda m: m["files"].update({"/etc/hosts": "0"})), "outside"),
        (lambda b: _edit(b, lambda m: m["files"].update({"a\\b": "0"})), "outside"),
        (lambda b: _edit(b, lambda m: m["models"].update(x={"file": "/etc/hosts"})), "no file"),
    ],
)
def test_a_damaged_bundle_is_refused(
    board: Verb,
    bundle: Path,
    damage: Callable[[Path], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(bundle)
    assert board("info") == 2
    assert words in capsys.readouterr().err


def test_a_version_outside_the_requirement_is_refused(
    board: Verb, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit(bundle, lambda m: m.update(requirement="tensorrt>=10.13,<12"))
    assert board("build") == 2
    assert "needs tensorrt>=10.13" in capsys.readouterr().err


def test_images_are_classified(
    board: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board("build") == 0
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    capsys.readouterr()
    assert board("infer", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].endswith("a.png (int8)") and lines[3].endswith("b.png (int8)") and len(lines) == 6
    )
    assert "class" in lines[1] and "%" in lines[1]
    assert board("infer", str(tmp_path / "missing.png")) == 2
    assert "ImageError" in capsys.readouterr().err


def test_info_tells_the_bundle_and_the_board(
    board: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board("info") == 0
    printed = capsys.readouterr().out
    assert "run mine" in printed and "8.7" in printed and "10.3.0.30" in printed
    assert os.uname().nodename not in printed


@pytest.mark.parametrize(
    "call", ["cudaMalloc", "cudaMemcpyAsync", "cudaEventRecord", "cudaEventSynchronize"]
)
def test_a_failing_gpu_is_named_and_everything_is_freed(
    board: Verb, gpu: FakeGpu, call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board("build", "--int8-only") == 0
    gpu.failing[call] = 2
    verb = "verify" if call == "cudaMemcpyAsync" else "bench"
    assert board(verb) == 2
    assert f"made-up error 2 ({call}, error 2)" in capsys.readouterr().err
    gpu.failing.clear()


def test_a_machine_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("care_compress.device.cuda.runtime_candidates", lambda: iter(["no.so"]))
    with pytest.raises(NoGpuError, match="libcudart"):
        load_cuda()
    assert next(iter(runtime_candidates())).startswith(("libcudart.so.", "cudart64"))


def test_an_older_runtime_is_tried_where_the_driver_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newer, older = FakeGpu(), FakeGpu("Orin")
    newer.failing["cudaSetDeviceFlags"] = 35
    runtimes = {"13": newer, "12": older}
    monkeypatch.setattr("care_compress.device.cuda.runtime_candidates", lambda: iter(runtimes))
    monkeypatch.setattr("ctypes.CDLL", runtimes.__getitem__)
    assert load_cuda().gpu().name == "Orin"
    older.failing["cudaSetDeviceFlags"] = 100
    with pytest.raises(NoGpuError, match="error 35"):
        load_cuda()


def test_a_runtime_without_a_driver_says_so() -> None:
    try:
        cuda = load_cuda()
    except NoGpuError as error:
        assert error.fix
    else:
        assert cuda.gpu().compute_capability.count(".") == 1


def test_the_comparison_counts_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    np.save(tmp_path / "samples" / "labels.npy", np.array([0, 1, 2, 0]))
    bundle = Bundle(tmp_path, {})
    expected = np.eye(4, dtype=np.float32) * 10
    got = expected.copy()
    got[0] = (0, 10, 0, 0)
    found = compare_outputs(got, expected, bundle)
    assert found.compared == {"top1": 50, "expected_top1": 75, "agreement": 75}
    assert found.max_deviation == 1
    assert found.sqnr_db == pytest.approx(10 * np.log10(400 / 200))
    assert not found.meets({"agreement": 75.1, "sqnr_db": 0})
    assert not found.meets({"agreement": 75.0, "sqnr_db": 3.1})
    assert found.meets({"agreement": 75.0, "sqnr_db": 3.0})
    with pytest.raises(VerificationError, match="4, 3"):
        compare_outputs(got[:, :3], expected, bundle)


@pytest.mark.parametrize(
    ("int8", "fp16", "words"),
    [(1.0, 2.0, "2.00 times as fast"), (2.0, 1.0, "use fp16.engine"), (1.0, 1.01, "equally fast")],
)
def test_the_verdict_follows_the_medians(int8: float, fp16: float, words: str) -> None:
    timings = {
        "int8": Timing(1, [int8] * 9 + [100.0]),
        "fp16": Timing(1, [fp16] * 9 + [100.0]),
    }
    assert words in verdict(timings, "int8", "fp16", "use fp16.engine on this board")
    assert verdict({"int8": timings["int8"]}, "int8", "fp16", "") == ""


def test_tables_are_aligned() -> None:
    assert format_table([["a", "bb", "c"], ["long", "b", ""]]) == "a     bb  c\nlong  b"


def test_the_one_file_does_what_the_modules_do(
    bundle: Path, tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = bundle / "care_deploy.py"
    # As Python starts it: its modules come from the zip, and its own path is the first argument.
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("care_compress")]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "path", [str(script), *sys.path])
        patch.setattr(sys, "argv", [str(script)])
        app, cuda, tensorrt = (
            importlib.import_module(f"care_compress.device.{name}")
            for name in ("app", "cuda", "library")
        )
        assert str(script) in str(app.__file__)
        library = tensorrt.wrap_library(FakeTensorRt("10.3.0.30", gpu), "tensorrt", "10.3.0.30")
        host = app.Host(lambda name: library, lambda: cuda.Cuda(gpu), tmp_path)
        # No --bundle: the folder of the file is the bundle.
        for verb in (["build"], ["verify"], ["bench", "--seconds", "0.01"], ["info"]):
            assert app.main(verb, host) == 0
        for name in [name for name in sys.modules if name.startswith("care_compress")]:
            patch.delitem(sys.modules, name)
    assert results(bundle)["models"]["fp16"]["accuracy"]["passed"]


def test_the_script_alone_says_what_is_missing(bundle: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "")}
    wanted = [shutil.which("python3.10"), sys.executable]
    python = next(path for path in wanted if path is not None and has_numpy(path, env))
    script = str(bundle / "care_deploy.py")
    done = subprocess.run([python, script, "info"], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("bundle   run mine")
    # Where this machine has no TensorRT, or no GPU, it says which and what to do.
    assert done.returncode in (0, 2)
    assert done.returncode == 0 or " Fix: " in done.stderr and "Traceback" not in done.stderr


def has_numpy(python: str, env: dict[str, str]) -> bool:
    done = subprocess.run([python, "-c", "import numpy"], capture_output=True, env=env)
    return done.returncode == 0
