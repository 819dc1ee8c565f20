"""The wheel alone: built, installed in an empty folder, and used from another one."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import care_compress
from care_compress.recipe.recipe import RECIPES_DIR

ROOT = Path(__file__).resolve().parent.parent
FEW = (
    "quantize.calibrate.images=16", "evaluate.images=120", "export.images=16",
    "export.targets=[onnxruntime-cpu]",
)  # fmt: skip


def run(*command: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """One command; `path` comes before everything that is installed."""
    env = {**os.environ, "COLUMNS": "200"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as who installs that would; so both are whole."""
    folder = tmp_path_factory.mktemp("dist")
    made = run(
        sys.executable,
        "-c",
        "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))",
        str(folder),
        cwd=copied(folder / "tree"),
    )
    assert made.returncode == 0, made.stderr
    sdist = folder / made.stdout.split()[-1]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = run(
        *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sdist),
        cwd=folder,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def copied(tree: Path) -> Path:
    """What git knows of the checkout: building leaves folders behind."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel beside the tested environment, in front of the checkout."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = run(*pip, "install", "--no-deps", "--target", str(folder), str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_everything_that_ships_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("METADATA"))
        about = archive.read(metadata).decode()
    shipped = "care_compress/shipped"
    for folder in ("recipes", "examples"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"{shipped}/{file.relative_to(ROOT).as_posix()}" in names
    assert f"{shipped}/eval/reference.yaml" in names
    for file in (ROOT / "care_compress").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("tests/", "bench/", "setup")) for name in names)
    for extra in ("openvino", "tensorrt", "tensorrt-rtx", "ray", "dev"):
        assert f"Provides-Extra: {extra}" in about
    assert f"\nVersion: {care_compress.__version__}\n" in about


def test_the_verbs_work_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    def verb(*arguments: str) -> str:
        command = [sys.executable, "-m", "care_compress", *arguments]
        done = run(*command, cwd=tmp_path, path=installed)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert care_compress.__version__ in verb("--version")
    assert f"{len(list(RECIPES_DIR.glob('*.yaml')))} recipes" in verb("recipes", "--check")
    said = json.loads(verb("doctor", "--json"))
    assert not any("constraints.txt" in str(target) for target in said["targets"].values())
    assert not list(tmp_path.iterdir())
    verb("quantize", "int8_ptq", *(part for one in FEW for part in ("--set", one)))
    run_dir = tmp_path / "runs" / "int8_ptq"
    assert (run_dir / "exports" / "onnxruntime-cpu" / "int8.onnx").is_file()
    # Of a repository that an environment may lie in.
    assert json.loads((run_dir / "manifest.json").read_text())["git_revision"] is None
    verb("bundle", "onnxruntime-cpu", "--run", "int8_ptq")
    assert list((run_dir / "bundles").glob("*.tar.gz"))


@pytest.mark.slow
def test_a_comparison_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    def verb(*arguments: str) -> int:
        command = [sys.executable, "-m", "care_compress", *arguments]
        return run(*command, cwd=tmp_path, path=installed).returncode

    assert verb("quantize", "int8_ptq", *(part for one in FEW for part in ("--set", one))) == 0
    # Exit code 1 is a budget that so few images, or a busy machine, cannot hold.
    assert verb("compare", "fp32", "int8", "--images", "60") in (0, 1)
    assert (tmp_path / "runs" / "int8_ptq" / "report.html").is_file()


def test_recipes_and_targets_of_ones_own_go_by_path(installed: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("claim: mine\nbase: int8_ptq\nseed: 3\nexport: {targets: [mybox.yaml]}\n")
    box = (RECIPES_DIR / "targets" / "openvino-cpu.yaml").read_text()
    (tmp_path / "mybox.yaml").write_text(box)
    plan = [sys.executable, "-m", "care_compress", "plan", "mine.yaml", "--target", "mybox.yaml"]
    done = run(*plan, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout


def test_a_missing_package_is_named_with_its_extra(installed: Path, tmp_path: Path) -> None:
    code = "from care_compress.shipped import *; print(install_command('openvino'), QUANTIZE)"
    done = run(sys.executable, "-c", code, cwd=tmp_path, path=installed)
    assert done.stdout.split("\n")[0] == (
        "pip install 'care-compress[openvino]' care-compress quantize"
    )
