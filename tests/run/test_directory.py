import json
import subprocess
import sys
from pathlib import Path

import pytest

from care_compress.errors import RunError
from care_compress.files import atomic_file, fingerprint, sha256_file
from care_compress.recipe.recipe import load_recipe
from care_compress.run.directory import Run


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_manifest_tells_what_went_in_and_out(tmp_path: Path) -> None:
    recipe = load_recipe("fp32")
    with Run(tmp_path, "mine").open(recipe, {"cpu": "a test"}) as run:
        run.record_input("checkpoint", {"sha256": "abc"})
        result = run.write_json("results.json", {"top1": 90.0})
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    assert manifest["inputs"] == {"checkpoint": {"sha256": "abc"}}
    assert manifest["outputs"] == {"results.json": sha256_file(result)}
    assert manifest["recipe"]["data"]["resolution"] == recipe.data.resolution
    assert manifest["machine"] == {"cpu": "a test"}
    assert {"started", "finished", "seed", "git_revision"} <= manifest.keys()
    resolved = load_recipe(str(tmp_path / "mine" / "recipe.yaml"))
    assert resolved == recipe, "the resolved recipe can be run again"


def test_a_second_process_is_refused_while_the_first_holds_the_run(tmp_path: Path) -> None:
    recipe = load_recipe("fp32")
    script = (
        "import sys; from pathlib import Path; from care_compress.run.directory import Run;"
        "from care_compress.recipe.recipe import load_recipe\n"
        "with Run(Path(sys.argv[1]), 'mine').open(load_recipe('fp32'), {}): pass"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with Run(tmp_path, "mine").open(recipe, {}):
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode != 0 and "another process is working" in second.stderr
    assert subprocess.run(command).returncode == 0, "the lock goes with its holder"


def test_what_a_killed_process_left_half_written_is_swept(tmp_path: Path) -> None:
    (tmp_path / "mine" / "float").mkdir(parents=True)
    half = tmp_path / "mine" / "float" / ".train_state.pt.abc123.tmp"
    half.write_bytes(b"half")
    with Run(tmp_path, "mine").open(load_recipe("fp32"), {}):
        assert not half.exists()


def test_an_unusable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match="cannot use"),
        Run(tmp_path / "file", "x").open(load_recipe("fp32"), {}),
    ):
        pass


def test_fingerprints_depend_on_content_alone() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_old_results_do_not_pass_for_those_of_a_run_under_way(tmp_path: Path) -> None:
    with Run(tmp_path, "mine").open(load_recipe("fp32"), {}) as run:
        results = run.write_json("results.json", {"top1": 90.0})
    with pytest.raises(ZeroDivisionError), Run(tmp_path, "mine").open(load_recipe("fp32"), {}):
        assert not results.exists()
        raise ZeroDivisionError
    assert not results.exists(), "it did not come to its end"
