"""The state a killed training resumes from: one file, written whole or not at all."""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from care_compress.errors import TrainingError
from care_compress.files import atomic_file

STATE_FILE = "train_state.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass
class Progress:
    """How far a training has come; plain data only."""

    step: int = 0  # steps completed
    first_loss: float | None = None
    recent_loss: float = 0.0  # moving average, for the divergence guard
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per validation
    skipped: dict[str, str] = field(default_factory=dict)  # images that could not be decoded


@dataclass
class Trainee:
    """Everything that training changes."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    progress: Progress

    @property
    def result(self) -> nn.Module:
        """The weights to keep: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the state after a completed step."""
        state = {
            "fingerprint": fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "progress": vars(self.progress),
        }
        content = io.BytesIO()
        torch.save(state, content)
        # At the end, because torch reads past it and would not notice a flipped bit by itself.
        content.write(hashlib.sha256(content.getbuffer()).digest())
        if path.exists():
            path.replace(_previous(path))
        with atomic_file(path) as temporary:
            # Through memory, because torch reports a full disk as an error of its own.
            temporary.write_bytes(content.getbuffer())

    def resume(self, path: Path, fingerprint: str) -> bool:
        """Continue from a saved state; False if there is none, or it belongs to another training.

        The fingerprint covers what decides the weights: recipe sections, seed, data, teacher.
        """
        source = path if path.exists() else _previous(path)
        if not source.exists():
            return False
        state = _read(source)
        if state["fingerprint"] != fingerprint:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.progress = Progress(**state["progress"])
        return True


def step_back(path: Path) -> int:
    """Drop the newest state, which a step that went wrong may have spoilt; the step now kept."""
    if _previous(path).exists():
        _previous(path).replace(path)
    return int(_read(path)["progress"]["step"])


def forget(path: Path) -> None:
    """Remove the states of another training, so that no stepping back can end in one."""
    path.unlink(missing_ok=True)
    _previous(path).unlink(missing_ok=True)


def drop_damaged(path: Path) -> None:
    """Remove states that cannot be read: resuming then falls back on the other, or begins anew."""
    for state in (path, _previous(path)):
        if state.exists():
            try:
                _read(state)
            except TrainingError:
                state.unlink()


def _previous(path: Path) -> Path:
    """Where the state before the newest one is kept."""
    return path.with_suffix(".previous.pt")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        saved, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if hashlib.sha256(saved).digest() != digest:
            raise ValueError("its bytes are not those that were written")
        state: dict[str, Any] = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    # Whatever damaged the file, the only way on is the same.
    except Exception as error:
        raise TrainingError(
            f"{path} is damaged, so this training cannot resume.",
            "--repair (make: REPAIR=1) goes back to the state before it, or trains anew",
        ) from error
    return state
