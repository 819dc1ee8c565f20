"""Checkpoints of the Hugging Face Hub, from a cache made here and from a tiny Hub on this machine.

What the Hub's client reads from the environment it reads at its import, so each check of it runs in
a process of its own, and a second process sees what the first has left.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, image_folder

import care_compress
from care_compress.cli import main
from care_compress.errors import CheckpointError, UnsafeCheckpointError
from care_compress.model.checkpoint import save_checkpoint
from care_compress.model.hub import HubCheckpoint, choose_weights, fetch, parse_reference
from care_compress.run.finished import read_run
from care_compress.runtime.artifact import artifact_path

OLD, NEW, BAD = "a" * 40, "b" * 40, "e" * 40
REPOSITORY = "some-lab/care.nano"
NOWHERE = "http://127.0.0.1:9"  # the port of "discard", where nobody listens


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same network in every form a repository has it, and one that is another."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = care_compress.build_model("care_nano", num_classes=len(CLASSES))
    save_checkpoint(model, folder / "model.safetensors", {})
    torch.save({"state_dict": model.state_dict()}, folder / "model.pth")
    with torch.no_grad():
        model.head.fc.bias.add_(1.0)
    save_checkpoint(model, folder / "other.safetensors", {})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cache_of(folder: Path, commits: dict[str, dict[str, bytes]], **refs: str) -> Path:
    """A cache as the Hub's client lays it out: contents once, and links to them by commit."""
    root = folder / f"models--{REPOSITORY.replace('/', '--')}"
    for commit, files in commits.items():
        for name, content in files.items():
            blob = root / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = root / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    for ref, commit in refs.items():
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return folder


@dataclass
class TinyHub:
    """The routes of the Hub that a download asks for, and what was asked."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    refuse: tuple[int, str] | None = None  # a status and the Hub's word for why
    refuse_files: bool = False  # what a gated repository does: it is shown and not given
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: TinyHub) -> Iterator[TinyHub]:
    class Routes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            api, files = f"/api/models/{REPOSITORY}/revision/", f"/{REPOSITORY}/resolve/"
            if hub.refuse is not None and (path.startswith(files) or not hub.refuse_files):
                self.send(hub.refuse[0], b"", {"X-Error-Code": hub.refuse[1]}, with_body)
                return
            if not path.startswith((api, files)):
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
                return
            revision, _, name = path.removeprefix(api).removeprefix(files).partition("/")
            commit = hub.refs.get(revision, revision)
            if commit not in hub.commits:
                self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
            elif path.startswith(api):
                siblings = [{"rfilename": file} for file in hub.commits[commit]]
                about = {"id": REPOSITORY, "sha": commit, "siblings": siblings}
                self.send(200, json.dumps(about).encode(), {}, with_body)
            else:
                content = hub.commits[commit][name]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                headers = {"ETag": etag, "X-Repo-Commit": commit}
                self.send(200, content, headers, with_body)

        def send(
            self, status: int, content: bytes, headers: dict[str, str], with_body: bool
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Routes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(cache: Path, endpoint: str, offline: bool = False) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **mine,
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache / "home"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


# Without torch, whose import takes longer than all of these together.
FETCH = """
import sys
from care_compress.errors import CareError
from care_compress.model.hub import fetch
try:
    found = fetch(sys.argv[1])
    print(found.weights)
    print(found.reference)
except CareError as error:
    print(error)
"""


def load(reference: str, env: dict[str, str]) -> list[str]:
    """What a process of its own gets: its lines, which are one where it is refused."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, reference],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def refused(reference: str, env: dict[str, str]) -> str:
    (line,) = load(reference, env)
    return line


def test_a_download_is_kept_by_its_commit_and_needs_no_network_after(
    weights: dict[str, bytes], tmp_path: Path
) -> None:
    files = {
        "config.json": json.dumps({"architecture": "care_nano", "num_classes": 4}).encode(),
        "model.safetensors": weights["model.safetensors"],
        "pytorch_model.bin": b"never asked for",
    }
    reference = f"hf-hub:{REPOSITORY}"
    with serving(TinyHub({NEW: files}, {"main": NEW})) as hub:
        env = environment(tmp_path, hub.url)
        path, told = load(reference, env)
        assert Path(path).read_bytes() == weights["model.safetensors"]
        assert told == f"{reference}@{NEW}"
        assert not any("pytorch_model" in asked for asked in hub.asked)

        hub.asked.clear()
        assert load(f"{reference}@{NEW}", env) == [path, told]
        assert hub.asked == [], "a commit that is there cannot have changed"

        assert load(reference, environment(tmp_path, hub.url, offline=True)) == [path, told]
        assert hub.asked == []
    assert load(reference, environment(tmp_path, NOWHERE)) == [path, told]


