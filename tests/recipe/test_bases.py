"""A recipe over another: what it takes, what it replaces, and where each value came from."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from care_compress.cli import main
from care_compress.errors import RecipeError
from care_compress.recipe.recipe import RECIPES_DIR, Recipe, load_recipe, parse, recipe_files
from care_compress.run.directory import Run
from care_compress.run.stages import recipe_parts

BASE = """\
claim: of the base
precision: int8
seed: 3
model: {checkpoint: x.pth}
data: {source: images, resolution: 64, mean: [0.1, 0.2, 0.3]}
quantize:
  rules: [{weight: 8, input: 8}, {role: head, input: float}]
  qat: {max_steps: 300, learning_rate: 1.0e-5, augment: {flip: 0.1, jitter: 0.2}}
"""


@pytest.fixture(autouse=True)
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def over(folder: Path, text: str, name: str = "mine") -> Recipe:
    (folder / f"{name}.yaml").write_text(text)
    return load_recipe(str(folder / f"{name}.yaml"))


def test_mappings_merge_and_lists_and_values_replace(tmp_path: Path, base: Path) -> None:
    base.write_text(f"name: other\n{BASE}")  # each recipe is called after its own file
    text = """\
base: base.yaml
data: {resolution: 96, mean: [0.5, 0.5, 0.5]}
quantize: {rules: [{weight: 4}], target: null, qat: {augment: {flip: 0.3}}}
"""
    recipe = over(tmp_path, text)
    assert (recipe.name, recipe.claim, recipe.seed) == ("mine", "of the base", 3)
    assert (recipe.data.source, recipe.data.resolution) == ("images", 96)
    assert recipe.data.mean == (0.5, 0.5, 0.5)
    assert recipe.quantize is not None and recipe.quantize.qat is not None
    assert len(recipe.quantize.rules) == 1, "a list is said anew"
    assert recipe.quantize.target is None, "a single value: null is one"
    assert recipe.quantize.qat.max_steps == 300
    assert (recipe.quantize.qat.augment.flip, recipe.quantize.qat.augment.jitter) == (0.3, 0.2)


def test_null_takes_a_section_or_a_list_of_the_base_away(tmp_path: Path) -> None:
    recipe = over(tmp_path, "base: base\ndata: null\nquantize: {qat: null}\n")
    assert recipe.quantize is not None and recipe.quantize.qat is None
    assert recipe.data == Recipe(name="x", claim="x", model=recipe.model).data, "its defaults"
    again = over(tmp_path, "base: mine\nquantize: {qat: {epochs: 2}}\n", "again")
    assert again.quantize is not None and again.quantize.qat is not None
    assert again.quantize.qat.max_steps is None, "what was taken away does not come back"
    with pytest.raises(RecipeError, match="there are no rules"):
        over(tmp_path, "base: base\nquantize: {rules: null}\n")


def test_a_recipe_in_full_and_one_by_base_are_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    text = BASE.replace("of the base", "mine").replace("300", "600").replace("images", "others")
    full = over(tmp_path / "full", text)
    text = "base: base\nclaim: mine\ndata: {source: others}\nquantize: {qat: {max_steps: 600}}\n"
    short = over(tmp_path, text)
    assert full == short and recipe_parts(full) == recipe_parts(short)
    assert full.model_dump_json() == short.model_dump_json()


def test_a_name_is_looked_for_beside_the_recipe_and_then_among_the_shipped(tmp_path: Path) -> None:
    shipped = load_recipe("int8_ptq")
    beside = over(tmp_path, "base: int8_ptq\nseed: 1\n", "int8_qat")
    assert beside.data == shipped.data
    (tmp_path / "int8_ptq.yaml").write_text("base: int8_ptq\ndata: {resolution: 128}\n")
    assert load_recipe(str(tmp_path / "int8_qat.yaml")).data.resolution == 128
    assert load_recipe("int8_qat").data.resolution == 64, "a shipped one never looks elsewhere"
    (tmp_path / "deep").mkdir()
    up = over(tmp_path / "deep", "base: ../base.yaml\nseed: 5\n")
    assert (up.seed, up.data.source) == (5, "images")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mine": "base: absent.yaml"}, "mine.yaml: its base .*absent.yaml does not exist"),
        ({"mine": "base: bse"}, "mine.yaml: its base 'bse' is neither.* did you mean base"),
        ({"mine": "base: int8_qta"}, "mine.yaml: its base 'int8_qta'.* did you mean int8_qat"),
        ({"mine": "base: [a]"}, r"mine.yaml: base: it is \['a'\]"),
        ({"mine": "base: list.yaml", "list": "- a"}, "mine.yaml: its base .*list.yaml holds no"),
        ({"mine": "base: bad.yaml", "bad": "a: ["}, "mine.yaml: its base .*bad.yaml is not read"),
        (
            {"mine": "base: t.yaml", "t": "title: a target\nname: t"},
            "mine.yaml: its base .*t.yaml is no recipe",
        ),
        ({"mine": "base: mine.yaml"}, "go round: [^ ]*mine.yaml -> [^ ]*mine.yaml[.]"),
        (
            {"mine": "base: b", "b": "base: c", "c": "base: ./mine.yaml"},
            "mine.yaml: its bases go round: [^ ]*mine.yaml -> [^ ]*b.yaml -> [^ ]*c.yaml -> "
            "[^ ]*mine.yaml",
        ),
        (
            {"mine": "base: r0", **{f"r{n}": f"base: r{n + 1}" for n in range(8)}},
            "mine.yaml stands over more than 7 bases: [^ ]*mine.yaml -> [^ ]*r0.yaml -> .*r7.yaml",
        ),
        ({"mine": "bas: base"}, "unknown key bas.* did you mean base"),
    ],
)
def test_what_is_wrong_with_a_base_is_one_line_with_its_files(
    tmp_path: Path, files: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text + "\n")
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path / "mine.yaml")])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.count("\n") == 1
    assert re.search(message, told), told


def test_a_mistake_names_the_file_that_it_stands_in(tmp_path: Path, base: Path) -> None:
    base.write_text(BASE.replace("resolution: 64", "resolution: big"))
    named = f"{base} (a base of {tmp_path / 'mine.yaml'}): data.resolution: "
    with pytest.raises(RecipeError) as caught:
        over(tmp_path, "base: base\ndata: {source: mine}\n")
    assert str(caught.value).startswith(named)
    with pytest.raises(RecipeError) as caught:
        over(tmp_path, "base: base\ndata: {resolution: huge}\n")
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: data.resolution: ")
    with pytest.raises(RecipeError, match=f"{base} .a base of .*unknown key quantize.qat.epoch"):
        base.write_text(BASE.replace("max_steps", "epoch"))
        over(tmp_path, "base: base\nseed: 1\n")
    with pytest.raises(RecipeError, match="^the command line: data.resolution: "):
        load_recipe("int8_qat", ["data.resolution=small"])


def test_whether_a_checkpoint_replaces_a_training_is_not_guessed(tmp_path: Path) -> None:
    scratch = (
        "claim: x\nmodel: {arch: care_nano}\ntrain: {epochs: 2, batch_size: 8, learning_rate: 1}\n"
    )
    (tmp_path / "scratch.yaml").write_text(scratch)
    start = "base: scratch\nmodel: {checkpoint: y.pth}\n"
    with pytest.raises(RecipeError, match="mine.yaml: model.checkpoint: .*scratch.*train: null"):
        over(tmp_path, start)
    assert over(tmp_path, start + "train: null\n").train is None
    further = over(tmp_path, start + "train: {epochs: 5}\n")
    assert further.train is not None and (further.train.epochs, further.train.batch_size) == (5, 8)

    (tmp_path / "start.yaml").write_text("claim: x\nmodel: {checkpoint: y.pth}\n")
    trains = "base: start\ntrain: {epochs: 2, batch_size: 8, learning_rate: 1}\n"
    with pytest.raises(RecipeError, match="mine.yaml: train: .*'y.pth'.*checkpoint: null"):
        over(tmp_path, trains)
    assert over(tmp_path, trains + "model: {checkpoint: z.pth}\n").model.checkpoint == "z.pth"
    fresh = over(tmp_path, trains + "model: {checkpoint: null, arch: care_nano}\n")
    assert fresh.model.checkpoint is None


def test_a_run_leaves_a_whole_recipe_that_says_where_values_come_from(tmp_path: Path) -> None:
    text = """\
