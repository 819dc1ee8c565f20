"""The report of real runs: everything is there, nothing runs, nothing is invented."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from comparison import board_results, comparison, cpu_results, layers
from quantized import care
from rich.console import Console
from tiny import CLASSES, image_folder

from care_compress.errors import RunError
from care_compress.evaluate import evidence
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.report.drawing import ticks
from care_compress.report.sources import read_results
from care_compress.report.write import write_report
from care_compress.tasks.intervals import wilson

SCHEMAS = Path(write_report.__code__.co_filename).parent
QUIET = Console(quiet=True)
CHROMIUM = shutil.which("chromium")
HOSTILE = {
    "blue": "<script>window.pwned=1",  # a slash is no letter of a file name
    "green": "a|b`c`*d*",
    "grey": '"><img src=x onerror=window.pwned=1>',
    "red": "{{ 7*7 }}",
}
SECTIONS = (
    "verdict checks accuracy latency size fidelity layers activations answers training plan "
    "exports manifest"
).split()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four classes of small images with names that a page must not believe."""
    folder = tmp_path_factory.mktemp("start")
    images = image_folder(folder / "images")
    for split in ("train", "val"):
        for name in CLASSES:
            (images / split / name).rename(images / split / HOSTILE[name])
    checkpoint = folder / "four.safetensors"
    save_checkpoint(care(4), checkpoint, {})
    return [
        "data.resolution=32",
        "data.workers=0",
        "export.images=16",
        f"model.checkpoint={checkpoint}",
        f"data.source={images}",
    ]