def test_a_branch_is_asked_for_anew_and_a_commit_stays(
    weights: dict[str, bytes], tmp_path: Path
) -> None:
    old = {"model.safetensors": weights["model.safetensors"]}
    new = {"model.safetensors": weights["other.safetensors"]}
    cache = cache_of(tmp_path, {OLD: old}, main=OLD)
    with serving(TinyHub({OLD: old, NEW: new}, {"main": NEW})) as hub:
        env = environment(cache, hub.url)
        path, _ = load(f"hf-hub:{REPOSITORY}@main", env)
        assert Path(path).read_bytes() == weights["other.safetensors"]
        path, _ = load(f"hf-hub:{REPOSITORY}@{OLD}", env)
        assert Path(path).read_bytes() == weights["model.safetensors"]


def test_a_pickle_is_read_where_there_is_nothing_better(
    weights: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"pytorch_model.bin": weights["model.pth"]}
    cache = cache_of(tmp_path, {OLD: files, NEW: {"a.safetensors": weights["model.safetensors"]}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    pickled = care_compress.load_checkpoint(f"hf-hub:{REPOSITORY}@{OLD}").state_dict()
    named = care_compress.load_checkpoint(f"hf-hub:{REPOSITORY}@{NEW}").state_dict()
    assert all(torch.equal(tensor, named[name]) for name, tensor in pickled.items())
    assert artifact_path(f"hf-hub:{REPOSITORY}@{OLD}").name == "pytorch_model.bin"


def test_a_pickle_that_asks_for_code_is_refused_unexecuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = tmp_path / "witness"
    pickle = f"cposix\nsystem\n(S'touch {witness}'\ntR.".encode()
    cache = cache_of(tmp_path, {BAD: {"pytorch_model.bin": pickle}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    with pytest.raises(UnsafeCheckpointError, match=BAD):
        care_compress.load_checkpoint(f"hf-hub:{REPOSITORY}@{BAD}")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_classes": 1000}, "config.json says 1000 classes, model.safetensors holds 4."),
        ({"pretrained_cfg": {"num_classes": 7}}, "says 7 classes"),
        ({"architecture": "care_s0"}, "says care_s0, model.safetensors holds care_nano."),
        ({"architecture": "caret", "num_classes": 4}, None),
        # As timm writes it: what the weights were trained on at first stands inside.
        ({"num_classes": 4, "pretrained_cfg": {"num_classes": 1000}}, None),
        ({}, None),
    ],
)
def test_a_config_that_contradicts_the_weights_is_named(
    config: dict[str, object], said: str | None
) -> None:
    found = HubCheckpoint(REPOSITORY, OLD, Path("model.safetensors"), config)
    if said is None:
        found.check("care_nano", 4)
        return
    with pytest.raises(CheckpointError) as raised:
        found.check("care_nano", 4)
    assert said in str(raised.value) and OLD in str(raised.value)


@pytest.mark.parametrize("weights_are", ["absent", "removed"])
def test_a_commit_without_its_weights_is_asked_for_again(
    weights_are: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache may hold a part of it, or links whose content somebody has cleared away."""
    commit = ("a" if weights_are == "absent" else "b") * 39 + "1"
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    if weights_are == "absent":
        del files["model.safetensors"]
    cache = cache_of(tmp_path, {commit: files})
    if weights_are == "removed":
        (path,) = cache.rglob("model.safetensors")
        path.resolve().unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="is not in the cache.*HF_HUB_OFFLINE is set"):
        fetch(f"hf-hub:{REPOSITORY}@{commit}")


@pytest.mark.parametrize(("config", "fits"), [('{"num_classes": 9}', False), ("[1]", True)])
def test_a_checkpoint_is_held_against_its_config(
    config: str,
    fits: bool,
    weights: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"config.json": config.encode(), "model.safetensors": weights["model.safetensors"]}
    commit = ("c" if fits else "d") * 40  # what was found once is kept as long as a process lives
    cache = cache_of(tmp_path, {commit: files})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    if fits:
        care_compress.load_checkpoint(f"hf-hub:{REPOSITORY}@{commit}")
        return
    with pytest.raises(CheckpointError, match="says 9 classes"):
        care_compress.load_checkpoint(f"hf-hub:{REPOSITORY}@{commit}")


def test_what_the_hub_refuses_is_said_in_one_line(
    weights: dict[str, bytes], tmp_path: Path
) -> None:
    reference = f"hf-hub:{REPOSITORY}"
    files = {"model.safetensors": weights["model.safetensors"]}
    with serving(TinyHub({NEW: files}, {"main": NEW})) as hub:
        env = environment(tmp_path, hub.url)
        said = refused("hf-hub:some-lab/missing", env)
        assert "shows no repository some-lab/missing" in said and "hf auth login" in said
        assert "has no revision 'v9'" in refused(f"{reference}@v9", env)
        hub.refuse, hub.refuse_files = (403, "GatedRepo"), True
        said = refused(reference, env)
        assert "gated or private" in said and "hf auth login" in said
        hub.refuse = 403, ""
        assert "the Hub answers 403" in refused(reference, env)
        hub.refuse, hub.refuse_files = (503, ""), False
        assert "cannot be reached" in refused(reference, env)
    for env in (environment(tmp_path, NOWHERE), environment(tmp_path, NOWHERE, offline=True)):
        said = refused(reference, env)
        assert "is not in the cache" in said and "HF_HUB_OFFLINE" in said
        assert f"hf download {REPOSITORY}" in said


def test_a_hub_that_is_down_does_not_matter_to_what_is_cached(
    weights: dict[str, bytes], tmp_path: Path
) -> None:
    files = {"model.safetensors": weights["model.safetensors"]}
    cache = cache_of(tmp_path, {OLD: files}, main=OLD)
    with serving(TinyHub({}, {}, refuse=(503, ""))) as hub:
        assert len(load(f"hf-hub:{REPOSITORY}", environment(cache, hub.url))) == 2
        assert hub.asked, "a branch may have moved"


@pytest.mark.parametrize(
    "reference",
    [
        "hf-hub:",
        "hf-hub:care",
        "hf-hub:a/b/c",
        "hf-hub:a/../b",
        "hf-hub:/etc/passwd",
        "hf-hub:a/b c",
        "hf-hub:a/b@",
        "hf-hub:a/b@../../../x",
        "hf-hub:a/b@x y",
        "hf-hub:a/b@-x",
        f"hf-hub:a/{'b' * 5000}",
        "hf-hub:a/b\n@main",
    ],
)
def test_a_name_that_is_none_says_how_one_is_written(reference: str) -> None:
    with pytest.raises(CheckpointError, match="hf-hub:owner/name@REVISION") as raised:
        parse_reference(reference)
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_revisions_may_be_branches_tags_and_requests() -> None:
    assert parse_reference("hf-hub:a/b") == ("a/b", "main")
    for revision in ("v1.0", "refs/pr/1", "feature/x", OLD):
        assert parse_reference(f"hf-hub:a/b@{revision}") == ("a/b", revision)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["pytorch_model.bin", "model.safetensors", "b.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "b.safetensors"], "b.safetensors"),
        (["README.md", "a.pth", "pytorch_model.bin"], "pytorch_model.bin"),
        (["a.pth.tar", "int8/int8.bin", "old/b.pth"], "a.pth.tar"),
        (["a.safetensors", "b.safetensors"], "2 files of weights: a.safetensors, b.safetensors"),
        (["a.pt", "b.pth"], "hf download a/b FILE"),
        (["README.md", "int8.bin"], "holds no weights, only README.md, int8.bin"),
        ([], "holds no weights, nothing"),
    ],
)
def test_one_file_of_weights_is_chosen_or_none(files: list[str], chosen: str) -> None:
    if chosen in files:
        assert choose_weights(files, "hf-hub:a/b") == chosen
        return
    with pytest.raises(CheckpointError) as raised:
        choose_weights(files, "hf-hub:a/b")
    assert chosen in str(raised.value)


def test_a_run_keeps_the_commit_whatever_the_branch_does(
    weights: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = image_folder(tmp_path / "data", per_class=4)
    old = {"model.safetensors": weights["model.safetensors"]}
    new = {"model.safetensors": weights["other.safetensors"]}
    cache = cache_of(tmp_path / "cache", {OLD: old, NEW: new}, main=OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    fetch.cache_clear()
    reference = f"hf-hub:{REPOSITORY}"
    where = ["--data", str(data), "--res", "32", "--crop", "1.0"]

    def code(*arguments: str) -> object:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        return left.value.code

    assert code("quantize", "fp32", "--ckpt", reference, *where, "--set", "export.targets=[]") == 0
    assert OLD in "".join(capsys.readouterr().out.split())
    manifest = json.loads(Path("runs/fp32/manifest.json").read_text())
    about = {"repository": REPOSITORY, "commit": OLD, "file": "model.safetensors"}
    assert manifest["inputs"]["checkpoint"]["hub"] == about
    digest = hashlib.sha256(weights["model.safetensors"]).hexdigest()
    assert manifest["inputs"]["checkpoint"]["sha256"] == digest

    (cache / f"models--{REPOSITORY.replace('/', '--')}" / "refs" / "main").write_text(NEW)
    fetch.cache_clear()
    kept = read_run(Path("runs/fp32")).checked_checkpoint()
    assert kept.read_bytes() == weights["model.safetensors"]

    for verb in (["accuracy"], ["quantize", "fp32", "--ckpt"]):
        before = Path("runs/fp32/results.json").read_bytes()
        assert code(*verb, f"{reference}@v2", *where) == 2
        told = capsys.readouterr().err
        assert told.startswith("CheckpointError: ") and len(told.splitlines()) == 1, told
        assert Path("runs/fp32/results.json").read_bytes() == before
    assert code("accuracy", reference, *where) == 0
    assert "top-1" in capsys.readouterr().out
