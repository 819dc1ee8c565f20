"""The page of a run whose answers have a place: its own metric, classes, and what was drawn."""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from masks import compared
from PIL import Image

from care_compress.evaluate.comparison import comparison_as_json
from care_compress.evaluate.differences import FOLDER, KINDS
from care_compress.report.accuracy import accuracy
from care_compress.report.blocks import PageSection, SideBySide, Table
from care_compress.report.differences import read_pictures
from care_compress.report.layers import changes
from care_compress.report.sources import Sources
from care_compress.report.summary import verdict
from care_compress.report.write import as_html, as_markdown

SCHEMAS = Path(as_html.__code__.co_filename).parent
HOSTILE = '"><script>pwned</script>'


@pytest.fixture
def compare(tmp_path: Path) -> dict[str, Any]:
    """compare.json of a run in `tmp_path`, with one image drawn."""
    value = json.loads(json.dumps(comparison_as_json(compared(tmp_path, [0, 300], [100, 80]))))
    (tmp_path / FOLDER).mkdir()
    pictures = {}
    for shade, kind in enumerate(KINDS):
        path = tmp_path / FOLDER / f"1-{kind}.png"
        Image.new("RGB", (48, 32), (60 * shade, 90, 90)).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        pictures[kind] = {"file": f"{FOLDER}/{path.name}", "sha256": digest}
    one = {"name": f"val/{HOSTILE}", "index": 10, "agreement": 80.0, "pictures": pictures}
    legend = {"road": "#0072b2", HOSTILE: "red"}
    names = {"target": value["pairs"][0]["target"], "baseline": "float", "candidate": "mine"}
    return {**value, "pictures": {**names, "legend": legend, "images": [one]}}


@pytest.fixture
def sources(tmp_path: Path, compare: dict[str, Any]) -> Sources:
    scores = {"miou": 84.0, "pixel_accuracy": 90.0}
    pair = {"images": 2, **scores, "drop": 16.0, "drop_ci95": [10, 20], "agreement": 90.0}
    results = {
        "run": "mine",
        "recipe": "seg_int8_ptq",
        "precision": "int8",
        "task": "segmentation",
        "accuracy": {"images": 2, **scores},
        "float": {"miou": 100.0, "pixel_accuracy": 100.0},
        "backend": "torchao",
        "kept": "ptq",
        "candidates": {"ptq": {**pair, "sqnr_db": 20.0}},
        "budget": {"max_miou_drop": 0.5, "met": False},
        "exports": {},
    }
    pictures = read_pictures(tmp_path, compare)
    evidence = {"missing": {"answers": "compare draws them", "layers": "none"}}
    return Sources("mine", results, {}, {}, evidence, "", compare=compare, pictures=pictures)


def test_everything_is_told_by_the_metric_of_the_task(sources: Sources) -> None:
    sections = [
        PageSection("verdict", "Verdict", verdict(sources)),
        PageSection("accuracy", "Accuracy", accuracy(sources)),
    ]
    for said in (as_html(sources, sections), as_markdown(sources, sections)):
        assert "an mIoU drop of" in said and "more than the 0.5" in said
        assert "Same places as float" in said and "pixel accuracy %" in said
        assert not re.search("top-1|McNemar", said)


def test_classes_stand_with_the_worst_first_and_unseen_ones_last(sources: Sources) -> None:
    (table,) = [
        one
        for one in accuracy(sources)
        if isinstance(one, Table) and one.caption.startswith("IoU of each class")
    ]
    assert table.columns == ("class", "float %", "mine %", "drop")
    names = [row[0].text for row in table.rows]
    assert names == ["road", "background", "car"]
    assert [cell.text for cell in table.rows[2][1:]] == ["", "", ""], "no image shows a car"
    assert table.rows[0][3].text == f"{300 / 2000 * 100:.2f}"


def test_the_page_shows_both_answers_and_runs_nothing(sources: Sources) -> None:
    blocks = changes(sources)
    page = as_html(sources, [PageSection("answers", "Answers", blocks)])
    picture = r'<img src="data:image/jpeg;base64,[^"]+" loading="lazy" alt="([^"]+)">'
    images = re.findall(picture, page)
    assert len(images) == 3 and "as float answers" in images[1] and "80.0 %" in images[2]
    assert page.count("<script") == 1 and "style=" not in page, "the page's own"
    (block,) = blocks
    assert isinstance(block, SideBySide)
    assert list(block.legend) == ["road"], "red is no colour that compare writes"
    assert "80.0 % of places the same" in as_markdown(sources, [PageSection("a", "A", blocks)])


def test_without_pictures_the_page_says_what_draws_them(sources: Sources) -> None:
    (block,) = changes(replace(sources, pictures=()))
    assert "compare draws them" in str(block)


@pytest.mark.parametrize("fault", ["changed", "gone", "no picture", "elsewhere", "a pipe"])
def test_a_picture_that_compare_did_not_draw_is_left_out(
    tmp_path: Path, compare: dict[str, Any], fault: str
) -> None:
    assert len(read_pictures(tmp_path, compare)) == 1
    path, about = tmp_path / FOLDER / "1-after.png", compare["pictures"]["images"][0]["pictures"]
    if fault == "changed":
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    elif fault == "no picture":
        path.write_text("<svg/>")
        about["after"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        path.rename(tmp_path / "secret.png")
        if fault == "elsewhere":
            about["after"]["file"] = f"{FOLDER}/../secret.png"
        elif fault == "a pipe":
            os.mkfifo(path)
    assert read_pictures(tmp_path, compare) == []


def test_a_comparison_follows_the_schema_of_its_task(compare: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    schema = json.loads((SCHEMAS / "compare.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    compare["pictures"]["legend"].pop(HOSTILE)
    compare["machine"]["load_average"] = {"before": 0.1, "after": 0.2}
    validator.validate(compare)
    for wrong in ({"task": "detection"}, {"task": "classification"}, {"task": "another"}):
        assert list(validator.iter_errors({**compare, **wrong})), wrong
