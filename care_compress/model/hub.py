"""Checkpoints of the Hugging Face Hub: ``hf-hub:owner/name[@revision]``, at one commit.

A branch moves, a commit does not: what was asked for is resolved to a commit once, and a run keeps
that. Files come from the Hub's own cache (``HF_HUB_CACHE``). A commit that lies there is read
without a request, and a branch without a network as it was last seen.
"""

import errno
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_compress.console import listed, one_line, shortened
from care_compress.errors import CheckpointError
from care_compress.files import read_json

HUB_PREFIX = "hf-hub:"
FORM = "write hf-hub:owner/name, or hf-hub:owner/name@REVISION for a branch, a tag or a commit"
COMMIT = re.compile(r"[0-9a-f]{40}")
# Slashes are in refs/pr/1; a revision becomes a path in the cache, so nothing may lead out of it.
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w.+/-]*", re.ASCII)
DEFAULT_REVISION = "main"
# The file that is taken if it is there, and the kinds of which there may be one otherwise.
KINDS = (
    ("model.safetensors", (".safetensors",)),
    ("pytorch_model.bin", (".pth", ".pt", ".pth.tar")),
)
CONFIG = "config.json"


@dataclass(frozen=True)
class HubCheckpoint:
    """The weights of a repository at one commit, in the cache."""

    repository: str
    commit: str
    weights: Path
    config: dict[str, Any]  # of its config.json; empty where it has none

    @property
    def reference(self) -> str:
        """What names exactly this one, for ever."""
        return f"{HUB_PREFIX}{self.repository}@{self.commit}"

    def check(self, arch: str, num_classes: int) -> None:
        """Raise `CheckpointError` if config.json says otherwise than the weights do.

        It may lie at the top, as timm writes it, or under ``pretrained_cfg``.
        """
        inner = self.config.get("pretrained_cfg")
        known = {**(inner if isinstance(inner, dict) else {}), **self.config}
        said = known.get("num_classes")
        if isinstance(said, int) and said != num_classes:
            raise self._contradicted(f"{said} classes", f"{num_classes}")
        said = known.get("architecture")
        # Any other word may be somebody's name for one of these.
        if isinstance(said, str) and said.startswith("care_") and said != arch:
            raise self._contradicted(said, arch)

    def _contradicted(self, said: str, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.reference}: {CONFIG} says {shortened(one_line(said))}, "
            f"{self.weights.name} holds {found}.",
            "ask its owner which is right, or give the downloaded file's path",
        )


def is_hub(reference: str | Path) -> bool:
    """Whether a checkpoint is named by its place on the Hub."""
    return str(reference).startswith(HUB_PREFIX)


def pinned(reference: str) -> str:
    """The same checkpoint by its commit; a name of any other kind as it is."""
    return fetch(reference).reference if is_hub(reference) else reference


def origin(reference: str | None) -> dict[str, dict[str, str]]:
    """What a record says of a checkpoint from the Hub; nothing of any other."""
    if reference is None or not is_hub(reference):
        return {}
    found = fetch(reference)
    about = {"repository": found.repository, "commit": found.commit, "file": found.weights.name}
    return {"hub": about}


@functools.cache  # all stages of a run read the same weights, and one asks
def fetch(reference: str) -> HubCheckpoint:
    """The checkpoint, downloaded if need be; `CheckpointError` says what the Hub said."""
    import huggingface_hub
    from huggingface_hub import errors  # imports for half a second, so only where needed

    repository, revision = parse_reference(reference)
    folder = _cached(repository, revision)
    if folder is not None and COMMIT.fullmatch(revision) and _weights_in(folder):
        return _from_folder(folder, repository, reference)
    try:
        return _download(repository, revision, reference)
    except errors.GatedRepoError as error:
        raise _closed(reference, "its owner has to grant you access") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{reference}: the Hub shows no repository {repository}.",
            "check the name; if it is private: hf auth login (huggingface-cli login)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{reference}: {repository} has no revision {revision!r}.",
            f"see its branches and tags, or leave @{revision} out for {DEFAULT_REVISION}",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        # The library says so of every refusal that it does not know better.
        reason = error.__cause__ or error
    # A captive portal answers with a page where a description should be.
    except (OSError, ValueError, TypeError, LookupError, _transport_error()) as error:
        reason = error
    status = getattr(getattr(reason, "response", None), "status_code", None)
    if status in (401, 403):
        raise _closed(reference, f"the Hub answers {status}") from reason
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
        raise reason
    if isinstance(reason, PermissionError | NotADirectoryError | FileExistsError):
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise CheckpointError(
            f"{reference} cannot be kept in {cache}: {reason.strerror}.", "set HF_HUB_CACHE"
        ) from reason
    if folder is not None and _weights_in(folder):
        return _from_folder(folder, repository, reference)
    told = shortened(one_line(str(reason)) or type(reason).__name__)
    if isinstance(reason, errors.OfflineModeIsEnabled):
        told = "HF_HUB_OFFLINE is set"
    raise CheckpointError(
        f"{reference} is not in the cache, and the Hub cannot be reached ({told}).",
        f"unset HF_HUB_OFFLINE where there is a network, or run hf download {repository} on a "
        "machine that has one and copy its cache here (HF_HUB_CACHE)",
    ) from reason


