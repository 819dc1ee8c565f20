"""The field of `tune` and the layers behind it, as compare shows them at home."""

import json
from pathlib import Path
from typing import Any

import pytest
from comparison import board_results, cpu_results, engine_speed, field_row
from rich.console import Console

from care_compress.evaluate.compare import device_verdict
from care_compress.evaluate.device_field import device_field, field_tables
from care_compress.evaluate.device_measurements import (
    DeviceResultsError,
    device_measurements,
    fastest_of,
    import_results,
)

SCHEMA = Path(__file__).parents[2] / "care_compress" / "report" / "compare.schema.json"


def taken(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What a run knows of a board after its results were imported."""
    (folder / "results.json").write_text(json.dumps(results))
    import_results(folder / "results.json", folder / "mine")
    (found,) = device_measurements(folder / "mine")
    return found


def printed(field: dict[str, Any]) -> str:
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as capture:
        for table in field_tables(field):
            console.print(table)
    return capture.get()


def test_the_field_is_what_the_schema_says_and_shows_every_reason(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    field = device_field("mine", taken(tmp_path, board_results("mine")))
    assert field is not None
    schema = json.loads(SCHEMA.read_text())
    written = json.loads(json.dumps(field))
    jsonschema.validate(written, {"$defs": schema["$defs"], "$ref": "#/$defs/field"})
    assert [one["passed"] for one in field["candidates"]] == [True, False], "the fastest first"
    text = printed(field)
    assert "kept: the fastest" in text and "no tactic for node 7" in text
    assert field["layers"]["int8"]["by_kind"]["integer products"]["share"] == pytest.approx(1 / 3)
    assert field["layers"]["fp16"]["layers_ms"] == pytest.approx(0.36)
    assert "The slowest layers of int8" in text and "head" in text


def test_a_processor_and_a_board_that_only_verified_have_no_field(tmp_path: Path) -> None:
    assert device_field("mine", taken(tmp_path, cpu_results("mine"))) is None
    plain = board_results("mine")
    plain |= {"candidates": {}, "winner": None, "measured_at": "2026-11-21"}
    for one in plain["models"].values():
        del one["layer_times"]
    (tmp_path / "there").mkdir()
    assert device_field("mine", taken(tmp_path / "there", plain)) is None


def test_a_variant_that_is_faster_speaks_for_its_precision(tmp_path: Path) -> None:
    results = board_results("mine")
    late = json.loads(json.dumps(results["models"]["int8"]))
    late["speed"] = {**engine_speed(0.18), "measured_at": "2026-11-20"}
    results["models"]["int8-late"] = late
    found = taken(tmp_path, results)
    assert fastest_of(found, "int8") == "int8-late" and fastest_of(found, "fp16") == "fp16"
    said = device_verdict("mine", "int8", found)
    assert said is not None and said.pays is True
    assert "int8-late runs 2.00x over FP16" in said.text
    late["accuracy"]["passed"] = False
    wrong = taken(tmp_path, {**results, "measured_at": "2026-11-22"})
    assert fastest_of(wrong, "int8") == "int8", "what answers wrongly is no engine"
    said = device_verdict("mine", "int8", wrong)
    assert said is not None and "1.16x over FP16" in said.text


def test_engines_that_were_timed_with_the_gap_are_not_shown(tmp_path: Path) -> None:
    results = board_results("mine")
    stored = tmp_path / "mine" / "measured" / "tensorrt-jetson-orin.old.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps(results | {"format": 1, "models": "as they were"}))
    assert device_measurements(tmp_path / "mine") == []
    with pytest.raises(DeviceResultsError, match="format"):
        taken(tmp_path, results | {"format": 1})


def test_results_without_anything_measured_are_refused(tmp_path: Path) -> None:
    nothing = board_results("mine") | {"models": {}, "candidates": {}}
    with pytest.raises(DeviceResultsError, match="nothing was measured"):
        taken(tmp_path, nothing)


def test_candidates_of_another_export_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "exports" / "tensorrt-jetson-orin"
    folder.mkdir(parents=True)
    export = {"fingerprint": "c" * 64, "models": {"int8-late": {"sha256": "e" * 64}}}
    (folder / "export.json").write_text(json.dumps(export))
    with pytest.raises(DeviceResultsError, match="int8-late comes from another graph"):
        taken(tmp_path, board_results("mine"))


def test_candidates_stand_by_batch_and_median_and_layers_by_their_time(tmp_path: Path) -> None:
    results = board_results("mine")
    steady, uneven = engine_speed(0.31), engine_speed(0.30)
    uneven["latency_ms"]["p99"] = 9.0
    eight = {**engine_speed(0.01), "batch": 8}
    results["candidates"] = {
        "large": {**field_row("int8", "passed", speed=eight), "batch": 8},
        "broken": field_row("int8", "failed", reason="no tactic"),
        "steady": field_row("int8", "passed", speed=steady),
        "uneven": field_row("int8", "passed", speed=uneven),
    }
    field = device_field("mine", taken(tmp_path, {**results, "winner": "uneven"}))
    assert field is not None
    names = [one["name"] for one in field["candidates"]]
    assert names == ["uneven", "steady", "broken", "large"]
    *_, slowest = printed(field).partition("The slowest layers of int8")
    assert slowest.index("head") < slowest.index("stem"), "the head takes two thirds"
