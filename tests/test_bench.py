"""The speed bench: peers' files and answers, tables from made-up timings, the fit of a curve."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import growth
import material
import numpy as np
import peers
import performance_page as page
import pytest
import speed
import torch
import yaml
from rich.console import Console

from care_compress.errors import CareError, RunError, TargetError
from care_compress.evaluate.latency import Latency, LatencyPlan
from care_compress.recipe.sections import DataSection

SIZE = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    folder = material.image_folder(tmp_path_factory.mktemp("images"))
    return folder.model_copy(update={"resolution": SIZE})


@pytest.fixture(scope="module")
def network(images: DataSection) -> Any:
    return material.lifelike("care_nano", material.first_images(images, 4))


def test_images_are_those_of_the_built_in_set_among_a_thousand_classes(
    images: DataSection,
) -> None:
    samples = material.open_samples(images, "train")
    assert len(samples) == material.IMAGES["train"]
    assert len(samples.classes) == material.CLASSES
    drawn = material.Shapes("train").image(0)
    same = [i for i in range(len(samples)) if np.array_equal(samples.image(i), drawn)]
    assert len(same) == 1


def test_a_lifelike_network_is_seeded_and_uneven(network: Any, images: DataSection) -> None:
    again = material.lifelike("care_nano", material.first_images(images, 4))
    for mine, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)
    logits = network(material.first_images(images, 4))
    assert torch.isfinite(logits).all() and logits.std() > 0.1
    gains = network.stages[2].blocks[0].inter_layer.inter1_norm.weight
    assert gains.max() > 5 * gains.min()


@pytest.mark.slow
def test_peers_leave_files_that_run_or_a_reason(
    network: Any, images: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []

    def fails(source: Path, path: Path, *_: object) -> None:
        sources.append((path.stem, source.name))
        raise RuntimeError("Check failed\n  no such operation\n")

    monkeypatch.setattr(peers, "_nncf", fails)
    monkeypatch.setattr(peers, "PACKAGES", tmp_path / "nowhere")
    published = peers.publish(network, SIZE, tmp_path)
    pixels = material.first_images(images, 2)
    made = peers.make_peers(published, tmp_path / "fp32.xml", pixels)
    assert {made[f"{name}.xml"].reason for name in peers.OPENVINO_PEERS} == {"no such operation"}
    assert dict(sources) == {
        peers.NNCF: "published.xml",
        peers.NNCF_TRANSFORMER: "published.xml",
        peers.NNCF_OURS: "fp32.xml",
    }
    for name, suffix in product((peers.MODELOPT, peers.AIMET), ("onnx", "xml")):
        assert made[f"{name}.{suffix}"].reason == "not installed: make bench PEERS=all"
    setting = speed.Setting(pixels[:1], 1)
    entries = [
        speed.Entry("published/OpenVINO", "", "OpenVINO", peers.Made(published)),
        speed.Entry("int8/OpenVINO", "", "OpenVINO", made[f"{peers.STATIC}.onnx"]),
        speed.Entry("static/OpenVINO", "", "OpenVINO", made[f"{peers.STATIC_PRODUCTS}.xml"]),
        speed.Entry("nncf/OpenVINO", "", "OpenVINO", made[f"{peers.NNCF}.xml"]),
    ]
    monkeypatch.setattr(speed, "PLAN", LatencyPlan(0.01, 3, 1, 3))
    found = speed.measured(entries, setting, Console(quiet=True))
    assert [("ms" in row, row.get("reason")) for row in found["rows"]] == [
        (True, None),
        (True, None),
        (True, None),
        (False, "no such operation"),
    ]
    text = (tmp_path / f"{peers.STATIC_PRODUCTS}.onnx").read_bytes()
    again = peers.make_peers(published, tmp_path / "fp32.xml", pixels)
    assert again[f"{peers.STATIC_PRODUCTS}.onnx"].path.is_file()
    assert (tmp_path / f"{peers.STATIC_PRODUCTS}.onnx").read_bytes() == text


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        ("open(output_path, 'w').write(f'{calibration_data.shape} of {open(source).read()}')", ""),
        ("open(source, 'w').write('spoilt'); open(output_path, 'w')", ""),
        ("raise ValueError('Check failed\\nno such operation')", "no such operation"),
        ("os.kill(os.getpid(), 9)", "modelopt was stopped: exit code -9"),
    ],
)
def test_a_quantizer_with_packages_of_its_own_leaves_a_file_or_a_reason(
    work: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "modelopt" / "onnx" / "quantization"
    package.mkdir(parents=True)
    # What it says on the way out is not why it failed.
    (package / "__init__.py").write_text(
        "import atexit, os, sys\n"
        "atexit.register(print, 'bye', file=sys.stderr)\n"
        f"def quantize(source, calibration_data, output_path, **_):\n    {work}\n"
    )
    monkeypatch.setattr(peers, "PACKAGES", tmp_path / "packages")
    monkeypatch.chdir(tmp_path)
    published, path = Path("in.onnx"), tmp_path / "modelopt.onnx"
    published.write_text("a network")
    pixels = [np.zeros((1, 3, 4, 4), np.float32)] * 5
    made = peers._made(path, lambda target: peers._other("modelopt", published, target, pixels))
    assert made == peers.Made(path, reason)
    assert published.read_text() == "a network"
    if "shape" in work:
        assert path.read_text() == "(5, 3, 4, 4) of a network"


@pytest.mark.parametrize("dot_products", [True, False, None])
def test_quantize_static_has_weights_of_7_bits_where_its_guide_says_so(
    dot_products: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime.quantization as theirs
    from onnxruntime.quantization import shape_inference

    asked = []

    def quantize_static(source: Path, target: Path, *_: object, **settings: object) -> None:
        target.write_bytes(b"")
        asked.append(settings["reduce_range"])

    monkeypatch.setattr(theirs, "quantize_static", quantize_static)
    monkeypatch.setattr(shape_inference, "quant_pre_process", lambda *_: None)
    monkeypatch.setattr(peers.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(peers.machine, "dot_products_in", lambda _: dot_products)
    peers._ort_static(tmp_path / "in.onnx", tmp_path / "out.onnx", [], None)
    assert asked == [dot_products is False]


def test_answers_are_held_against_the_published_network_in_the_same_runtime(
    images: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Always:
        num_classes = material.CLASSES

        def __init__(self, path: str, *_: object, precision: str) -> None:
            if path == "broken":
                raise TargetError("two outputs", "give one")
            self.answer = int(path)

        def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(images_BCHW), self.num_classes)
            logits[:, self.answer] = 1
            return logits

    monkeypatch.setattr(speed, "open_predictor", Always)
    samples = material.open_samples(images, "val")
    labels = list(samples.labels)
    right, other = labels[0], next(label for label in labels if label != labels[0])
    never = material.CLASSES - 1
    entries = [
        speed.Entry(key, "", key.partition("/")[2], made)
        for key, made in {
            "published/OpenVINO": peers.Made(Path(str(right))),
            "ours/OpenVINO": peers.Made(Path(str(never))),
            "broken/OpenVINO": peers.Made(Path("broken")),
            "absent/OpenVINO": peers.Made(Path("absent"), "not installed"),
            "published/ONNX Runtime": peers.Made(Path(str(other))),
            "ours/ONNX Runtime": peers.Made(Path(str(other))),
        }.items()
    ]
    found = speed.answers_of(entries, images, len(samples), Console(quiet=True))
    share = round(100 * labels.count(right) / len(labels), 2)
    assert found["published/OpenVINO"]["top1"] == share > 0
    value, low, high = found["ours/OpenVINO"]["lost"]
    assert value == share and low < value < high
    assert found["ours/OpenVINO"]["same"] == 0
    assert found["ours/ONNX Runtime"]["lost"][0] == 0
    assert found["ours/ONNX Runtime"]["same"] == 100
    assert found["broken/OpenVINO"] == {"reason": "two outputs Fix: give one"}
    assert found["absent/OpenVINO"] == {"reason": "not installed"}


def test_a_trained_checkpoint_brings_its_images_and_a_folder_of_its_own(
    images: DataSection, tmp_path: Path
) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(b"weights")
    trained = material.Trained(path, images, 40)
    scale = material.Scale("mine", SIZE, trained)
    recipe = material.recipe_for("int8_ptq", scale, tmp_path)
    assert recipe.model.checkpoint == str(path)
    assert recipe.data == images
    assert scale.name == f"mine_{SIZE}"
    before = scale.folder
    cropped = images.model_copy(update={"crop_pct": 0.9})
    other = material.Scale("mine", SIZE, material.Trained(path, cropped, 40))
    assert other.folder != before
    path.write_bytes(b"other weights")
    assert scale.folder != before


def test_a_checkpoint_without_images_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["speed.py", "--ckpt", "mine.pth"])
    with pytest.raises(SystemExit) as stopped:
        speed.main()
    assert stopped.value.code == 2
    assert "--ckpt and --data belong together" in capsys.readouterr().err


def test_ratios_are_within_a_runtime() -> None:
    def turns(*medians: float) -> Latency:
        return Latency(tuple(np.full(3, value) for value in medians), 1)

    timed = {
        "published/OpenVINO": turns(12, 12.4, 11.8),
        "int8/OpenVINO": turns(6, 6.2, 5.9),
        "other/OpenVINO": turns(9, 9.3, 8.85),
        "published/ONNX Runtime": turns(100, 100, 100),
    }
    entry = speed.Entry("other/OpenVINO", "other", "OpenVINO", peers.Made(Path("x.xml")))
    row = speed.row_of(entry, timed, "")
    assert row["over_published"] == pytest.approx([4 / 3] * 3, abs=1e-3)
    assert row["int8_over_it"] == pytest.approx([1.5] * 3)
    assert not row["noisy"]


def made_up(dot_products: bool = True) -> dict[str, Any]:
    rows = [
        {
            "key": key,
            "what": what,
            "runtime": "OpenVINO",
            "ms": {"p50": ms, "p90": ms, "p99": ms},
            "over_published": [12 / ms, 1.0, 2.5],
            "int8_over_it": [ms / 6, 0.5, 2.5],
            "noisy": noisy,
        }
        for key, what, ms, noisy in (
            ("published/OpenVINO", "published network, FP32", 12.0, False),
            ("int8/OpenVINO", "ours, INT8", 6.0, True),
        )
    ]
    missing = {"key": "nncf/OpenVINO", "what": "NNCF", "runtime": "OpenVINO", "reason": "a | b"}
    setting = {"batch": 1, "threads": 1, "load_average": [0.5, 1.25], "rows": [*rows, missing]}
    return {
        "arch": "care_s0",
        "resolution": 224,
        "date": "2026-01-01",
        "revision": "0123456789",
        "machine": {
            "cpu": {
                "name": "a processor",
                "physical_cores": 2,
                "logical_cores": 2,
                "features": {"avx2": True, "avx512_vnni": dot_products},
            },
            "libraries": {"openvino": "1", "onnxruntime": "2", "nncf": "3"},
        },
        "files": {"int8/OpenVINO": {"file": "int8.xml", "sha256": "ab" * 32, "bytes": 1}},
        "settings": [setting],
    }


def grown() -> dict[str, Any]:
    row = {"what": "ours", "ms": [1.0, 4.0], "exponent": [1.0, 0.9, 1.1], "noisy": False}
    part = {"points": [100, 400], "rows": [row] * 3}
    lone = {"points": [1], "rows": [{**row, "ms": [1.0], "exponent": None}] * 3}
    return {
        "arch": "care_s0",
        "date": "2026-01-01",
        "load_average": [0.1, 0.2],
        "resolution": part,
        "batch": part,
        "threads": lone,
        "pipeline": {
            "images": {"points": [64, 128], "seconds": [3.0, 6.0]},
            "macs": {"points": [5e6, 7e8], "names": ["small", "large"], "seconds": [1.0, 9.0]},
        },
    }


def test_the_page_holds_tables_and_plots_and_keeps_what_people_wrote(tmp_path: Path) -> None:
    docs = tmp_path
    (docs / "performance").mkdir()
    (docs / "performance" / "care_s0.json").write_text(json.dumps(made_up()))
    (docs / "performance" / "growth.json").write_text(json.dumps(grown()))
    (docs / "PERFORMANCE.md").write_text(f"# Mine\n{page.BEGIN}\nold\n{page.END}\nyours\n")
    page.write_page(docs)
    text = (docs / "PERFORMANCE.md").read_text()
    assert text.startswith("# Mine\n") and text.endswith(f"{page.END}\nyours\n")
    assert "old" not in text
    assert "| OpenVINO | ours, INT8 | 6.00 (noisy) | 2.00x [1.00, 2.50] |  |" in text
    assert "| NNCF | does not run: a / b |" in text
    assert "load average 0.5 before, 1.2 after" in text
    assert "`abababababababab` `int8.xml`" in text
    assert "| ours | 1.0 | 4.0 | 1.00 [0.90, 1.10] |" in text
    assert "| seconds | 3.0 | 6.0 |" in text
    assert "small, 5 M MACs | large, 700 M MACs |" in text
    for name in ("care_s0", "growth"):
        assert f"(performance/{name}.svg)" in text
        svg = (docs / "performance" / f"{name}.svg").read_text()
        assert "<svg" in svg and len(svg) < 100_000
    page.write_page(docs)
    assert (docs / "PERFORMANCE.md").read_text() == text


def test_the_page_takes_what_other_benches_leave_beside_its_own(tmp_path: Path) -> None:
    store = tmp_path / "performance"
    store.mkdir()
    (tmp_path / "PERFORMANCE.md").write_text(f"{page.BEGIN}\n{page.END}\n")
    (store / "slim_care_s0.json").write_text(json.dumps({"name": "care_s0", "files": {}}))
    (store / "engines_care_s0.json").write_text(json.dumps({"name": "care_s0", "rows": []}))
    page.write_page(tmp_path)
    assert "care_s0" not in (tmp_path / "PERFORMANCE.md").read_text()
    about = made_up()
    both = {"published FP32": [2.0, 1.9, 2.1], "ours FP32": [1.5, 1.4, 1.6]}
    row = {"task": "segmentation", "what": "ours INT8, OpenVINO", "ms": 80.04, "over": both}
    growth = {"points": [65536, 262144], "rows": [{**grown()["resolution"]["rows"][0]}]}
    told = {
        **{key: about[key] for key in ("arch", "date", "machine")},
        "side": 512,
        "load_average": [0.1, 0.2],
        "rows": [{**row, "noisy": False}],
        "growth": growth,
    }
    (store / "dense_care_s0.json").write_text(json.dumps(told))
    page.write_page(tmp_path)
    text = (tmp_path / "PERFORMANCE.md").read_text()
    assert "### Masks at 512x512: care_s0, with integer dot products" in text
    ratios = "2.00x [1.90, 2.10] | 1.50x [1.40, 1.60]"
    assert f"| segmentation | ours INT8, OpenVINO | 80.0 | {ratios} |" in text
    assert "| ms over pixels, masks | 65,536 | 262,144 | exponent [95 %] |" in text
    assert "| ours | 1.0 | 4.0 | 1.00 [0.90, 1.10] |" in text


def test_answers_stand_beside_the_speed_of_a_trained_checkpoint() -> None:
    trained = made_up()
    rows = trained["settings"][0]["rows"]
    rows.insert(2, {**rows[1], "key": "aimet/OpenVINO", "what": "AIMET"})
    trained["answers"] = {
        "published/OpenVINO": {"images": 1234, "top1": 77.5, "lost": [0, -0.1, 0.1], "same": 100},
        "int8/OpenVINO": {"images": 1234, "top1": 77.4, "lost": [0.1, -0.2, 0.4], "same": 99.5},
        "aimet/OpenVINO": {"reason": "c | d"},
        "nncf/OpenVINO": {"reason": "a | b"},
    }
    table = page.table_of(trained)
    assert "has 77.50 %, on 1,234 validation images" in table
    assert "| 6.00 (noisy) | 2.00x [1.00, 2.50] |  | 0.10 [-0.20, 0.40] | 99.50 % |" in table
    lines = [line for line in table.splitlines() if line.startswith("| ") or "|---" in line]
    assert {line.count("|") for line in lines} == {8}
    assert any("| AIMET | 6.00" in line and "not scored: c / d" in line for line in lines)
    assert any("| NNCF | does not run: a / b |" in line for line in lines)
    assert "weights are random" in page.table_of(made_up())


def test_a_class_of_processors_does_not_overwrite_the_other(tmp_path: Path) -> None:
    store = tmp_path / "performance"
    store.mkdir()
    for suffix, dot_products in (("", True), (page.WITHOUT, False)):
        (store / f"care_s0{suffix}.json").write_text(json.dumps(made_up(dot_products)))
        (store / f"growth{suffix}.json").write_text(json.dumps(grown()))
    (tmp_path / "PERFORMANCE.md").write_text(f"{page.BEGIN}\n{page.END}\n")
    page.write_page(tmp_path)
    text = (tmp_path / "PERFORMANCE.md").read_text()
    for word in ("with", "without"):
        assert f"### care_s0, 224x224, {word} integer dot products" in text
        assert f"### How time grows: care_s0, {word} integer dot products" in text
    for name in ("care_s0", "growth"):
        for suffix in ("", page.WITHOUT):
            assert f"![{name}{suffix}](performance/{name}{suffix}.svg)" in text
            assert (store / f"{name}{suffix}.svg").is_file()


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "PERFORMANCE.md").write_text("mine alone")
    with pytest.raises(CareError, match="markers"):
        page.write_page(tmp_path)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_exponent_is_found_in_spite_of_busy_turns(power: float) -> None:
    points = [128**2, 224**2, 512**2]
    rng = np.random.default_rng(0)
    busy = rng.uniform(1, 3, (15, 1))  # a turn is slow as a whole
    noise = rng.normal(1, 0.02, (15, 3))
    found = growth.exponent(points, 1e-4 * np.array(points, float) ** power * busy * noise)
    assert found is not None
    value, low, high = found
    assert low <= value <= high
    assert value == pytest.approx(power, abs=0.05)
    assert growth.exponent([1], np.ones((15, 1))) is None


def test_curves_time_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "PLAN", LatencyPlan(0.001, 3, 1, 3))
    calls = dict.fromkeys(range(3), 0)

    def run(at: int) -> None:
        calls[at] += 1

    found = growth.curves({"x": [lambda at=at: run(at) for at in range(3)]}, [1, 2, 3])  # type: ignore[misc]
    assert found["points"] == [1, 2, 3]
    assert len(found["rows"][0]["ms"]) == 3
    assert min(calls.values()) > 3


def test_a_changed_file_is_not_benched(tmp_path: Path) -> None:
    folder = tmp_path / "exports" / "onnxruntime-cpu"
    folder.mkdir(parents=True)
    (folder / "int8.onnx").write_bytes(b"other")
    recipe = material.load_recipe("int8_ptq")
    model = {"file": "int8.onnx", "sha256": "0" * 64}
    results = {"exports": {"onnxruntime-cpu": {"models": {"int8": model}}}}
    with pytest.raises(RunError, match="not the file that was evaluated"):
        material.Finished(tmp_path, recipe, results).file("onnxruntime-cpu")


ROOT = Path(__file__).resolve().parents[1]


def test_every_planted_bug_stands_once_and_has_its_tests() -> None:
    # Code that moves takes its bugs along, or `make mutants` ends at the first one that is lost.
    listed = yaml.safe_load((ROOT / "bench" / "mutants.yaml").read_text(encoding="utf-8"))
    names = [one["name"] for one in listed]
    assert len(set(names)) == len(names) >= 120
    for one in listed:
        text = (ROOT / "care_compress" / one["file"]).read_text(encoding="utf-8")
        assert text.count(one["old"]) == 1, one["name"]
        files = [word for word in one["tests"].split() if word.startswith("tests/")]
        assert files and all((ROOT / file.split("::")[0]).exists() for file in files), one["name"]
