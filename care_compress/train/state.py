"""The state a killed training resumes from: one file, written whole or not at all."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from care_compress.errors import TrainingError
from care_compress.run import atomic_file


@dataclass
class Progress:
    """How far a training has come; plain data only."""

    step: int = 0  # steps completed
    first_loss: float | None = None
    recent_loss: float = 0.0  # moving average, for the divergence guard
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per validation


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


def _previous(path: Path) -> Path:
    """Where the state before the newest one is kept."""
    return path.with_suffix(".previous.pt")


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # Whatever damaged the file, the only way on is the same.
    except Exception as error:
        raise TrainingError(
            f"{path} is damaged, so this training cannot resume.", "delete it to train anew"
        ) from error
    return state
