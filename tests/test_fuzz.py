"""The fuzz suite in seconds: hostile files of every kind, each through the door it comes by."""

import io
import json
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
from graphs import onnx_file
from PIL import Image

import care_compress
from care_compress.cli import main
from care_compress.console import Terminal, one_line, shortened
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.sources import open_samples
from care_compress.errors import CareError, RecipeError, TargetError
from care_compress.files import read_json, read_whole
from care_compress.model.checkpoint import load_checkpoint, save_checkpoint
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.runtime.probe import probe

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
RECIPES = {
    "a bomb": LAUGHS,
    "a cycle": "data: &d [*d]",
    "depth": "data: " + "[" * 5000,
    "a call": "x: !!python/object/apply:os.system [touch pwned]",
    "a tag": "seed: !!int ''",
    "a long number": f"seed: {'9' * 100_000}",
    "a NUL": "name: a\0b",
    "a size": "# " + "x" * 300_000,
    "a list as a key": "? [a]\n: 1",
    "an escape code": '"\\e[2J": 1',
}


def ends(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a verb that ends in a named error."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert err[:-1].isprintable()
    return err


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hostile.yaml").write_text(f"claim: x\nmodel: {{checkpoint: x.pth}}\n{RECIPES[name]}\n")
    assert "RecipeError" in ends(["plan", "hostile.yaml"], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.yaml"]
    with pytest.raises(RecipeError):
        main(["plan", "hostile.yaml", "--debug"])


def test_aliases_that_are_no_bomb_are_read(tmp_path: Path) -> None:
    path = tmp_path / "anchored.yaml"
    path.write_text("claim: &c twice\nname: *c\nmodel: {checkpoint: x.pth}\n")
    assert load_recipe(str(path)).name == "twice"


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(RecipeError, match="no regular file"):
            load_recipe(str(tmp_path / f"{name}.yaml"))
    with pytest.raises(OSError, match="more than 3"):
        path = tmp_path / "four"
        path.write_bytes(b"1234")
        read_whole(path, 3)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested"):
        read_json(tmp_path / "deep.json")


class _Touches:
    """Pickles as a call that leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def test_hostile_checkpoints(tmp_path: Path) -> None:
    model = care_compress.build_model("care_nano", num_classes=3)
    path, rng = tmp_path / "hostile.pth", random.Random(0)
    state = model.state_dict()
    first = next(name for name, value in state.items() if value.dim() == 4)
    for value in (
        _Touches(tmp_path / "ran"),
        torch.zeros(1).as_strided((1 << 40,), (0,)),
        None,
        "x",
    ):
        torch.save({**state, first: value}, path)
        with pytest.raises(CareError):
            load_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(CareError, match="unpacks to 50,000,000"):
        load_checkpoint(path)
    save_checkpoint(model, tmp_path / "good.safetensors", {})
    content = (tmp_path / "good.safetensors").read_bytes()
    for _ in range(10):
        cut = content[: rng.randrange(len(content))]
        (tmp_path / "cut.safetensors").write_bytes(cut)
        with pytest.raises(CareError):
            load_checkpoint(tmp_path / "cut.safetensors")
    assert not (tmp_path / "ran").exists()


def _encoded(form: str, side: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def test_hostile_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    png, tiff = _encoded("PNG"), _encoded("TIFF")
    bomb = png[:16] + (65000).to_bytes(4) * 2 + png[24:]
    wrong = {"empty.jpg": b"", "text.png": b"hello", "cut.png": png[:60], "bomb.png": bomb}
    wrong |= {"cut.tif": tiff[:900], "noise.gif": b"GIF89a" + random.Random(0).randbytes(900)}
    right = {"gif.jpg": _encoded("GIF"), "one.png": _encoded("PNG", 1), "a.webp": _encoded("WEBP")}
    for name, content in {**wrong, **right}.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    data = DataSection(source=str(tmp_path), resolution=32, workers=0, skip_bad_images=True)
    bad = BadImages()
    batches = prepared_batches(open_samples(data, "val"), data, 4, bad=bad)
    assert sum(len(batch.labels) for batch in batches) == len(right)
    assert {Path(name).name for name in bad.reasons} == {*wrong, "pipe.png"}
    assert capfd.readouterr().err == ""


def test_hostile_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("val/a/1.png", "../../escaped.png", "/val/b/2.png", "val/\x1b[2J/3.png"):
            archive.writestr(name, _encoded("PNG"))
    content, rng = path.read_bytes(), random.Random(0)
    for number in range(40):
        broken = bytearray(content)
        for _ in range(number):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        data = DataSection(source=str(path), resolution=32, workers=0, skip_bad_images=True)
        try:
            samples = open_samples(data, "val")
            list(prepared_batches(samples, data, 4, bad=BadImages()))
        except CareError as error:
            assert str(path) in str(error)
    assert not list(tmp_path.parent.rglob("*escaped*"))


def test_a_hostile_graph_ends_in_its_own_process(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "four.onnx")
    probe(path, 32)
    content = path.read_bytes()
    path.write_bytes(content[:500])
    with pytest.raises(TargetError, match="ONNX Runtime"):
        probe(path, 32)
    path.write_bytes(content)
    with pytest.raises(TargetError, match="busy for more than"):
        probe(path, 32, longest=0.001)


def test_names_are_shown_and_not_obeyed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("\x1b[2J[bold].pth", "\u202egnp.pth", "\udc80.pth", "a\nb.pth", ":bomb:.pth"):
        told = ends(["accuracy", name, "--data", "x", "--res", "32"], capfd)
        assert "bold" not in name or "\\x1b[2J[bold].pth" in told
        assert "bomb" not in name or ":bomb:.pth" in told
    console = Terminal(file=io.StringIO(), width=40, force_terminal=True)
    console.print("[red]mine[/] \x1b[2J\x9b1m", highlight=False)
    assert console.file.getvalue() == "\x1b[31mmine\x1b[0m \\x1b[2J\\x9b1m\n"  # type: ignore[attr-defined]
    assert one_line("a\n\tb\x00") == "a b\\x00" and shortened("x" * 300).startswith(
        "x" * 200 + "..."
    )


def test_tables_show_names_that_look_like_markup() -> None:
    from care_compress.evaluate.compare import accuracy_table, latency_table

    name = "[red]x[/y].onnx"
    found = {"available": True, "top1": 1.0, "top5": 1.0, "size_bytes": 3}
    value = {"images": 1, "pairs": [], "targets": {"torch": {name: found}}}
    row = {"target": "torch", "name": name, "latency_ms": dict.fromkeys(("p50", "p90", "p99"), 1.0)}
    row |= {"throughput": 1.0, "speedup": None, "noisy": False}
    console = Terminal(file=io.StringIO(), width=200)
    console.print(accuracy_table(value))
    console.print(latency_table({"batch": 1, "threads": 1, "rows": [row]}))
    assert console.file.getvalue().count(name) == 2  # type: ignore[attr-defined]


def test_damaged_runs_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: mine\nclaim: x\nmodel: {checkpoint: x.pth}\n")
    for content in ("", "[]", "{}", json.dumps({"exports": 3, "run": []}), "[" * 100_000):
        (run / "results.json").write_text(content)
        for verb in ("report", "fidelity", "compare"):
            told = ends([verb, "mine", "--runs", str(tmp_path)], capfd)
            assert re.match(r"(Run|Data|Checkpoint|Target)Error: ", told), told


def test_an_option_that_does_not_exist_is_one_line_too(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["plan"], ["plan", "--nonsense"], ["plan", "x", "--res", "y"]):
        assert "--help" in ends(arguments, capfd)