@pytest.fixture(scope="module")
def bare(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized run, and a sensitivity beside it; the run is copied before it is changed."""
    pytest.importorskip("openvino", reason="needs the openvino extra")
    runs = tmp_path_factory.mktemp("runs")
    targets = "export.targets=[openvino-cpu, onnxruntime-cpu]"
    chosen = [*start, targets, "quantize.calibrate.images=32"]
    run_recipe(load_recipe("int8_ptq", chosen), runs, "int8_ptq", QUIET)
    return runs / "int8_ptq"


@pytest.fixture(scope="module")
def full(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with everything beside it that a report can show."""
    run = tmp_path_factory.mktemp("full") / "int8_ptq"
    shutil.copytree(bare, run)
    found = comparison()
    there = {"available": True, "top1": 77.7, "latency_ms": {"p50": 9.876, "p90": 9.9, "p99": 9.9}}
    on_cpu = {"int8_ptq on Raspberry Pi": {**there, "measured_on": {"board": "Raspberry Pi"}}}
    found["targets"]["onnxruntime-cpu"] |= on_cpu
    put(run / "compare.json", found)
    put(run / "measured" / "tensorrt-jetson-orin.board.json", board_results("int8_ptq"))
    put(run / "measured" / "onnxruntime-cpu.pi.2-threads.json", cpu_results("int8_ptq"))
    points = [{"epoch": float(n), "top1": 90.0 + n, "loss": 1 / n} for n in (1, 2, 3)]
    put(run / "qat" / "history.json", {"validations": points})
    effect = {"sqnr_db": 31.0, "kl": 0.01, "top1": 0.5}
    sites = {"stem.0": {"alone": effect, "left_out": effect}}
    put(run.with_name("int8_ptq_sensitivity") / "sensitivity.json", {"images": 8, "sites": sites})
    write_report(run, QUIET)
    content = json.loads((run / "evidence.json").read_text())
    names = list(HOSTILE.values())
    content["answers"]["flipped"] = [
        {
            "name": f"val/{names[0]}/7.png",
            "label": names[0],
            "before": names[0],
            "after": names[2],
            "sure_before": 0.41,
            "sure_after": 0.4,
            "picture": "data:image/jpeg;base64,/9j/4AAQ",
        }
    ]
    content["answers"]["same"] = 47
    put(run / "evidence.json", content)
    write_report(run, QUIET)
    return run


def put(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def page_of(run: Path) -> str:
    return (run / "report.html").read_text()


def words(page: str) -> str:
    """What a reader of the page sees, on one line."""
    page = re.sub(r"<(script|style)>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


def section(page: str, anchor: str) -> str:
    found = re.search(rf'<section id="{anchor}".*?</section>', page, flags=re.DOTALL)
    assert found is not None, anchor
    return found.group()


def test_sections_stand_in_order_and_the_verdict_is_first(full: Path) -> None:
    page = page_of(full)
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    assert "a top-1 drop of 0.25 points [-0.24, 0.74] on the exported files" in words(page)
    assert "✗ min_speedup openvino-cpu is broken: 1.88, limit 2." in section(page, "verdict")
    text = (full / "report.md").read_text()
    titles = re.findall(r"<h2[^>]*>(.*?)<", page)
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == titles


def test_latency_is_what_compare_and_the_board_measured(full: Path) -> None:
    latency = words(section(page_of(full), "latency"))
    assert "0.520 ms" in latency and "ONNX Runtime has no bfloat16 convolution" in latency
    assert "tensorrt-jetson-orin, measured on NVIDIA Jetson AGX Orin" in latency
    said = words(latency)
    where = "tensorrt-jetson-orin on NVIDIA Jetson AGX Orin"
    assert f"{where}: every way to build the models" in said
    assert "no tactic for node 7" in said and "kept: the fastest" in said
    assert f"{where}: where the time goes" in said
    assert "MAXN" in latency and "tensorrt 10.3.0" in latency
    assert "onnxruntime-cpu, measured on Raspberry Pi 5 Model B, 2 threads" in latency
    assert "9.876" not in latency, "what compare repeats of a device is shown once"


def test_evidence_is_the_models_own(bare: Path) -> None:
    write_report(bare, QUIET)
    content = json.loads((bare / "evidence.json").read_text())
    sites = content["layers"]["sites"]
    assert {one["site"] for one in sites} == {one["name"] for one in content["plan"]["sites"]}
    assert all(5 < one["sqnr_db"] <= 200 for one in sites)
    assert len(content["layers"]["histograms"]) == 6
    for one in content["layers"]["histograms"]:
        assert sum(one["before"]) == sum(one["after"]) == one["values"]
        assert one["range"][0] < one["range"][1] and one["clipped"] <= one["values"]
    answers = content["answers"]
    results = json.loads((bare / "results.json").read_text())
    assert answers["images"] == results["accuracy"]["images"] == 48
    kept = results["candidates"]["ptq"]
    assert 100 * answers["same"] / 48 == pytest.approx(kept["agreement"])
    assert 100 * (answers["lost"] - answers["gained"]) / 48 == pytest.approx(kept["drop"])
    flips = sum(one["images"] for one in answers["changes"])
    assert flips == 48 - answers["same"] and len(answers["flipped"]) == min(flips, 24)


def test_memory_of_every_compared_file_is_shown(full: Path, bare: Path) -> None:
    size = section(page_of(full), "size")
    assert "39.20 MB" in size and "20.80 MB" in size, "of fp32 and int8_ptq on openvino-cpu"
    write_report(bare, QUIET)
    assert "Memory has not been measured" in section(page_of(bare), "size")


def test_flipped_images_are_shown_with_both_answers(full: Path) -> None:
    answers = section(page_of(full), "answers")
    assert answers.count("<img ") == 1 and 'src="data:image/jpeg;base64,/9j/4AAQ"' in answers
    assert 'alt="&lt;script&gt;' in answers
    assert "✗ lost" in answers and "(41\u00a0%)" in answers


def test_names_are_shown_and_never_run(full: Path, tmp_path: Path) -> None:
    run = tmp_path / "hostile"
    shutil.copytree(full, run)
    results = json.loads((run / "results.json").read_text())
    evil = "</script><script>window.pwned=1</script>"
    results["run"] = results["recipe"] = evil
    results["exports"]["onnxruntime-cpu"] = {"target": evil, "failed": f"{evil} | `x`\nsecond"}
    put(run / "results.json", results)
    write_report(run, QUIET)
    page = page_of(run)
    assert page.count("<script") == 1, "the page's own"
    assert "<img src=x" not in page and "onerror" not in re.sub(r"&lt;.*?&gt;", "", page)
    assert evil in words(page)
    text = (run / "report.md").read_text()
    assert "<" not in text and "\\|" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    bars = re.compile(r"(?<!\\)\|")
    for first, second in zip(tables, tables[1:], strict=False):
        if second.startswith("| ---"):
            assert len(bars.findall(first)) == len(bars.findall(second))


def test_the_page_loads_nothing(full: Path) -> None:
    page = page_of(full)
    assert "http://" not in page and "https://" not in page
    sources = re.findall(r'(?:src|href)="([^#][^"]*)', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page


def test_what_is_missing_is_said_with_its_command(bare: Path) -> None:
    write_report(bare, QUIET)
    page = page_of(bare)
    said = words(page)
    for command in (
        "python eval/compare.py fp32 int8_ptq",
        "care-compress sensitivity int8_ptq --name int8_ptq_sensitivity",
        "import-results",
        "make quantize RECIPE=int8_qat",
    ):
        assert command in said, command
    assert "in simulation" in section(page, "verdict")
    assert not re.search(r"\d ms", words(section(page, "latency"))), "nothing was timed"


def test_a_comparison_without_targets_still_shows_its_models(bare: Path, tmp_path: Path) -> None:
    run = tmp_path / "int8_ptq"
    shutil.copytree(bare, run)
    put(run / "compare.json", {**comparison(), "targets": {}, "verdicts": [], "budgets": []})
    write_report(run, QUIET)
    page = page_of(run)
    assert "Exported files on 400 images" in section(page, "accuracy")
    assert not re.search(r"\d ms", words(section(page, "latency")))


def test_layers_stand_beside_the_baselines_and_their_names_never_run(
    bare: Path, tmp_path: Path
) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    run = tmp_path / "int8_ptq"
    shutil.copytree(bare, run)
    value = comparison()
    evil = "<script>window.pwned=1</script>"
    on = value["targets"]["openvino-cpu"]
    on["fp32"] |= layers("f32", 0.75, convert=False)
    on["int8_ptq"] |= layers("u8", 0.25, convert=True)
    on["int8_ptq"]["layers"].append({**on["int8_ptq"]["layers"][0], "sites": [evil], "kind": evil})
    jsonschema.validate(value, json.loads((SCHEMAS / "compare.schema.json").read_text()))
    put(run / "compare.json", value)
    write_report(run, QUIET)
    page = page_of(run)
    assert page.count("<script") == 1, "the page's own"
    said = words(section(page, "latency"))
    assert "openvino-cpu: where the time goes, batch 1, one thread" in said
    assert "stem.0 Convolution u8 0.250 66.7 f32 0.750 3.00" in said, "beside the baseline's"
    assert "made by the runtime Reorder f32 0.125 33.3" in said, "the cost of reordering"


def test_images_that_moved_away_are_a_reason(bare: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(bare, run)
    (run / "evidence.json").unlink(missing_ok=True)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"source: .*", "source: gone/away", recipe))
    write_report(run, QUIET)
    assert "It could not be measured" in section(page_of(run), "answers")
    assert not (run / "evidence.json").exists(), "the next report tries again"


def test_equal_files_make_equal_bytes(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [path.read_bytes() for path in write_report(full, QUIET)]
    monkeypatch.setattr(evidence, "_measured", lambda *_: pytest.fail("gathered again"))
    assert [path.read_bytes() for path in write_report(full, QUIET)] == before


def test_evidence_of_another_model_is_gathered_again(bare: Path, tmp_path: Path) -> None:
    write_report(bare, QUIET)
    run = tmp_path / "stale"
    shutil.copytree(bare, run)
    content = json.loads((run / "evidence.json").read_text())
    put(run / "evidence.json", {**content, "key": "of another", "answers": None})
    write_report(run, QUIET)
    again = json.loads((run / "evidence.json").read_text())
    assert again == content


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no results.json"):
        write_report(tmp_path, QUIET)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_results(tmp_path)


def test_results_of_every_kind_follow_the_schema(
    bare: Path, start: list[str], tmp_path: Path
) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    schema = json.loads((SCHEMAS / "results.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    results = json.loads((bare / "results.json").read_text())
    validator.validate(results)
    plain = load_recipe("fp32", [*start, "export.targets=[onnxruntime-cpu]"])
    validator.validate(json.loads(json.dumps(run_recipe(plain, tmp_path, "plain", QUIET))))
    write_report(tmp_path / "plain", QUIET)
    assert "A float model" in page_of(tmp_path / "plain")
    skipped = {"openvino-cpu": {"target": "openvino-cpu", "skipped": "it has no such bits"}}
    validator.validate({**results, "exports": skipped})
    for wrong in (
        {"extra": 1},
        {"kept": "best"},
        {"precision": "fp32"},
        {"accuracy": {"images": 48, "top1": 101, "top5": 100}},
        {"exports": {"x": {"target": "x", "skipped": "no", "failed": "no"}}},
    ):
        assert list(validator.iter_errors({**results, **wrong})), wrong
    for needed in ("plan", "budget", "float", "model"):
        assert list(validator.iter_errors({k: v for k, v in results.items() if k != needed}))


@pytest.mark.slow
def test_nncf_follows_the_schema_and_says_why_it_has_no_layers(
    start: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("nncf", reason="needs the openvino extra")
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    few = ["quantize.calibrate.images=32", "export.targets=[openvino-cpu]"]
    recipe = load_recipe("int8_ptq_nncf", [*start, *few])
    results = json.loads(json.dumps(run_recipe(recipe, tmp_path, "nncf", QUIET)))
    schema = json.loads((SCHEMAS / "results.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(results)
    write_report(tmp_path / "nncf", QUIET)
    page = page_of(tmp_path / "nncf")
    assert "OpenVINO's own file" in words(section(page, "layers"))
    assert "answers differ" in words(section(page, "answers"))


def test_compare_follows_its_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    schema = json.loads((SCHEMAS / "compare.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(comparison())
    silent = comparison()
    silent["targets"]["tensorrt-jetson-orin"]["fp32"]["why"] = ""
    assert list(validator.iter_errors(silent)), "what cannot run says why"


def test_intervals_and_axes() -> None:
    assert wilson(90.0, 100) == pytest.approx((82.56, 94.48), abs=0.01)
    assert wilson(100.0, 10)[1] == pytest.approx(100.0) and wilson(0.0, 10)[0] == 0.0
    assert ticks(0.0, 10.0) == [0.0, 5.0, 10.0]
    assert ticks(-3.2, 4.1) == [-2.0, 0.0, 2.0, 4.0]
    assert ticks(3.0, 3.0) == [3.0]


@pytest.fixture(scope="module")
def browsed(full: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page after its own script ran, and what Chromium logged."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    # The click is in a copy: the page itself holds nothing for tests.
    page = page_of(full).replace("script-src '", "script-src 'unsafe-hashes' 'nonce-test' '", 1)
    click = """<script nonce="test">
      const head = [...document.querySelectorAll("#layers th button")]
        .find((button) => button.textContent === "output dB");
      head.click();
      document.body.style.width = "360px";  // no headless window is so narrow
      const outside = [...document.querySelectorAll("body *")]
        .filter((one) => !one.closest("svg") && !one.parentNode.closest(".scroll"))
        .map((one) => one.getBoundingClientRect().right);
      document.title = `wide:${Math.max(...outside)} pwned:${window.pwned}`;
    </script></body>"""
    copy = full.with_name("clicked.html")
    copy.write_text(page.replace("</body>", click))
    done = subprocess.run(
        [*_browser(CHROMIUM, tmp_path_factory.mktemp("profile")), copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=80,
    )
    return done.stdout, done.stderr


def _browser(program: str, profile: Path) -> list[str]:
    quiet = "gpu quic background-networking component-update sync".split()
    return [
        program,
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{what}" for what in quiet),
        f"--user-data-dir={profile}",
        "--window-size=360,800",
        "--enable-logging=stderr",
        "--dump-dom",
    ]


def test_a_browser_shows_it_without_an_error(browsed: tuple[str, str]) -> None:
    dom, log = browsed
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    assert re.findall(r'<section id="(\w+)"', dom) == SECTIONS
    assert "pwned:undefined" in dom, "a class name ran"


def test_tables_sort(browsed: tuple[str, str], full: Path) -> None:
    def column(page: str) -> list[float]:
        table = section(page, "layers").rpartition("<tbody>")[2]
        cells = [re.findall(r"<td.*?</td>", row) for row in table.split("</tr>")]
        return [float(re.sub("<.*?>", "", row[3])) for row in cells if row]

    before, after = column(page_of(full)), column(browsed[0])
    assert before != sorted(before) and after == sorted(before)
    assert 'aria-sort="ascending"' in section(browsed[0], "layers")


def test_a_phone_never_scrolls_sideways(browsed: tuple[str, str]) -> None:
    width = re.search(r"<title>wide:([\d.]+)", browsed[0])
    assert width is not None and 300 < float(width.group(1)) <= 360
