"""Recipes, target files and --set values that nobody should write: read, or refused by name."""

import os
import random
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import LONGEST_LINE, Cases, damaged, memory_limit, obeyed, sealed, time_limit, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from care_compress.cli import main, plain_name
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.reading import MOST_BYTES
from care_compress.recipe.recipe import Recipe, load_recipe, recipe_files
from care_compress.recipe.sections import DataSection, ExportSection, ModelSection, TrainSection
from care_compress.recipe.target import TARGETS_DIR, Target, read_target, target_files

CASES = Cases("recipes")
MINIMAL = "claim: a test\nmodel: {checkpoint: x.pth}\n"
GENERATED, OVERRIDES = 250, 200


@pytest.fixture(autouse=True, scope="module")
def _limits() -> Iterator[None]:
    with memory_limit():
        yield


def check(path: Path | str, overrides: list[str] | None = None) -> None:
    """A recipe that loads can be written down and loads as the same one again."""

    def load() -> Recipe:
        recipe = load_recipe(str(path), overrides or [])
        plain_name(recipe.name)
        return recipe

    found = CASES.attempt(load)
    if isinstance(found, Recipe):
        with tempfile.TemporaryDirectory() as folder:
            again = Path(folder) / "again.yaml"
            text = yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False)
            again.write_text(text, encoding="utf-8")
            assert load_recipe(str(again)) == found


KEYS = sorted(
    {
        *Recipe.model_fields,
        *ModelSection.model_fields,
        *DataSection.model_fields,
        *TrainSection.model_fields,
        *ExportSection.model_fields,
        *QuantizeSection.model_fields,
    }
)
NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, -1e308, 5e-324]
    + [float("nan"), float("inf"), float("-inf"), 0.1]
)
LEAVES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["", "~nobody/x", "../../etc", "x" * 5000, "\x1b[2J", "builtin:shapes", "fp32"]
    )
    | st.dates()
    | st.binary(max_size=8)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner, max_size=5)
        | st.dictionaries(st.integers() | st.booleans() | st.none(), inner, max_size=3)
    ),
    max_leaves=30,
)


@settings(
    max_examples=GENERATED,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(content=st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)), VALUES, max_size=8))
