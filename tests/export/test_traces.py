"""Traces kept for the next process: the same graph as without, and never one of other code."""

import copy
import os
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from quantized import SIZE, care, network
from torch import Tensor, nn

from care_compress.export import to_onnx, traces
from care_compress.export.to_onnx import float_graph
from care_compress.model.rewrite import rewrite
from care_compress.model.structure import Latest
from care_compress.recipe.sections import RewriteSection

TRACE, MADE = to_onnx._trace, dict[type, onnx.ModelProto]()  # of the structures below, made once


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[nn.Module]:
    """The networks that had to be traced, beginning with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)
    found: list[nn.Module] = []

    def counted(network: nn.Module, resolution: int) -> onnx.ModelProto:
        found.append(network)
        if type(network) not in MADE:
            MADE[type(network)] = TRACE(network, resolution)
        return copy.deepcopy(MADE[type(network)])

    monkeypatch.setattr(to_onnx, "_trace", counted)
    return found


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process begins."""
    monkeypatch.setattr(traces, "_latest", Latest(traces.HELD))


def graph(of: nn.Module) -> bytes:
    return ir.to_proto(float_graph(of, SIZE)).SerializeToString(deterministic=True)


def test_another_process_traces_nothing_and_has_its_own_numbers(
    traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, other = network(), rewrite(care(seed=1), RewriteSection(fold_norms=False))
    expected = graph(first), graph(other)
    assert len(traced) == 1 and expected[0] != expected[1]
    forget(monkeypatch)
    assert (graph(first), graph(other)) == expected
    assert len(traced) == 1
    (kept,) = (tmp_path / "care-compress" / "traces").iterdir()
    assert kept.stat().st_size < 0.2 * len(expected[0]), "no numbers"


@pytest.mark.parametrize("spoil", [b"", b"not a trace", None], ids=["empty", "other", "cut"])
def test_a_damaged_trace_is_made_again(
    spoil: bytes | None, traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = graph(network())
    (kept,) = (tmp_path / "care-compress" / "traces").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] if spoil is None else spoil)
    forget(monkeypatch)
    assert graph(network()) == expected and len(traced) == 2
    forget(monkeypatch)
    assert graph(network()) == expected and len(traced) == 2, "and kept"


def test_changed_code_traces_anew(traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    graph(network())
    monkeypatch.setattr(traces, "code_digest", lambda *modules: "changed")
    forget(monkeypatch)
    graph(network())
    assert len(traced) == 2


def test_another_exporter_traces_anew(
    traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph(network())
    monkeypatch.setattr(traces, "installed_versions", lambda names: {"torch": "99"})
    forget(monkeypatch)
    graph(network())
    assert len(traced) == 2


def test_a_trace_that_is_read_is_not_the_next_to_be_forgotten(
    traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph(network())
    (kept,) = (tmp_path / "care-compress" / "traces").iterdir()
    os.utime(kept, (1e9, 1e9))
    forget(monkeypatch)
    graph(network())
    assert kept.stat().st_mtime > 1e9 and len(traced) == 1


def test_without_a_place_to_keep_them_graphs_are_made_all_the_same(
    traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = graph(network())
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    forget(monkeypatch)
    assert graph(network()) == expected


def test_a_cache_that_can_only_be_read_is_read(
    traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = graph(network())

    def refused(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "touch", refused)
    forget(monkeypatch)
    assert graph(network()) == expected and len(traced) == 1


class Twice(nn.Module):
    """A network of somebody else's code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.conv(x).mean((2, 3))


def test_of_code_that_is_not_ours_nothing_is_kept(
    traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph(Twice())
    forget(monkeypatch)
    graph(Twice())
    assert len(traced) == 2 and not (tmp_path / "care-compress").exists()


def test_the_cache_forgets_what_nobody_asked_for_the_longest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(traces, "KEPT", 2)
    paths = [tmp_path / f"{name}.onnx" for name in "abc"]
    for age, path in zip((30, 10, 0), paths, strict=True):
        traces._keep(b"graph", path)
        if age:
            os.utime(path, (1e9 - age, 1e9 - age))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.onnx", "c.onnx"]