def parse_reference(reference: str) -> tuple[str, str]:
    """Repository and revision of ``hf-hub:owner/name[@revision]``."""
    repository, at, revision = reference.removeprefix(HUB_PREFIX).partition("@")
    shown = shortened(one_line(reference))
    if "/" not in repository or not is_repository(repository):
        raise CheckpointError(f"{shown} names no repository of the Hub.", FORM)
    if at and not REVISION.fullmatch(revision):
        raise CheckpointError(f"{shown} names no revision after its @.", FORM)
    return repository, revision or DEFAULT_REVISION


def is_repository(name: str) -> bool:
    """Whether the Hub could have a repository of this name; some sets have no owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def choose_weights(files: Iterable[str], reference: str) -> str:
    """The file of a repository that holds its weights; `CheckpointError` where that is not one."""
    top = sorted(file for file in files if "/" not in file)
    for usual, suffixes in KINDS:
        fitting = [usual] if usual in top else [file for file in top if file.endswith(suffixes)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            repository, _ = parse_reference(reference)
            raise CheckpointError(
                f"{reference} holds {len(fitting)} files of weights: {listed(fitting[:5])}.",
                f"choose one: hf download {repository} FILE, and give the path it prints",
            )
    shown = f"only {listed(top[:5])}" if top else "nothing"
    raise CheckpointError(
        f"{reference} holds no weights, {shown}.",
        "name a repository with model.safetensors, another .safetensors, pytorch_model.bin, a .pth "
        "or a .pt at its top",
    )


def _download(repository: str, revision: str, reference: str) -> HubCheckpoint:
    from huggingface_hub import HfApi, constants, hf_hub_download

    # Without a limit a network that swallows packets is waited on for ever.
    limit = constants.HF_HUB_ETAG_TIMEOUT
    about = HfApi().model_info(repository, revision=revision, timeout=limit)
    files = [file.rfilename for file in about.siblings or ()]
    name = choose_weights(files, reference)
    # By what was asked for, so that the cache knows the branch when there is no network.
    weights = Path(hf_hub_download(repository, name, revision=revision))
    commit = weights.parent.name
    if CONFIG in files:
        hf_hub_download(repository, CONFIG, revision=commit)
    return _from_folder(weights.parent, repository, reference)


def _cached(repository: str, revision: str) -> Path | None:
    """The folder of the cache that holds a revision, or a part of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No pattern: only the folder is wanted, however much of the repository lies in it.
        folder = snapshot_download(
            repository, revision=revision, local_files_only=True, allow_patterns=[]
        )
    except (LocalEntryNotFoundError, OSError):
        return None
    return Path(folder)


def _weights_in(folder: Path) -> list[str]:
    return [
        name
        for name in _files_in(folder)
        if any(name == usual or name.endswith(suffixes) for usual, suffixes in KINDS)
    ]


def _files_in(folder: Path) -> list[str]:
    """What was downloaded of a commit; a link whose content was removed is none."""
    return [path.name for path in folder.iterdir() if path.is_file()]


def _from_folder(folder: Path, repository: str, reference: str) -> HubCheckpoint:
    files = _files_in(folder)
    config: Any = {}
    if CONFIG in files:
        try:
            config = read_json(folder / CONFIG)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{reference}: its {CONFIG} cannot be read: {shortened(one_line(str(error)))}.",
                "ask its owner, or give the downloaded file's path",
            ) from error
    weights = folder / choose_weights(files, reference)
    return HubCheckpoint(
        repository, folder.name, weights, config if isinstance(config, dict) else {}
    )


def _closed(reference: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{reference} is gated or private: {why}.",
        "hf auth login (huggingface-cli login) with an account that may read it, or set HF_TOKEN",
    )


def _transport_error() -> type[Exception]:
    """What a failed request raises: the class of whichever HTTP library the Hub's client uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]