def test_any_keys_and_values(content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generated.yaml"
        base = {"claim": "a test", "model": {"checkpoint": "x.pth"}}
        text = yaml.safe_dump({**base, **content}, allow_unicode=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with sealed(Path(tempfile.gettempdir())):
            check(path)


HOSTILE_TOKENS = (
    *("&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system [touch pwned]\n", "\x00", "\t"),
    *("{{{{", "---\n", "...\n", "? ", "!!int ''", "!!float x", "!!bool x", "!!timestamp x"),
    *(
        "!!binary x",
        "!!set {a}",
        "!!omap [a]",
        "%YAML 9.9\n",
        "%TAG ! tag:x,2000:\n",
        "|-\n",
        "\ufeff",
    ),
    *(
        "1" * 5000,
        "1:" * 50 + "1",
        "0x" + "f" * 400,
        "[" * 500,
        "\u2028",
        "\x85",
        "\x1b[2J",
        ".inf",
    ),
)


def mutants(texts: list[str], each: int, seed: int) -> Iterator[bytes]:
    """Texts with lines lost, doubled, re-indented, with hostile tokens, or with damaged bytes."""
    for number, text in enumerate(texts):
        rng = random.Random(1000 * seed + number)
        for _ in range(each):
            lines = text.splitlines(keepends=True)
            for _ in range(rng.choice((1, 1, 2, 5))):
                at = rng.randrange(len(lines))
                match rng.randrange(6):
                    case 0:
                        del lines[at]
                    case 1:
                        lines.insert(at, lines[rng.randrange(len(lines))])
                    case 2:
                        lines[at] = rng.choice(("  ", "\t", "- ")) + lines[at]
                    case 3:
                        place = rng.randrange(len(lines[at]) + 1)
                        lines[at] = (
                            lines[at][:place] + rng.choice(HOSTILE_TOKENS) + lines[at][place:]
                        )
                    case 4:
                        key, colon, _ = lines[at].partition(":")
                        value = rng.choice(
                            (*HOSTILE_TOKENS, "-1", "1e999", "null", "[]", "{}", "yes")
                        )
                        lines[at] = f"{key}{colon} {value}\n"
                    case 5:
                        swapped = rng.randrange(len(lines))
                        lines[at], lines[swapped] = lines[swapped], lines[at]
                if not lines:
                    break
            content = "".join(lines).encode()
            yield damaged(content, rng) if content and rng.random() < 0.3 else content


@pytest.mark.parametrize("shipped", recipe_files(), ids=lambda path: path.stem)
def test_mutated_recipes(shipped: Path, tmp_path: Path) -> None:
    path = tmp_path / "mutant.yaml"
    number = recipe_files().index(shipped)
    with sealed(tmp_path, Path(tempfile.gettempdir())):
        for content in mutants([shipped.read_text()], 18, number):
            path.write_bytes(content)
            check(path)


def test_mutated_targets(tmp_path: Path) -> None:
    texts = [path.read_text() for path in target_files(TARGETS_DIR)]
    path = tmp_path / "mutant.yaml"
    with sealed(tmp_path):
        for content in mutants(texts, 18, 77):
            path.write_bytes(content)
            found = CASES.attempt(lambda: read_target(path))
            assert isinstance(found, Target | str)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "m0: &m0 {a: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)
HAND_MADE: dict[str, bytes] = {
    "nothing": b"",
    "a comment": b"# nothing\n",
    "a list": b"- a\n- b\n",
    "a word": b"recipe",
    "its own base": b"base: ./hand.yaml\n",
    "no base": b"base: \n",
    "a base of letters": b'base: "a\\0\\e[2J\\n.yaml"\n',
    "a base of a name too long": b"base: " + b"x" * 5000 + b".yaml\n",
    "a device for a base": b"base: /dev/zero.yaml\nclaim: x\n",
    "a list in the place of a base's section": b"base: int8_qat\nquantize: [qat]\nmodel: 3\ntrain: {}\n",
    "keys that are no text over a base": b"base: int8_qat\n1: {a: 1}\nnull: 2\nquantize: {1.5: {}}\n",
    "two documents": f"{MINIMAL}---\n{MINIMAL}".encode(),
    "billion laughs": (MINIMAL + LAUGHS).encode(),
    "billion merges": (MINIMAL + MERGES).encode(),
    "laughs in a key": (MINIMAL + LAUGHS + "? *a11\n: 1\n").encode(),
    "a list in itself": (MINIMAL + "data: &d [*d]\n").encode(),
    "a mapping in itself": (MINIMAL + "data: &d {source: *d}\n").encode(),
    "a merge of itself": (MINIMAL + "data: &d {<<: *d}\n").encode(),
    "an unknown alias": (MINIMAL + "data: *nowhere\n").encode(),
    "an anchor twice": (MINIMAL + "x: &a 1\ny: &a 2\n").encode(),
    "a used anchor": b"claim: &c a test\nname: *c\nmodel: {checkpoint: x.pth}\n",
    "deep lists": (MINIMAL + "data: " + "[" * 100_000).encode(),
    "deep closed lists": (MINIMAL + "data: " + "[" * 3000 + "]" * 3000).encode(),
    "deep mappings": (MINIMAL + "data: " + "{a: " * 3000 + "1" + "}" * 3000).encode(),
    "deep indents": (
        MINIMAL + "data:\n" + "".join(" " * n + "a:\n" for n in range(1, 600))
    ).encode(),
    "deep keys": (MINIMAL + "? " * 3000).encode(),
    "os.system": (MINIMAL + "x: !!python/object/apply:os.system [touch pwned]\n").encode(),
    "subprocess": (MINIMAL + "x: !!python/object/new:subprocess.Popen [[touch, pwned]]\n").encode(),
    "a module": (MINIMAL + "x: !!python/module:os\n").encode(),
    "a tuple": (MINIMAL + "x: !!python/tuple [1]\n").encode(),
    "an own tag": (MINIMAL + "x: !mine 1\n").encode(),
    "an empty int": (MINIMAL + "seed: !!int ''\n").encode(),
    "a bool that is none": (MINIMAL + "seed: !!bool maybe\n").encode(),
    "a time that is none": (MINIMAL + "seed: !!timestamp noon\n").encode(),
    "a date that is none": (MINIMAL + "seed: 2026-02-31\n").encode(),
    "binary that is none": (MINIMAL + "seed: !!binary '*'\n").encode(),
    "a float that is none": (MINIMAL + "seed: !!float x\n").encode(),
    "a map that is a list": (MINIMAL + "data: !!map [1]\n").encode(),
    "a set": (MINIMAL + "data: !!set {a, b}\n").encode(),
    "pairs": (MINIMAL + "data: !!pairs [a: 1]\n").encode(),
    "a long int": (MINIMAL + f"seed: {'9' * 100_000}\n").encode(),
    "a long hex": (MINIMAL + f"seed: 0x{'f' * 100_000}\n").encode(),
    "a long sexagesimal": (MINIMAL + f"seed: {'59:' * 60_000}59\n").encode(),
    "a long float": (MINIMAL + f"seed: {'9' * 100_000}.{'9' * 100_000}\n").encode(),
    "a huge exponent": (MINIMAL + "seed: 1e99999999999\n").encode(),
    "NaN": (MINIMAL + "data: {crop_pct: .nan}\n").encode(),
    "infinity": (MINIMAL + "train: {epochs: .inf}\n").encode(),
    "many keys": (MINIMAL + "".join(f"k{n}: 1\n" for n in range(15_000))).encode(),
    "many items": (MINIMAL + f"data: [{'1,' * 60_000}]\n").encode(),
    "a long key": (MINIMAL + f"{'k' * 1000}: 1\n").encode(),
    "a very long key": (MINIMAL + f"? {'k' * 100_000}\n: 1\n").encode(),
    "a long text": (MINIMAL + f"name: {'n' * 100_000}\n").encode(),
    "too large": b"# " + b"x" * (MOST_BYTES + 1),
    "tabs": b"claim:\ta test\n\tmodel:\t{checkpoint: x.pth}\n",
    "a BOM": b"\xef\xbb\xbf" + MINIMAL.encode(),
    "a BOM inside": MINIMAL.encode() + b"\xef\xbb\xbfdata: {}\n",
    "UTF-16": MINIMAL.encode("utf-16"),
    "UTF-32": MINIMAL.encode("utf-32"),
    "Latin-1": (MINIMAL + "name: ä\n").encode("latin-1"),
    "NUL": (MINIMAL + "name: a\0b\n").encode(),
    "escaped NUL": (MINIMAL + 'name: "a\\0b"\n').encode(),
    "escape codes": (MINIMAL + 'name: "\\e[2J\\a"\n').encode(),
    "an unknown escape code": (MINIMAL + '"\\e[2J[bold]": 1\n').encode(),
    "a lone surrogate": (MINIMAL + 'name: "\\ud800"\n').encode(),
    "a name that leads out": (MINIMAL + "name: ../../escaped\n").encode(),
    "an absolute name": (MINIMAL + "name: /tmp/escaped\n").encode(),
    "no name": (MINIMAL + "name: ''\n").encode(),
    "a hidden name": (MINIMAL + "name: .hidden\n").encode(),
    "a name of spaces": (MINIMAL + "name: '   '\n").encode(),
    "a list as a key": (MINIMAL + "? [a, b]\n: 1\n").encode(),
    "a mapping as a key": (MINIMAL + "? {a: b}\n: 1\n").encode(),
    "a number as a key": (MINIMAL + "1: 2\n").encode(),
    "null as a key": (MINIMAL + "~: 2\n").encode(),
    "a date as a key": (MINIMAL + "2026-01-01: 2\n").encode(),
    "NaN as a key": (MINIMAL + ".nan: 1\n.NaN: 2\n").encode(),
    "keys twice": (MINIMAL + "claim: again\n").encode(),
    "random bytes": random.Random(0).randbytes(4096),
    "a zip": b"PK\x03\x04" + bytes(200),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_recipes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(HAND_MADE[name])
    before = tree(tmp_path)
    with sealed(Path(tempfile.gettempdir())):
        check(path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", HAND_MADE)
def test_the_command_line_says_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`reference` reads YAML files too, and runs nothing for those that hold no recipes."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    path.write_bytes(HAND_MADE[name])

    def run() -> int:
        with pytest.raises(SystemExit) as ended:
            main(["select", str(path), "list.json", "--data", "no-such-folder", "--ckpt", "no.pth"])
        return int(str(ended.value.code))

    with sealed(Path(tempfile.gettempdir())):  # torch keeps a cache there
        assert CASES.attempt(run) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1 and "Error: " in err
    assert obeyed(err[:-1]) == "" and "Traceback" not in err and len(err) < LONGEST_LINE
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.yaml"]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nothing")
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(1 << 40)
    names = [
        "pipe",
        "folder",
        "endless",
        "loop",
        "dangling",
        "sparse",
        "absent",
        "x" * 5000,
        "a\0b",
    ]
    for name in [*names, "\udc80", "a/" * 3000 + "b"]:
        message = CASES.attempt(lambda name=name: load_recipe(f"{tmp_path}/{name}.yaml"))  # type: ignore[misc]
        assert isinstance(message, str), f"{name} was read"
    for name in ["", ".", "..", "/", "int8_qta", "\0", "\x1b[2J", "x" * 5000, "a\nb"]:
        assert isinstance(CASES.attempt(lambda name=name: load_recipe(name)), str)  # type: ignore[misc]


DOTTED = st.lists(st.sampled_from([*KEYS, "", "0", "x", "*"]), min_size=1, max_size=5).map(".".join)
OVERRIDE = st.text(max_size=30) | st.builds(
    lambda key, value: f"{key}={value}",
    DOTTED,
    st.sampled_from(
        [*HOSTILE_TOKENS, "&a [*a]", "{<<: *a}", LAUGHS, "[1, 2]", "{a: 1}", "1", "", "\n"]
    )
    | st.text(alphabet=string.printable, max_size=30),
)


@settings(
    max_examples=OVERRIDES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    overrides=st.lists(OVERRIDE, min_size=1, max_size=3),
    name=st.sampled_from(["fp32", "int8_qat", "mixed_auto"]),
)
def test_set_values(overrides: list[str], name: str) -> None:
    with sealed(Path(tempfile.gettempdir())):
        check(name, overrides)


def test_the_limit_is_far_above_what_ships() -> None:
    files = [*recipe_files(), *target_files(TARGETS_DIR)]
    assert max(path.stat().st_size for path in files) * 20 < MOST_BYTES


def test_the_time_limit_fires() -> None:
    from fuzzing import TooLongError

    with pytest.raises(TooLongError), time_limit(0.05):
        while True:
            pass


def test_there_were_enough_cases() -> None:
    CASES.assert_enough()
