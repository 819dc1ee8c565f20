"""What a rerun does again and what it takes over; what a user sees of it."""

import ast
import errno
import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import Product, assert_same, end_server, flip_bit, kill_at_border, small_recipe
from rich.console import Console

from care_compress.errors import DamagedRunError, RunError
from care_compress.pipeline import run_recipe
from care_compress.quantize.qat import FollowFloat
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.run import stages
from care_compress.run.stages import recipe_parts
from care_compress.signals import full_disks_named, stops_in_order

EVERY = {"train", "slim", "heal", "calibration", "ptq", "qat", "evaluate", "export"}
NONE: set[str] = set()
# A change of each key of a recipe, and the stages that are made from that key themselves. What
# comes after them follows by the digests of what they made; tests/faults runs them all.
KEYS: dict[str, tuple[str, set[str]]] = {
    "name": ("other", {"export"}),  # its files say it; trainings of several recipes are one
    "claim": ("another", NONE),
    "task": ("segmentation", EVERY),
    "precision": ("mixed", {"export"}),  # what files are called
    "seed": ("1", EVERY - {"evaluate", "export"}),
    "model": ("{arch: care_s0}", {"train"}),
    "data": ("{source: builtin:shapes, resolution: 96}", EVERY),
    "train": ("{epochs: 2, batch_size: 4, learning_rate: 1}", {"train"}),
    "slim": ("{budget: {macs: 0.5}}", {"slim"}),  # how it heals goes into its own stage
    "rewrite": ("{fold_norms: true}", EVERY - {"train", "slim", "heal"}),
    "quantize": ("{rules: [{weight: 4}]}", {"calibration", "ptq", "qat"}),
    "export": ("{batch: 2}", {"export"}),
    "budget": ("{max_top1_drop: 1.0}", NONE),
    "evaluate": ("{images: 7}", {"evaluate"}),
}
IN_QUANTIZE: dict[str, tuple[str, set[str]]] = {
    "qat": ("null", {"qat"}),
    "calibrate": ("{images: 3}", {"calibration", "ptq"}),
    "nncf": ("{preset: performance, ignored_types: [MatMul]}", {"ptq", "qat"}),
}


def changed_parts(path: Path, override: str) -> set[str]:
    before = load_recipe(str(path))
    key, _, value = override.partition("=")
    kinds = {"nncf": {"quantize.backend": "nncf", "quantize.rules": [], "quantize.qat": None}}
    extra = kinds.get(key.removeprefix("quantize."), {})
    if extra:
        before = load_recipe(str(path), (), {**extra, "quantize.nncf": {}})
    after = load_recipe(str(path), [f"{key}={value}"], extra)
    parts = [recipe_parts(recipe) for recipe in (before, after)]
    return {stage for stage in EVERY if parts[0][stage] != parts[1][stage]}


@pytest.fixture(scope="module", autouse=True)
def server_that_ends() -> Iterator[None]:
    yield
    end_server()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = {"prescale": "trained", "equalize": "off"}
    return small_recipe(tmp_path_factory.mktemp("recipe"), [], train=False, **plain)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("trained"), ["onnxruntime-cpu"])


def test_every_key_of_a_recipe_has_its_stages(trained: Path) -> None:
    assert KEYS.keys() == Recipe.model_fields.keys(), "a new key needs a place"
    for key, (value, reached) in KEYS.items():
        assert changed_parts(trained, f"{key}={value}") == reached, key


def test_every_key_of_quantize_redoes_ptq_unless_said_otherwise(trained: Path) -> None:
    settings = {
        "backend": None,  # goes with other sections, see nncf
        "target": "onnxruntime-cpu",
        "rules": "[{weight: 8}]",
        "activation": "hard_swish",
        "prescale": "0.5",
        "equalize": "0.5",
        "covariance": "false",
        "hadamard": "true",
        "norm_reestimation": "true",
        "bias_correction": "false",
        "reconstruct": "{steps: 2}",
        "search": "{trials: 1}",
        "full_range": "true",
    }
    assert {*settings, *IN_QUANTIZE} == QuantizeSection.model_fields.keys()
    for key, value in settings.items():
        if value is not None:
            extra = ["budget.max_top1_drop=3"] if key == "search" else []
            parts = [
                recipe_parts(load_recipe(str(trained), [*extra, *more]))
                for more in ([], [f"quantize.{key}={value}"])
            ]
            changed = {stage for stage in EVERY if parts[0][stage] != parts[1][stage]}
            assert changed == {"ptq"}, key
    for key, (value, reached) in IN_QUANTIZE.items():
        assert changed_parts(trained, f"quantize.{key}={value}") - {"calibration"} == (
            reached - {"calibration"}
        ), key


