"""The GitHub Action: its scripts call verbs and options that exist and pass on what is given."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from care_compress.cli import app

ROOT = Path(__file__).resolve().parents[2]
ACTION = ROOT / ".github" / "actions" / "care-compress-gate" / "action.yml"
ABOUT: dict[str, Any] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = ABOUT["runs"]["steps"]
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
case "${1:-}" in compare) exit "${COMPARE_EXIT:-0}";; gate) exit "${GATE_EXIT:-0}";; esac
"""
GIVEN = {
    "recipe": "my recipes/int8 small.yaml",
    "checkpoint": "weights of mine/care s0.pth",
    "data": "/data/image net",
    "resolution": "224",
    "targets": "openvino-cpu,onnxruntime-cpu",
    "baseline": "base lines/first.json",
    "max-drop": "0.5",
    "max-slowdown": "20",
    "max-size": "1",
    "name": "nightly",
}


def filled_in(text: str, inputs: dict[str, str], temporary: Path) -> str:
    """An expression as GitHub fills it in."""
    values = {f"inputs.{name}": value for name, value in inputs.items()}
    values["runner.temp"] = str(temporary)
    return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda found: values[found[1]], text)


def run_steps(folder: Path, given: dict[str, str], **more: str) -> tuple[list[list[str]], int]:
    """Run the scripts one after the other with stubs on PATH; what was called, and how it ended."""
    inputs = {name: str(one.get("default", "")) for name, one in ABOUT["inputs"].items()} | given
    stubs, temporary, calls = folder / "stubs", folder / "temp of a runner", folder / "calls"
    stubs.mkdir()
    temporary.mkdir()
    for name in ("care-compress", "python"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    calls.touch()
    code = 0
    for step in (one for one in STEPS if "run" in one and code == 0):
        own = {key: filled_in(v, inputs, temporary) for key, v in step.get("env", {}).items()}
        environment = {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "RUNNER_TEMP": str(temporary),
            "GITHUB_ACTION_PATH": str(ACTION.parent),
            **own,
            **more,
        }
        # As GitHub calls bash, and with -u: a misspelt variable is an error here.
        script = ["bash", "--noprofile", "--norc", "-euo", "pipefail", "-c", step["run"]]
        code = subprocess.run(script, env=environment, cwd=folder, timeout=60).returncode
    lines = calls.read_bytes().split(b"\n")[:-1]
    return [[part.decode() for part in line.split(b"\0")[:-1]] for line in lines], code


def parsed(call: list[str]) -> tuple[str, dict[str, Any]]:
    """A call as our command line reads it; a verb or option that is none raises."""
    assert call[0] == "care-compress"
    group: Any = typer.main.get_command(app)
    context = group.commands[call[1]].make_context(call[1], call[2:])
    values = {name: value for name, value in context.params.items() if value not in (None, ())}
    return call[1], values


def test_every_input_arrives_where_it_belongs(tmp_path: Path) -> None:
    calls, code = run_steps(tmp_path, GIVEN)
    assert code == 0
    install, *ours = calls
    assert install[:4] == ["python", "-m", "pip", "install"]
    told = dict(parsed(call) for call in ours)
    assert list(told) == ["quantize", "compare", "gate"]
    runs = tmp_path / "temp of a runner" / "care-compress"
    assert all(values["runs"] == runs for values in told.values())
    expected = {
        "recipe": GIVEN["recipe"],
        "ckpt": GIVEN["checkpoint"],
        "data": GIVEN["data"],
        "res": 224,
        "name": "nightly",
    }
    assert expected.items() <= told["quantize"].items()
    assert list(told["quantize"]["set_"]) == ["export.targets=[openvino-cpu,onnxruntime-cpu]"]
    assert list(told["compare"]["models"]) == ["fp32", "nightly"]
    assert told["compare"]["targets"] == GIVEN["targets"] and told["compare"]["report"]
    assert told["gate"] == {
        "run": "nightly",
        "baseline": Path(GIVEN["baseline"]),
        "max_drop": 0.5,
        "max_slowdown": 20.0,
        "max_size": 1.0,
        "junit": runs / "nightly" / "junit.xml",
        "runs": runs,
    }


def test_what_is_left_out_is_the_recipes_and_the_verbs_own(tmp_path: Path) -> None:
    calls, code = run_steps(tmp_path, {"baseline": "base.json"})
    told = dict(parsed(call) for call in calls[1:])
    assert code == 0 and told["quantize"]["recipe"] == "int8_ptq"
    assert not {"ckpt", "data", "res"} & told["quantize"].keys()
    assert "targets" not in told["compare"]
    assert not {"max_drop", "max_slowdown", "max_size"} & told["gate"].keys()


def test_no_input_is_read_as_shell(tmp_path: Path) -> None:
    """Each holds what would leave a file behind if a shell read it."""
    trap = "$(touch hit) `touch hit` \"; touch hit; ' \\ * \nx"
    given = dict.fromkeys(GIVEN, trap)
    _, code = run_steps(tmp_path, given)
    assert code == 0 and not (tmp_path / "hit").exists()
    whole = (tmp_path / "calls").read_bytes().decode()
    for flag in (
        "--ckpt",
        "--data",
        "--res",
        "--targets",
        "--baseline",
        "--max-drop",
        "--max-size",
    ):
        assert f"{flag}\0{trap}\0" in whole, flag
    for step in STEPS:
        assert "${{" not in step.get("run", ""), "GitHub would write it into the script"


@pytest.mark.parametrize(
    ("exits", "verbs", "code"),
    [
        ({"COMPARE_EXIT": "1"}, ["quantize", "compare", "gate"], 0),  # the recipe's own budget
        ({"COMPARE_EXIT": "2"}, ["quantize", "compare"], 1),
        ({"GATE_EXIT": "1"}, ["quantize", "compare", "gate"], 1),
        ({"GATE_EXIT": "2"}, ["quantize", "compare", "gate"], 2),
    ],
)
def test_the_gate_decides_and_an_error_ends_the_job(
    exits: dict[str, str], verbs: list[str], code: int, tmp_path: Path
) -> None:
    calls, ended = run_steps(tmp_path, GIVEN, **exits)
    assert [call[1] for call in calls[1:]] == verbs and ended == code


def test_inputs_and_their_uses_are_the_same() -> None:
    used = set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", ACTION.read_text(encoding="utf-8")))
    assert used == set(ABOUT["inputs"]) == set(GIVEN)


def test_it_asks_two_actions_of_github_and_nobody_else() -> None:
    uses = [step["uses"] for step in STEPS if "uses" in step]
    names = [name.partition("@") for name in uses]
    assert [name for name, _, _ in names] == ["actions/setup-python", "actions/upload-artifact"]
    assert all(re.fullmatch(r"v\d+", version) for _, _, version in names)
    upload = STEPS[-1]
    assert upload["if"] == "always()"
    for name in ("report.html", "compare.json", "junit.xml"):
        assert f"/care-compress/${{{{ inputs.name }}}}/{name}\n" in upload["with"]["path"]
