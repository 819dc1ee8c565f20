"""What is published works for somebody who has nothing of ours, and says no more than is so."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from comparison import board_results, cpu_results
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from quantized import SIZE, network

from care_compress.cli import main
from care_compress.data.transforms import EvalTransform, normalize
from care_compress.export.result import About, Preprocessing
from care_compress.export.to_onnx import float_graph, write_onnx
from care_compress.export.to_openvino import write_ir
from care_compress.files import digest_of, size_of
from care_compress.model.care import build_model
from care_compress.model.checkpoint import save_checkpoint
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import DOT_PRODUCTS
from care_compress.runtime.on_onnxruntime import OnnxPredictor

CLASSES = ("ant", "bee", "<cat>", "dog|s", "élan")
DATA = DataSection(source="/home/somebody/pets", resolution=SIZE, crop_pct=0.8)
TARGETS = {"openvino-cpu": "xml", "onnxruntime-cpu": "onnx", "tensorrt-gpu": "onnx"}
REPOSITORY, COMMIT = "some-lab/care", "c" * 40
HASH = "0" * 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The model of a run as a runtime reads it, for one image at once and for three."""
    folder = tmp_path_factory.mktemp("files")
    about = About("int8_ptq", "f", CLASSES, Preprocessing.of(DATA))
    for batch in (1, 3):
        write_onnx(float_graph(network(), SIZE, batch), about, folder / f"{batch}.onnx", None)
        write_ir(folder / f"{batch}.onnx", about, folder / f"{batch}.xml", half=False)
    return {batch: folder / f"{batch}.onnx" for batch in (1, 3)}


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def export_of(folder: Path, suffix: str, source: Path, batch: int, needs: str | None) -> Any:
    folder.mkdir(parents=True)
    path = folder / f"int8.{suffix}"
    path.write_bytes(source.with_suffix(path.suffix).read_bytes())
    if suffix == "xml":
        path.with_suffix(".bin").write_bytes(source.with_suffix(".bin").read_bytes())
    entry = {
        "file": path.name, "sha256": digest_of(path), "size_bytes": size_of(path), "images": 40,
        "agreement": 100.0, "least_sqnr_db": 30.0, "holds": True,
    }  # fmt: skip
    export = {
        "target": folder.name, "models": {"int8": entry}, "engines": {}, "batch": batch,
        "needs": needs, "classes": CLASSES, "recipe": "int8_ptq", "fingerprint": "f",
        "preprocessing": vars(Preprocessing.of(DATA)),
    }  # fmt: skip
    write(folder / "export.json", export)
    return export


def run_in(
    runs: Path, files: dict[int, Path], batch: int = 1, needs: str | None = None, **model: object
) -> Path:
    """A finished run called mine, of a model from the Hub, with files for three targets."""
    run = runs / "mine"
    exports = {
        target: export_of(run / "exports" / target, suffix, files[batch], batch, needs)
        for target, suffix in TARGETS.items()
    }
    save_checkpoint(build_model("care_nano", len(CLASSES)), run / "float.safetensors", {})
    recipe = {
        "name": "int8_ptq", "claim": "a | test", "precision": "int8",
        "model": {"checkpoint": str(run / "float.safetensors"), **model},
        "data": DATA.model_dump(mode="json"), "quantize": {"rules": [{"weight": 8, "input": 8}]},
    }  # fmt: skip
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ptq = {"images": 200, "top1": 90.0, "top5": 99.0, "drop": 0.5, "drop_ci95": [-0.25, 1.25]}
    results = {
        "run": "mine", "recipe": "int8_ptq", "precision": "int8", "float": {"top1": 90.5},
        "accuracy": {"images": 200, "top1": 90.0}, "exports": exports, "kept": "ptq",
        "backend": "torchao", "candidates": {"ptq": {**ptq, "agreement": 98.5}},
        "plan": {"macs": {"w8a8": 1000}}, "model": "ptq/model.safetensors",
        "checks": [
            {"check": "classes", "status": "warning", "text": "<cat> has 3 images"},
            {"check": "answers", "status": "fine", "text": "every logit is finite"},
        ],
    }  # fmt: skip
    write(run / "results.json", results)
    return run