def test_what_only_watches_or_decodes_redoes_nothing(trained: Path) -> None:
    for override in (
        "data.workers=3",
        "train.checkpoint_steps=9",
        "quantize.qat.validate_epochs=2",
    ):
        assert changed_parts(trained, override) == NONE, override


def test_a_search_is_judged_so_its_budget_and_images_count(trained: Path) -> None:
    search = ["quantize.search={trials: 1}", "budget.max_top1_drop=3"]
    parts = [
        recipe_parts(load_recipe(str(trained), [*search, *more]))["ptq"]
        for more in ([], ["budget.max_top1_drop=4"], ["evaluate.images=9"])
    ]
    assert parts[0] != parts[1] and parts[0] != parts[2]


class Rerun:
    """One run directory, and what was printed."""

    def __init__(self, recipe: Path, runs: Path) -> None:
        self.recipe, self.product = recipe, Product(recipe, runs)

    def __call__(self, *overrides: str, repair: bool = False) -> set[str]:
        """Run it here; the stages that were taken over."""
        self.console = Console(record=True, quiet=False, width=200, file=open(os.devnull, "w"))
        chosen = load_recipe(str(self.recipe), overrides)
        run_recipe(chosen, self.product.runs, "run", self.console, repair)
        self.said = self.console.export_text()
        end = ": unchanged, taken over"
        return {line[: -len(end)] for line in self.said.splitlines() if line.endswith(end)}


ALL = {"calibration", "ptq", "evaluate ptq", "qat", "evaluate qat"}