base: base
quantize: {target: null, qat: {max_steps: 600}}
budget: {min_speedup: {openvino-cpu: 1.5}}
claim: "two\\nlines: and # a hash, and so many words that it would be folded by everybody else"
"""
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "mine.yaml"), ["data.resolution=96", "export={batch: 2}"])
    with Run(tmp_path, "run").open(recipe, {}):
        pass
    written = tmp_path / "run" / "recipe.yaml"
    lines = written.read_text().splitlines()
    assert lines[0].startswith("# mine over base, ")
    for line in (
        "  resolution: 96  # the command line",
        "  batch: 2  # the command line",
        "  source: images  # base.yaml",
        "    max_steps: 600  # mine.yaml",
        "    learning_rate: 1.0e-05  # base.yaml",
        "  rules:  # base.yaml",
        "  target: null  # mine.yaml",
        "    openvino-cpu: 1.5  # mine.yaml",
        "  crop_pct: 0.875",
        "seed: 3  # base.yaml",
    ):
        assert line in lines, line
    assert yaml.safe_load(written.read_text()) == recipe.model_dump(mode="json")
    plain = parse(Recipe, yaml.safe_load(written.read_text()), "recipe.yaml")
    assert plain == recipe == load_recipe(str(written)), "it needs no base to be read again"


def test_a_strange_file_name_is_no_line_of_the_written_recipe(tmp_path: Path) -> None:
    recipe = over(tmp_path, "base: base\nseed: 4\nname: mine\n", "a\nclaim: evil\x1b")
    with Run(tmp_path, "run").open(recipe, {}):
        pass
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == recipe


def test_plan_says_where_recipe_and_rules_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_ok(["plan", "int8_fastact_qat", "--target", "onnxruntime-cpu"])
    shown = capsys.readouterr().out
    assert "recipe: int8_fastact_qat over int8_qat over int8_ptq\n" in shown
    assert "rule 1: weight: 8, input: 8  # int8_ptq.yaml\n" in shown
    assert re.search("rule 6: .*# onnxruntime-cpu.yaml\n", shown)
    (tmp_path / "int8_qat.yaml").write_text("base: int8_qat\nseed: 1\n")
    main_ok(
        ["plan", str(tmp_path / "int8_qat.yaml"), "--json", "--ckpt", "builtin:care_nano_shapes"]
    )
    about = json.loads(capsys.readouterr().out)
    shipped = str(RECIPES_DIR / "int8_qat")
    assert about["recipe"]["chain"] == ["int8_qat", shipped, "int8_ptq"], "of one name: the path"
    said_by = about["recipe"]["said_by"]
    assert said_by["seed"] == str(tmp_path / "int8_qat.yaml")
    assert said_by["quantize.qat.max_steps"] == f"{shipped}.yaml"
    assert said_by["model.checkpoint"] == "the command line"
    assert {rule["said_by"] for rule in about["rules"]} == {"int8_ptq.yaml"}


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code in (0, None)


def test_a_copy_of_the_recipes_is_on_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(RECIPES_DIR, folder)
    text = (
        (folder / "int8_ptq.yaml")
        .read_text()
        .replace("norm_reestimation: true", "norm_reestimation: false")
    )
    (folder / "int8_ptq.yaml").write_text(text)
    for file in recipe_files():
        mine, shipped = load_recipe(str(folder / file.name)), load_recipe(file.stem)
        chain = {*mine.origins.chain("")}
        assert (mine == shipped) is not ("int8_ptq" in chain or file.stem == "int8_ptq"), file


def test_the_page_shows_a_recipe_that_loads(tmp_path: Path) -> None:
    page = (RECIPES_DIR / "README.md").read_text(encoding="utf-8")
    block = page.split("## A recipe over another")[1].split("```yaml\n")[1].split("```")[0]
    recipe = over(tmp_path, block)
    assert recipe.quantize is not None and recipe.quantize.qat is not None
    assert recipe.origins.chain("mine") == ("mine", "int8_qat", "int8_ptq")
    assert recipe.quantize.qat.max_steps == 1000 and recipe.quantize.qat.ema_decay == 0.99