def timed(p50: float, speedup: float, name: str) -> dict[str, Any]:
    return {
        "target": "openvino-cpu", "name": name, "latency_ms": {"p50": p50}, "throughput": 100.0,
        "speedup": speedup, "speedup_ci95": [speedup - 0.1, speedup + 0.1], "noisy": False,
    }  # fmt: skip


def compared(run: Path, sha256: str) -> None:
    """Leave what compare says of the file for OpenVINO, called otherwise there."""
    row = {"top1": 89.75, "floats_in": "f32"}
    pair = {"target": "openvino-cpu", "candidate": "m2", "drop": 0.75, "drop_ci95": [-0.1, 1.6]}
    cpu = {"name": "Some CPU 9", "physical_cores": 2, "features": {"avx2": True, "amx": False}}
    write(run / "compare.json", {
        "images": 200, "models": {"/home/somebody/base.xml": {}, "m2": {}},
        "pairs": [{**pair, "agreement": 97.25}],
        "targets": {
            "openvino-cpu": {
                "base": {**row, "sha256": HASH}, "m2": {**row, "sha256": sha256},
            },
            "tensorrt-gpu": {"m2": {"available": False, "why": "no GPU"}},
        },
        "latency": [{"batch": 1, "threads": 2, "rows": [timed(2.0, 1.0, "base"),
                                                        timed(1.25, 1.6, "m2")]}],
        "machine": {"cpu": cpu, "os": "somebody's", "libraries": {"openvino": "2026.4.1"}},
    })  # fmt: skip


def published(runs: Path, folder: Path, *more: str) -> int:
    given = ["publish", "mine", str(folder), "--runs", str(runs), *more]
    with pytest.raises(SystemExit) as left:
        main(given if "--license" in more else [*given, "--license", "apache-2.0"])
    assert isinstance(left.value.code, int)
    return left.value.code


def snippets(card: str) -> dict[str, str]:
    return dict(re.findall(r"\n### ([^\n]+)\n.*?```python\n(.*?)```", card, flags=re.S))


