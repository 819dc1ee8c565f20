"""Files that are read only so far, written whole, and told apart by what they hold."""

import json
import math
import stat
from pathlib import Path

import pytest

from care_compress.errors import RunError
from care_compress.files import (
    atomic_file,
    digest_of,
    fingerprint,
    json_text,
    not_finite,
    read_whole,
    sha256_file,
    size_of,
    sweep,
    write_text,
)


def test_a_file_is_read_up_to_its_limit_and_not_beyond(tmp_path: Path) -> None:
    path = tmp_path / "ten"
    path.write_bytes(b"0123456789")
    assert read_whole(path, 10) == b"0123456789"
    with pytest.raises(OSError, match="10 bytes, more than 9"):
        read_whole(path, 9)


def test_a_model_of_two_files_is_both_of_them(tmp_path: Path) -> None:
    graph, weights = tmp_path / "model.xml", tmp_path / "model.bin"
    graph.write_bytes(b"graph")
    weights.write_bytes(b"weights")
    before = digest_of(graph)
    assert size_of(graph) == 5 + 7
    assert before not in (sha256_file(graph), sha256_file(weights))
    weights.write_bytes(b"Weights")
    assert digest_of(graph) != before, "other weights are another model"
    alone = tmp_path / "model.onnx"
    alone.write_bytes(b"graph")
    assert (size_of(alone), digest_of(alone)) == (5, sha256_file(alone))


def test_every_figure_that_is_none_is_found_where_it_stands() -> None:
    value = {"a": [1.0, math.nan], "b": {"c": (math.inf, 2)}, "d": -math.inf, "e": "nan"}
    assert list(not_finite(value)) == ["a.1", "b.c.0", "d"]
    with pytest.raises(RunError, match=r"^a\.1 came out as no number"):
        json_text(value)
    assert json.loads(json_text({"a": [1, None]})) == {"a": [1, None]}


def test_a_fingerprint_tells_types_and_nesting_apart() -> None:
    values = [1, "1", [1], {"1": 1}, None, "None", [1, 2], [2, 1], [[1], 2], 1.5, True]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint({"a": Path("x")}) == fingerprint({"a": "x"})


def test_what_is_written_is_whole_and_as_readable_as_any_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "grüße")
    assert path.read_bytes() == "grüße".encode()
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text(encoding="utf-8") == "grüße"
    assert path.read_text() == "half" and [one.name for one in path.parent.iterdir()] == ["a.txt"]


def test_only_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    for name in (".a.x.tmp", "sub/.b.y.tmp", "sub/.folder.tmp/inside", "kept.tmp", ".kept"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sweep(tmp_path)
    left = {str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()}
    assert left == {"kept.tmp", ".kept"}
