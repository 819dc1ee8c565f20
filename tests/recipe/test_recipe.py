from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_compress.errors import CareError, RecipeError
from care_compress.model.care import ARCHITECTURES
from care_compress.recipe.recipe import RECIPES_DIR, Recipe, load_recipe
from care_compress.recipe.sections import Arch

MINIMAL = "claim: a test\nmodel: {checkpoint: x.pth}\n"


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_every_shipped_recipe_loads() -> None:
    paths = [p for p in RECIPES_DIR.rglob("*.yaml") if "targets" not in p.parts]
    assert len(paths) >= 5
    catalogue = (RECIPES_DIR / "README.md").read_text()
    for path in paths:
        recipe = load_recipe(str(path))
        assert recipe.name == path.stem
        assert f"`{recipe.name}`" in catalogue, "recipes/README.md lists every recipe"


def test_a_recipe_is_found_by_name_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("int8_qat").precision == "int8"
    with pytest.raises(RecipeError, match="did you mean int8_qat"):
        load_recipe("int8_qta")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL + "data: {resolutoin: 64}",
            "unknown key data.resolutoin.*did you mean resolution",
        ),
        (MINIMAL + "datum: {}", "unknown key datum.*did you mean data"),
        (MINIMAL + "data: {resolution: big}", "data.resolution.*'big'"),
        (MINIMAL + "data: {resolution: '64'}", "data.resolution.*'64'"),
        (MINIMAL + "data: {resolution: 8}", "data.resolution.*32"),
        (MINIMAL + "data: {std: [0.1, 0, 0.2]}", "data.std.1.*greater than 0"),
        (MINIMAL + "data: {crop_pct: .nan}", "data.crop_pct"),
        (MINIMAL + "train: {epochs: 2}", "train.batch_size.*required"),
        (
            MINIMAL + "train: {epochs: 2, batch_size: 8, learning_rate: 1, augment: {mixupp: 1}}",
            "train.augment.mixupp.*did you mean mixup",
        ),
        (
            MINIMAL + "train: {epochs: 2, batch_size: 8, learning_rate: 1, warmup_epochs: 5}",
            "warmup_epochs must be smaller than epochs",
        ),
        ("claim: x\nmodel: {arch: care_s9, checkpoint: y}", "model.arch.*care_s0"),
        (
            MINIMAL
            + "train: {epochs: 2, batch_size: 8, learning_rate: 1, augment: {scale: [1, 0.1]}}",
            "train.augment.*scale must be",
        ),
        ("claim: x", "neither model.checkpoint nor a train section"),
        (MINIMAL + "claim: again", "'claim' is given twice"),
        ("- a\n- b", "holds no sections"),
        ("a: [", "not readable YAML"),
        ("a: !!python/object/apply:os.system [id]", "not readable YAML"),
        (MINIMAL + "data: {source: 2020-01-01}", "plain YAML|data.source"),
    ],
)
def test_mistakes_name_file_key_and_fix(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert path in str(caught.value)


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    train = "train: {epochs: 1, batch_size: 8, learning_rate: 1e-3}"
    recipe = load_recipe(write(tmp_path, MINIMAL + train))
    assert recipe.train is not None and recipe.train.learning_rate == 1e-3


def test_set_changes_one_value_under_the_same_rules() -> None:
    recipe = load_recipe("fp32", ["data.resolution=96", "evaluate.images=10", "seed=3"])
    assert (recipe.data.resolution, recipe.evaluate.images, recipe.seed) == (96, 10, 3)
    assert load_recipe("fp32").data.resolution == 64
    for wrong in ["data.resolutoin=96", "data.resolution=abc", "seed", "=3", "seed.x=3"]:
        with pytest.raises(RecipeError):
            load_recipe("fp32", [wrong])


def test_recipes_and_the_network_know_the_same_sizes() -> None:
    assert set(get_args(Arch)) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.rules=[{weigth: 8}]", "did you mean weight"),
        ("quantize.rules=[{weight: {bits: 8, grup: 3}}]", "did you mean group"),
        ("model.checkpoint=2020-13-45", "is not a YAML value"),
    ],
)
def test_a_slip_of_the_pen_is_found_wherever_it_is(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("int8_qat", [override])


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("fp32").seed = 4  # type: ignore[misc]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(str(tmp_path / "absent.yaml"))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]) | st.text(max_size=4), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(content=st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]), plain, max_size=5))
def test_arbitrary_content_is_a_recipe_or_a_named_error(content: dict[str, object]) -> None:
    import tempfile

    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), yaml.safe_dump(content))
        try:
            load_recipe(path)
        except CareError as error:
            assert path in str(error)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_are_a_named_error(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.yaml"
        path.write_bytes(content)
        with pytest.raises(CareError):
            load_recipe(str(path))