@pytest.mark.parametrize("batch", [1, 3])
def test_each_program_of_the_card_answers_as_our_own_evaluation(
    batch: int, files: dict[int, Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    run_in(tmp_path, files, batch)
    assert published(tmp_path, tmp_path / "out") == 0
    pixels = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    picture = tmp_path / "a picture.png"
    Image.fromarray(pixels).resize((61, 47), Image.Resampling.BILINEAR).save(picture)
    image = EvalTransform(DATA.resolution, DATA.crop_pct)(Image.open(picture))[None]
    (odds,) = OnnxPredictor(files[1])(normalize(image, DATA.mean, DATA.std)).softmax(dim=1)
    programs = snippets((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert list(programs) == ["OpenVINO", "ONNX Runtime", "TensorRT"]
    for name in ("OpenVINO", "ONNX Runtime"):
        (tmp_path / "out" / "classify.py").write_text(programs[name], encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "classify.py", str(picture)], cwd=tmp_path / "out",
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said, _, share = done.stdout.strip().removesuffix("%)").rpartition(" (")
        assert said == CLASSES[int(odds.argmax())]
        assert float(share) == pytest.approx(100 * float(odds.max()), abs=0.06)
    compile(programs["TensorRT"], "classify.py", "exec")  # no GPU has run it
    assert 'parse_from_file("tensorrt-gpu/int8.onnx")' in programs["TensorRT"]


@pytest.mark.parametrize("runtime", ["OpenVINO", "ONNX Runtime"])
def test_a_program_refuses_a_file_that_would_answer_wrong_here(
    runtime: str, files: dict[int, Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    run_in(tmp_path, files, needs=DOT_PRODUCTS)
    assert published(tmp_path, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"need {DOT_PRODUCTS}" in card
    (tmp_path / "cpuinfo").write_text("flags : avx2\n")
    program = snippets(card)[runtime]
    assert "/proc/cpuinfo" in program
    program = program.replace("/proc/cpuinfo", str(tmp_path / "cpuinfo"))
    done = subprocess.run(
        [sys.executable, "-c", program, "x.png"], cwd=tmp_path / "out",
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and f"needs {DOT_PRODUCTS}" in done.stderr, done.stderr


def test_the_card_says_what_was_measured_and_what_was_not(
    files: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in(tmp_path, files)
    compared(run, digest_of(run / "exports" / "openvino-cpu" / "int8.xml"))
    assert published(tmp_path, tmp_path / "out", "--dataset", "some-lab/pets") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"hf upload OWNER/care_nano-mine {tmp_path / 'out'} ."
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for row in (
        "| float model | 90.50 [85.64, 93.83] |  |  |",
        "| quantized model, simulated | 90.00 [85.06, 93.43] | 0.50 [-0.25, 1.25] | 98.50 |",
        "| `openvino-cpu/int8.xml` | 89.75 [84.77, 93.23] | 0.75 [-0.10, 1.60] | 97.25 |",
        "| `openvino-cpu/int8.xml` | 1 | 2 | 1.250 | 100 | 1.60 [1.50, 1.70] |",
    ):
        assert row in card
    assert "Some CPU 9 (2 cores, avx2), OpenVINO 2026.4.1" in card
    assert "**Take note**: classes: &lt;cat> has 3 images." in card and "every logit" not in card
    (limit,) = re.findall(r"\*\*Not measured\*\*.*", card)
    assert "ONNX Runtime on a CPU" in limit and "NVIDIA" in limit and "OpenVINO" not in limit
    head = metadata_load(tmp_path / "out" / "README.md")
    assert head is not None
    assert head["datasets"] == ["some-lab/pets"] and head["license"] == "apache-2.0"
    assert head["pipeline_tag"] == "image-classification"
    assert {"openvino", "onnx", "tensorrt", "int8"} <= set(head["tags"])
    _, found = model_index_to_eval_results(head["model-index"])
    assert [one.metric_value for one in found] == [90.0, 89.75]
    assert {one.dataset_type for one in found} == {"some-lab/pets"}


def test_figures_of_other_files_are_not_told(
    files: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in(tmp_path, files)
    compared(run, "1" * 64)
    assert published(tmp_path, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Speed\n\nNot measured.\n" in card and "Some CPU" not in card and "89.75" not in card
    assert "the card says no latency" in capsys.readouterr().out


def test_what_devices_measured_is_told_of_published_files(
    files: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in(tmp_path, files)
    board, wrong = board_results("mine"), cpu_results("mine")
    board["target"] = "tensorrt-gpu"  # with fp16, which this run has no file of
    wrong["models"]["int8"]["accuracy"]["passed"] = False
    there = [board, wrong]
    monkeypatch.setattr("care_compress.export.publish.device_measurements", lambda _: there)
    assert published(tmp_path, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"\| `tensorrt-gpu/int8.onnx` .*", card)
    assert row.endswith("| NVIDIA Jetson AGX Orin | tensorrt 10.3.0 | 0.310 | 95.30 |")
    (row,) = re.findall(r"\| `onnxruntime-cpu/int8.onnx` .*", card)
    assert ", 2 threads |" in row and row.endswith("| 3.000 | 95.30 (**answers wrong there**) |")
    assert "fp16" not in card and "fp32" not in card
    (limit,) = re.findall(r"\*\*Not measured\*\*.*", card)
    assert "OpenVINO on a CPU" in limit and "NVIDIA" not in limit


def test_a_model_of_the_hub_is_named_as_the_base(files: dict[int, Path], tmp_path: Path) -> None:
    run = run_in(tmp_path, files)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] = {"checkpoint": f"hf-hub:{REPOSITORY}@{COMMIT}"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cached = tmp_path / "hub" / "models--some-lab--care" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    (run / "float.safetensors").rename(cached / "model.safetensors")
    hub = {"repository": REPOSITORY, "commit": COMMIT, "file": "model.safetensors"}
    write(run / "manifest.json", {"inputs": {"checkpoint": {"path": "/home/x", "hub": hub}}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        assert published(tmp_path, tmp_path / "out") == 0
        assert published(tmp_path, tmp_path / "b", "--base-model", "other/one") == 0
    head = metadata_load(tmp_path / "out" / "README.md")
    assert head is not None
    assert (head["base_model"], head["base_model_relation"]) == (REPOSITORY, "quantized")
    assert f"| at commit | `{COMMIT}` |" in (tmp_path / "out" / "README.md").read_text()
    assert (metadata_load(tmp_path / "b" / "README.md") or {})["base_model"] == "other/one"


def test_nothing_of_this_machine_is_published(files: dict[int, Path], tmp_path: Path) -> None:
    run = run_in(tmp_path, files)
    compared(run, digest_of(run / "exports" / "openvino-cpu" / "int8.xml"))
    about = {"path": "/home/somebody/w/float.pth", "sha256": digest_of(run / "float.safetensors")}
    write(run / "manifest.json", {"inputs": {"checkpoint": about}})
    assert published(tmp_path, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| float model | `float.pth` |" in card and "`base.xml`" in card and "`pets`" in card
    there = {path.relative_to(tmp_path / "out").as_posix(): path
             for path in (tmp_path / "out").rglob("*") if path.is_file()}  # fmt: skip
    assert set(there) == {
        ".gitattributes", "LICENSE", "README.md", "config.json", "openvino-cpu/int8.xml",
        "openvino-cpu/int8.bin", "onnxruntime-cpu/int8.onnx", "tensorrt-gpu/int8.onnx",
    }  # fmt: skip
    for name, path in there.items():
        content = path.read_bytes()
        assert b"somebody" not in content and str(tmp_path).encode() not in content, name
    large = there[".gitattributes"].read_text().splitlines()
    assert {line.split()[0] for line in large} == {"*.bin", "*.onnx"}
    assert all(line.endswith(" filter=lfs diff=lfs merge=lfs -text") for line in large)
    config = json.loads(there["config.json"].read_text())
    assert (config["architecture"], config["num_classes"]) == ("care_nano", 5)
    assert config["input_size"] == [3, SIZE, SIZE] and config["classes"] == list(CLASSES)
    assert config["preprocessing"]["crop_pct"] == 0.8
    assert config["files"]["openvino-cpu"]["int8"]["file"] == "openvino-cpu/int8.xml"
    assert config["quantization"]["macs"] == {"w8a8": 1000}


def test_some_targets_are_published_where_only_they_are_wanted(
    files: dict[int, Path], tmp_path: Path
) -> None:
    run_in(tmp_path, files)
    assert published(tmp_path, tmp_path / "out", "--targets", "onnxruntime-cpu") == 0
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"onnxruntime-cpu"}
    assert list(snippets((tmp_path / "out" / "README.md").read_text())) == ["ONNX Runtime"]


def test_an_engine_goes_with_its_description(files: dict[int, Path], tmp_path: Path) -> None:
    run = run_in(tmp_path, files)
    folder = run / "exports" / "tensorrt-gpu"
    (folder / "int8.engine").write_bytes(b"engine")
    (folder / "int8.engine.json").write_text("{}")
    export = json.loads((folder / "export.json").read_text())
    for digest, code in ((digest_of(folder / "int8.engine"), 0), ("1" * 64, 2)):
        export["engines"] = {"int8": {"engine_sha256": digest}}
        write(folder / "export.json", export)
        assert published(tmp_path, tmp_path / f"out{code}") == code
    there = {path.name for path in (tmp_path / "out0" / "tensorrt-gpu").iterdir()}
    assert there == {"int8.onnx", "int8.engine", "int8.engine.json"}
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--license", "Apache 2.0"], "the Hub knows no licence 'Apache 2.0'"),
        (["--license", "mit"], "--license-file FILE"),
        (["--license", "other:"], "knows no licence"),
        (["--license", "mit", "--license-file", "/nowhere"], "/nowhere cannot be read"),
        (["--base-model", "https://x/y"], "names no repository"),
        (["--dataset", "a b"], "names no repository"),
        (["--targets", "openvino-gpu"], "has no export for openvino-gpu"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    given: list[str],
    said: str,
    files: dict[int, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_in(tmp_path, files)
    assert published(tmp_path, tmp_path / "out", *given) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_licence_of_ones_own_is_published_with_its_text(
    files: dict[int, Path], tmp_path: Path
) -> None:
    run_in(tmp_path, files)
    (tmp_path / "mine.txt").write_text("You may.")
    given = ["--license", "other:Lab Licence", "--license-file", str(tmp_path / "mine.txt")]
    assert published(tmp_path, tmp_path / "out", *given) == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "You may."
    head = metadata_load(tmp_path / "out" / "README.md")
    assert head is not None
    assert (head["license"], head["license_name"]) == ("other", "lab-licence")
    assert head["license_link"] == "LICENSE"


def test_a_run_that_is_not_proven_is_not_published(
    files: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(runs: Path) -> str:
        assert published(runs, runs / "out") == 2
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1 and not (runs / "out").exists()
        return told

    run = run_in(tmp_path / "a", files)
    (run / "results.json").unlink()  # as long as a run is under way
    assert "no finished run called mine" in refused(tmp_path / "a")

    run = run_in(tmp_path / "b", files)
    path = run / "exports" / "openvino-cpu" / "export.json"
    export = json.loads(path.read_text())
    export["models"]["int8"]["holds"] = False
    write(path, export)
    assert "does not compute what its model does" in refused(tmp_path / "b")

    run = run_in(tmp_path / "c", files)
    (run / "exports" / "openvino-cpu" / "int8.bin").write_bytes(b"changed")
    assert "is not the file that was exported" in refused(tmp_path / "c")

    for folder, exports, said in (
        ("d", {}, "has no exports"),
        ("e", {"openvino-cpu": {"target": "openvino-cpu", "skipped": "4 bits"}}, "has no exports"),
        ("f", {"openvino-cpu": {"target": "openvino-cpu", "failed": "it broke"}}, "it broke"),
    ):
        run = run_in(tmp_path / folder, files)
        results = json.loads((run / "results.json").read_text())
        write(run / "results.json", {**results, "exports": exports})
        assert said in refused(tmp_path / folder)


def test_a_folder_with_something_in_it_is_left_alone(
    files: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in(tmp_path, files)
    (tmp_path / "out").mkdir()
    assert published(tmp_path, tmp_path / "out") == 0, "an empty one is as good as none"
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert published(tmp_path, tmp_path / "out") == 2
    assert "is there and not empty" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert published(tmp_path, tmp_path / "file") == 2
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_card_is_read_by_the_hub_as_it_was_meant(files: dict[int, Path], tmp_path: Path) -> None:
    """Names that YAML would read as something else, and a run without an own number."""
    torch.manual_seed(0)
    run = run_in(tmp_path, files)
    results = json.loads((run / "results.json").read_text())
    write(run / "results.json", {**results, "accuracy": {"images": 3, "top1": 100 / 3}})
    assert published(tmp_path, tmp_path / "out", "--base-model", "1e3/no", "--dataset", "on") == 0
    head = metadata_load(tmp_path / "out" / "README.md")
    assert head is not None
    assert (head["base_model"], head["datasets"]) == ("1e3/no", ["on"])
    _, (found,) = model_index_to_eval_results(head["model-index"])
    assert found.metric_value == 33.333
