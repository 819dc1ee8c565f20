"""Figures of the first page, from numbers that can be followed by hand."""

from dataclasses import replace
from typing import Any

import pytest
from comparison import layers

from care_compress.report.accuracy import accuracy
from care_compress.report.blocks import Block, Table, Text, Tiles
from care_compress.report.latency import layer_times
from care_compress.report.size import size
from care_compress.report.sources import Sources
from care_compress.report.summary import verdict

PAIR = {"drop": 0.25, "drop_ci95": [-0.24, 0.74], "agreement": 99.5}


@pytest.fixture
def sources() -> Sources:
    """A million weights that were two before, files of 1 and 0.8 MB, and 100 M products."""
    scores = {"top1": 94.75, "top5": 99.0}
    results = {
        "run": "mine",
        "recipe": "int8_ptq",
        "precision": "int8",
        "accuracy": {"images": 400, **scores},
        "float": {"top1": 95.0, "top5": 99.0},
        "backend": "torchao",
        "kept": "ptq",
        "candidates": {"ptq": {"images": 400, **scores, **PAIR, "sqnr_db": 30.0}},
        "budget": {"max_top1_drop": 0.5, "met": True},
        "rewrites": [{"parameters": 2_000_000}, {"parameters": 1_000_000}],
        "plan": {
            "macs": {"w8a8": 70e6, "a8": 10e6, "w8a16": 15e6, "float": 5e6},
            "energy_mj": 0.046,
        },
        "exports": {
            target: {"models": {"int8": {"file": "int8.onnx", "size_bytes": count}}}
            for target, count in (("one", 1_000_000), ("other", 800_000))
        },
    }
    plan = {"sites": [{"macs": 60_000_000}, {"macs": 40_000_000}]}
    missing = {"answers": "none", "layers": "none"}
    return Sources("mine", results, {}, {}, {"plan": plan, "missing": missing}, "")


def tiles_of(blocks: list[Block]) -> dict[str, tuple[str, str]]:
    (found,) = [block for block in blocks if isinstance(block, Tiles)]
    return {tile.label: (tile.value, tile.note) for tile in found.tiles}


def columns(block: Table, *names: str) -> list[tuple[str, ...]]:
    places = [block.columns.index(name) for name in names]
    return [tuple(row[place].text for place in places) for row in block.rows]


def test_what_compression_gave_is_against_the_rewritten_float_network(sources: Sources) -> None:
    tiles = tiles_of(verdict(sources))
    assert tiles["Size"] == ("5.0x", "smaller: 0.80 MB"), "4 bytes a weight, and the smallest file"
    assert tiles["In integers"] == ("80.0 %", "of 100.0 M products"), "a8 and w8a8, no w8a16"
    # 3.7 pJ to multiply in float32 and 0.9 to add: 0.46 mJ.
    assert tiles["Energy"][0] == "10.0x"
    said = " ".join(block.text for block in size(sources) if isinstance(block, Text))
    assert "0.0460 mJ an image, 10.0x below the 0.4600 mJ of float32" in said


@pytest.mark.parametrize(
    ("limit", "tone", "told"),
    [
        (0.5, "good", "though the interval reaches beyond it"),
        (0.74, "good", "within the 0.74 that the recipe allows."),
        (0.25, "good", "though the interval reaches beyond it"),
        (0.2, "bad", "more than the 0.2 that the recipe allows."),
    ],
)
def test_a_drop_is_held_to_its_limit_and_its_interval_is_told(
    sources: Sources, limit: float, tone: str, told: str
) -> None:
    results = {**sources.results, "budget": {"max_top1_drop": limit, "met": limit >= 0.25}}
    first = verdict(replace(sources, results=results))[0]
    assert isinstance(first, Text)
    assert first.tone == tone and first.text.endswith(told if told.endswith(".") else f"{told}.")


def test_every_target_has_the_drop_that_was_found_there(sources: Sources) -> None:
    models = {"fp32": {"top1": 95.0}, "mine": {"top1": 94.0}}
    pairs: list[dict[str, Any]] = [
        {"baseline": "fp32", "candidate": "mine", **PAIR, "target": target, "drop": drop}
        for target, drop in (("one", 0.25), ("other", 1.5))
    ]
    compare = {"images": 400, "targets": {"one": models, "other": models}, "pairs": pairs}
    found = [one for one in accuracy(replace(sources, compare=compare)) if isinstance(one, Table)]
    (files,) = [one for one in found if one.caption.startswith("Exported files")]
    assert columns(files, "target", "model", "drop") == [
        *(("one", "fp32", ""), ("one", "mine", "0.25")),
        *(("other", "fp32", ""), ("other", "mine", "1.50")),
    ]


def test_kernels_of_one_layer_are_added(sources: Sources) -> None:
    mine, plain = layers("u8", 0.25, convert=False), layers("f32", 1.5, convert=False)
    mine["layers"].append({**mine["layers"][0], "ms": 0.5, "share": 0.4})
    compare = {"targets": {"one": {"fp32": plain, "mine": mine}}}
    *_, table = layer_times(replace(sources, compare=compare))
    row = dict(zip(table.columns, [cell.text for cell in table.rows[0]], strict=True))
    assert (row["site"], row["kind"]) == ("stem.0", "Convolution x2")
    assert (row["ms"], row["baseline ms"], row["times"]) == ("0.750", "1.500", "2.00")
