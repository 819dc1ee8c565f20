"""A bundle for a CPU: in this process against made-up machines, and alone in one of its own."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from alone import alone
from PIL import Image
from qdq import SIDE, make_content, write_classifier

from care_compress.device.cpu_app import main
from care_compress.device.cpu_session import load_cpu_runtime, open_file
from care_compress.device.problems import RuntimeMissingError
from care_compress.device.processor import DOT_PRODUCTS, Processor, parse_cpuinfo, usable_cores
from care_compress.device.timing import Timing
from care_compress.evaluate.device_measurements import import_results
from care_compress.export.bundle import BundleContent, Model, unpack_bundle, write_bundle
from care_compress.files import sha256_file

CPUINFO = (
    "processor : 0\nmodel name : Some Processor\ncpu MHz : 2445.4\nflags : {}\n\nprocessor : 1\n"
)
VNNI, AVX2 = "fpu avx2 avx512f avx512_vnni", "fpu avx2"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> BundleContent:
    return make_content(tmp_path_factory.mktemp("content"), half=False)


def unpacked(content: BundleContent, folder: Path) -> Path:
    return unpack_bundle(write_bundle(content, folder / "bundle.tar.gz"), folder)


@pytest.fixture
def bundle(content: BundleContent, tmp_path: Path) -> Path:
    return unpacked(content, tmp_path)


def needy(content: BundleContent) -> BundleContent:
    """The content with INT8 that is right with dot products only."""
    int8 = dataclasses.replace(content.models["int8"], needs=DOT_PRODUCTS)
    return dataclasses.replace(content, models={**content.models, "int8": int8})


Verb = Callable[..., int]


@pytest.fixture
def box(bundle: Path, tmp_path: Path) -> Verb:
    """Runs a verb on a machine of these features."""

    def run(verb: str, *options: str, flags: str = AVX2, of: Path = bundle) -> int:
        files = {
            "proc/cpuinfo": CPUINFO.format(flags),
            "proc/loadavg": "0.25 0.10 0.05 1/100 1234\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
            "sys/class/thermal/thermal_zone0/type": "cpu\n",
            "sys/class/thermal/thermal_zone0/temp": "51250\n",
        }
        for name, text in files.items():
            (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "root" / name).write_text(text)
        return main([verb, "--bundle", str(of), *options], tmp_path / "root")

    return run


def results(bundle: Path) -> Any:
    return json.loads((bundle / "results.json").read_text())


def test_a_bundle_proves_itself_and_its_figures_come_home(bundle: Path, tmp_path: Path) -> None:
    verified = alone(bundle, "verify")
    assert (verified.returncode, verified.stdout.splitlines()[-1][:7]) == (0, "PASSED:")
    measured = alone(bundle, "bench", "--seconds", "0.05")
    assert measured.returncode == 0 and "1 thread, floats in f32" in measured.stdout
    assert "times as fast as FP32" in measured.stdout or "FP32 (ratio" in measured.stdout
    told = alone(bundle, "info")
    assert told.returncode == 0 and platform.machine() in told.stdout
    assert os.uname().nodename not in told.stdout
    found = results(bundle)
    assert found["models"].keys() == {"int8", "fp32"}
    for one in found["models"].values():
        assert one["accuracy"]["passed"] and one["speed"]["threads"] == 1
    run_dir = tmp_path / "runs" / "mine"
    assert import_results(bundle / "results.json", run_dir) == found
    (kept,) = (run_dir / "measured").iterdir()
    assert kept.name.startswith("onnxruntime-cpu.") and kept.name.endswith(".1-thread.json")


def test_a_changed_file_ends_in_one_line_and_changed_weights_in_a_failure(
    bundle: Path, content: BundleContent, tmp_path: Path
) -> None:
    with (bundle / "int8.onnx").open("ab") as file:
        file.write(b"x")
    for verb in ("verify", "bench", "info"):
        done = alone(bundle, verb)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "BundleDamagedError: int8.onnx is not the file that was exported. Fix: unpack the "
            "archive again, or copy it again if that does not help"
        ]
    model = onnx.load(content.models["int8"].files[0])
    for tensor in model.graph.initializer:
        if tensor.name == "head":
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[:, ::-1].copy(), "head"))
    (tmp_path / "other").mkdir()
    onnx.save(model, path := tmp_path / "other" / "int8.onnx")
    models = {**content.models, "int8": Model((path,), sha256_file(path), 20.0)}
    spoiled = unpacked(dataclasses.replace(content, models=models), tmp_path / "other")
    done = alone(spoiled, "verify")
    assert done.returncode == 1 and "FAILED: not every model" in done.stdout
    assert results(spoiled)["models"]["int8"]["accuracy"]["passed"] is False
    assert results(spoiled)["models"]["fp32"]["accuracy"]["passed"] is True


@pytest.mark.parametrize("verb", ["info", "verify", "--help"])
@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_nobody_reads_ends_it_without_a_word(
    bundle: Path, verb: str, buffered: bool
) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does once it has its lines
    command = [sys.executable, "-I", *([] if buffered else ["-u"]), "care_deploy.py", verb]
    done = subprocess.run(command, cwd=bundle, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    told = [line for line in done.stderr.splitlines() if not line.startswith("verifying ")]
    # argparse itself passes over a help that cannot be written.
    assert done.returncode in ((0, 141) if verb == "--help" else (141,)) and told == []
    if verb == "verify":
        assert results(bundle)["models"].keys() == {"int8", "fp32"}, "written before it is told"


def test_openvino_runs_its_files_in_the_same_script(content: BundleContent, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the openvino extra")
    xml = tmp_path / "fp32.xml"
    source = content.models["fp32"].files[0]
    openvino.save_model(openvino.convert_model(source), xml, compress_to_fp16=False)
    changed = dataclasses.replace(
        content,
        target="openvino-cpu",
        requirement="openvino>=2025.1",
        models={"fp32": Model((xml, xml.with_suffix(".bin")), "a" * 64, 20.0)},
        logits={"fp32": content.logits["fp32"]},
    )
    bundle = unpacked(changed, tmp_path)
    assert "INFERENCE_PRECISION_HINT" in (bundle / "README.md").read_text()
    done = alone(bundle, "verify")
    assert done.returncode == 0, done.stderr
    done = alone(bundle, "bench", "--seconds", "0.02")
    assert done.returncode == 0 and "floats in" in done.stdout
    assert results(bundle)["models"]["fp32"]["size_bytes"] > xml.stat().st_size


def test_conditions_are_told_before_and_after(box: Verb, bundle: Path, capsys: Any) -> None:
    assert box("bench", "--seconds", "0.01", "--int8-only") == 0
    state = "governor performance, load average 0.2, 2445 MHz, 51 °C at most"
    assert f"before: {state}; after: {state}" in capsys.readouterr().out
    assert results(bundle)["board"]["name"] == "Some Processor"
    assert results(bundle)["models"].keys() == {"int8"}


def test_what_changed_while_it_was_measured_is_told(
    box: Verb, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(models: Any, plan: Any, say: Any) -> dict[str, Timing]:
        (tmp_path / "root" / "proc/loadavg").write_text("7.50 0.10 0.05 1/100 1234\n")
        return {name: Timing(1, [1.0], 1.0) for name in models}

    monkeypatch.setattr("care_compress.device.cpu_app.measure", measure)
    assert box("bench", "--seconds", "0.01", "--int8-only") == 0
    speed = results(bundle)["models"]["int8"]["speed"]
    assert (speed["before"]["load_average"], speed["after"]["load_average"]) == (0.25, 7.5)


@pytest.mark.parametrize("verb", ["verify", "bench", "infer"])
def test_a_file_that_needs_dot_products_is_refused_without_them(
    content: BundleContent, box: Verb, tmp_path: Path, verb: str, capsys: Any
) -> None:
    of = unpacked(needy(content), tmp_path / "needy")
    given = [] if verb == "infer" else ["--seconds", "0.01"] if verb == "bench" else []
    if verb == "infer":
        Image.new("RGB", (20, 30)).save(tmp_path / "x.png")
        given = [str(tmp_path / "x.png")]
    assert box(verb, *given, of=of) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ProcessorError: int8.onnx needs integer dot products; this processor")
    assert "(Some Processor) has no integer dot products" in line and "--fp32-only" in line
    assert box(verb, *given, of=of, flags=VNNI) == 0
    assert box(verb, *given, "--fp32-only", of=of) == 0, "the float file needs nothing"
    (tmp_path / "root/proc/cpuinfo").unlink()
    assert main([verb, "--bundle", str(of), *given], tmp_path / "root") == 2
    assert "does not say whether it has" in capsys.readouterr().err


def test_openvino_may_be_told_to_leave_dot_products_alone(
    content: BundleContent, box: Verb, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    other = dataclasses.replace(needy(content), requirement="openvino>=2025.1")
    of = unpacked(other, tmp_path / "needy")
    for name, value in (("ONEDNN_MAX_CPU_ISA", "avx2"), ("DNNL_MAX_CPU_ISA", "AVX512_CORE")):
        monkeypatch.setenv(name, value)
        assert box("verify", of=of, flags=VNNI) == 2
        assert f"{name}={value} switches off" in capsys.readouterr().err
        monkeypatch.delenv(name)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    box("verify", of=of, flags=VNNI)
    assert "switches off" not in capsys.readouterr().err, "the first that is set is heeded"


@pytest.mark.parametrize(
    ("machine", "words"),
    [("armv7l", "here is armv7l"), ("riscv64", "for x86_64 and aarch64; here is riscv64")],
)
def test_another_architecture_is_refused(
    box: Verb, monkeypatch: Any, machine: str, words: str, capsys: Any
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for verb in ("verify", "bench", "info"):
        assert box(verb) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and line.startswith("ProcessorError: ")


@pytest.mark.parametrize("requirement", ["openvino>=2025.1", "onnxruntime>=1.20"])
def test_a_runtime_that_is_missing_or_too_old_is_named_with_its_command(
    requirement: str, monkeypatch: Any
) -> None:
    name = requirement.partition(">")[0]
    pytest.importorskip(name)
    with pytest.raises(RuntimeMissingError, match=rf"needs {name}>=9999\. Fix: python3 -m pip"):
        load_cpu_runtime(f"{name}>=9999")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeMissingError) as error:
        load_cpu_runtime(requirement)
    assert str(error.value).endswith(f"Fix: python3 -m pip install '{requirement}'")
    with pytest.raises(RuntimeMissingError, match="'os' is no runtime"):
        load_cpu_runtime("os>=1")


def test_what_a_user_may_get_wrong_is_one_line(
    box: Verb, bundle: Path, tmp_path: Path, content: BundleContent, capsys: Any
) -> None:
    engines = make_content(tmp_path)
    other = unpacked(engines, tmp_path / "engines")
    damaged = unpacked(content, tmp_path / "damaged")
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps({**manifest, "input": {}}))
    cases: list[tuple[Path, list[str], str]] = [
        (bundle, ["bench", "--threads", "9999"], "ProcessorError: 9999 threads do not fit"),
        (bundle, ["bench", "--threads", str(len(usable_cores()) + 1)], "threads do not fit"),
        (bundle, ["bench", "--threads", "0"], "ProcessorError: 0 threads"),
        (bundle, ["infer", "absent.png"], "ImageError: absent.png cannot be read"),
        (other, ["verify"], "WrongBundleError: this bundle is of target tensorrt-orin"),
        (damaged, ["verify"], "BundleDamagedError: manifest.json has no usable shape"),
        (tmp_path, ["verify"], "manifest.json is missing"),
    ]
    for of, arguments, words in cases:
        assert box(*arguments, of=of) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and " Fix: " in line


def test_a_file_that_the_runtime_does_not_load_is_named(
    content: BundleContent, box: Verb, tmp_path: Path, capsys: Any
) -> None:
    (path := tmp_path / "int8.onnx").write_bytes(b"no graph")
    models = {**content.models, "int8": Model((path,), sha256_file(path), 20.0)}
    of = unpacked(dataclasses.replace(content, models=models), tmp_path / "of")
    assert box("verify", of=of) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ModelError: int8.onnx does not load: ")


def test_pictures_are_classified(box: Verb, tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    assert box("infer", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("a.png (int8)") and lines[3].endswith("b.png (int8)")
    assert len(lines) == 6 and "class" in lines[1]


@pytest.mark.parametrize("batch", [4, "batch"])
def test_any_number_of_images_goes_through_a_file(tmp_path: Path, batch: int | str) -> None:
    path = write_classifier(tmp_path / "m.onnx", int8=False, half=False, batch=batch)
    runtime = load_cpu_runtime("onnxruntime>=1.20")
    session = open_file(runtime, path, (batch, 3, SIDE, SIDE), 1)
    assert session.batch == (4 if batch == 4 else 1)
    images = np.random.default_rng(0).normal(size=(10, 3, SIDE, SIDE)).astype(np.float32)
    together = session.run(images)
    assert together.shape[0] == 10
    assert np.allclose(together[7:], session.run(images[7:]), atol=1e-5)
    assert session.timed_run() > 0


def test_arm_names_its_dot_product_and_its_core() -> None:
    text = "processor : 0\nFeatures : fp asimd asimddp i8mm\nCPU part : 0xd0b\n"
    assert parse_cpuinfo(text) == ("Cortex-A76", ("asimddp", "i8mm"))
    assert parse_cpuinfo("") == ("unknown processor", None)


@pytest.mark.parametrize(
    ("features", "dots"),
    [(AVX2, False), (VNNI, True), ("avx2 avx_vnni", True), ("avx2 avx512f amx_int8", True)],
)
def test_any_of_the_dot_products_will_do(features: str, dots: bool) -> None:
    name, found = parse_cpuinfo(CPUINFO.format(features))
    assert Processor(name, "x86_64", 2, found).dot_products is dots