@pytest.fixture(scope="module")
def rerun(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Rerun:
    first = Rerun(recipe, tmp_path_factory.mktemp("rerun") / "runs")
    assert first() == NONE
    return first


@pytest.fixture(scope="module")
def undisturbed(rerun: Rerun) -> dict[str, Any]:
    return rerun.product.left()


def manifest_of(rerun: Rerun) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((rerun.product.run / "manifest.json").read_text())
    del content["outputs"]["results.json"]  # it tells times
    return content


def test_a_rerun_takes_everything_over_and_ends_the_same(
    rerun: Rerun, undisturbed: dict[str, Any]
) -> None:
    before = manifest_of(rerun)
    assert set(before["stages"]) == ALL
    assert rerun() == ALL
    assert_same(rerun.product.left(), undisturbed)
    for part in ("inputs", "outputs", "stages"):
        assert manifest_of(rerun)[part] == before[part]


def test_what_a_change_reaches_is_done_again_and_damage_when_asked(
    rerun: Rerun, undisturbed: dict[str, Any]
) -> None:
    evaluations = {"evaluate ptq", "evaluate qat"}
    overrides = "budget.max_top1_drop=50.0", "evaluate.images=20"
    assert rerun(*overrides) == ALL - evaluations, "a budget decides nothing"
    assert "evaluate qat: evaluate changed, made again" in rerun.said
    flip_bit(rerun.product.run / "qat" / "model.safetensors")
    with pytest.raises(DamagedRunError, match=r"qat/model\.safetensors is not what .* --repair"):
        rerun()
    assert rerun(repair=True) == ALL - {"qat"} - evaluations | {"evaluate ptq"}
    assert "qat: qat/model.safetensors was damaged, made again" in rerun.said
    assert_same(rerun.product.left(), undisturbed)


def test_a_manifest_that_was_edited_or_cut_is_named(rerun: Rerun) -> None:
    path = rerun.product.run / "manifest.json"
    good = path.read_text()
    content = json.loads(good)
    content["stages"]["calibration"]["skipped_images"]["one"] = "bad"
    for bad in (json.dumps(content), good[: len(good) // 2]):
        path.write_text(bad)
        with pytest.raises(DamagedRunError, match="manifest.json"):
            rerun()
    path.write_text(good)


def test_sigkill_sigterm_and_a_file_limit_then_the_same_result(
    undisturbed: dict[str, Any], recipe: Path, tmp_path: Path
) -> None:
    product = Product(recipe, tmp_path / "runs")
    assert product.start(kill_at_border("calibration", True)).wait() == -signal.SIGKILL
    limited = product.start(functools.partial(_limit, 900 * 1024))
    assert limited.wait() == 2 and len(limited.errors) == 1, limited.said
    assert "cannot write" in limited.errors[0] and "model.safetensors" in limited.errors[0]
    told = product.start(_term_in_qat)
    assert told.wait() == 128 + signal.SIGTERM, told.said
    assert told.errors == ["stopped by SIGTERM; the same command goes on"]
    assert "calibration: unchanged, taken over" in limited.said
    assert_same(product.finish(), undisturbed)


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _term_in_qat() -> None:
    step = FollowFloat.__call__

    def told(self: FollowFloat, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    FollowFloat.__call__ = told  # type: ignore[method-assign]


STOPPED = """
import os, signal, sys, time
from rich.console import Console
from care_compress.signals import stops_in_order
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
with stops_in_order(Console(stderr=True)):
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        os.kill(child if sys.argv[2] == "child" else os.getpid(), int(sys.argv[1]))
        print(os.WTERMSIG(os.waitpid(child, 0)[1]))
    finally:
        os.kill(child, signal.SIGKILL) if sys.argv[2] != "child" else None
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line_and_its_exit_code(signum: signal.Signals) -> None:
    command = [sys.executable, "-c", STOPPED, str(int(signum)), "self"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signum
    assert done.stderr == f"stopped by {signum.name}\n"


def test_a_worker_told_to_end_ends_without_a_word() -> None:
    command = [sys.executable, "-c", STOPPED, str(int(signal.SIGTERM)), "child"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{int(signal.SIGTERM)}\n", "")


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stops_in_order(Console(quiet=True)):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        with stops_in_order(Console(quiet=True)):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_a_full_disk_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write /x: No space"), full_disks_named():
        raise OSError(28, "No space left on device", "/x")
    for number in (errno.EDQUOT, errno.EFBIG, errno.EROFS):  # a quota, a limit, a read-only disk
        with pytest.raises(RunError, match="cannot write /x: "), full_disks_named():
            raise OSError(number, os.strerror(number), "/x")
    with pytest.raises(FileNotFoundError), full_disks_named():
        open(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("report.write", set()),
        ("cli", set()),
        ("pipeline", set()),
        ("export.ort_head", {"export"}),
        ("runtime.feed", {"evaluate", "export"}),
        ("evaluate.run_accuracy", {"evaluate"}),
        ("tasks.intervals", {"train", "quantize", "evaluate", "export"}),
        ("quantize.observers", {"quantize", "evaluate", "export"}),
        ("quantize.__init__", {"quantize", "evaluate", "export"}),
        ("data.listing", {"train", "quantize", "evaluate", "export"}),
        ("model.care", {"train", "quantize", "evaluate", "export"}),
    ],
)
def test_code_that_a_stage_cannot_reach_makes_it_no_staler(
    changed: str, stale: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by = {
        "train": ("train.stage", "evaluate.accuracy"),  # with what judges its epochs
        "quantize": ("quantize.stages",),
        "evaluate": ("evaluate.run_accuracy",),
        "export": ("export.stage",),
    }

    def digests() -> dict[str, str]:
        return {
            stage: stages.code_digest(
                stages.READS_IMAGES, *(f"care_compress.{name}" for name in names)
            )
            for stage, names in made_by.items()
        }

    before, known = digests(), stages._digests()
    name = f"care_compress.{changed}".removesuffix(".__init__")
    edited = {**known, name: "other"}
    assert edited.keys() == known.keys()
    monkeypatch.setattr(stages, "_digests", lambda: edited)
    after = digests()
    assert {stage for stage in made_by if before[stage] != after[stage]} == stale


def test_no_import_of_ours_is_overlooked() -> None:
    """Imports are found by a pattern; here every module is parsed."""
    for name, path in stages._modules().items():
        parsed = set[str]()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                parsed |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, name
                parsed |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
        ours = {one for one in parsed if one.split(".")[0] == "care_compress"}
        assert ours <= stages._imports(name), name
