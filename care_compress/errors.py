"""The errors a user can meet: each says what is wrong and what to do about it.

The command line turns any of them into one line and exit code 2; a traceback is
shown only with ``--debug``. Broken invariants of our own are asserts, never these.
"""


class CareError(Exception):
    """Base of every error whose cause lies in what the user gave us."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} Fix: {self.fix}" if self.fix else self.message


class RecipeError(CareError):
    """A recipe, a target file or a ``--set`` that does not say something we can do."""


class CheckpointError(CareError):
    """A checkpoint that cannot be read, or does not fit the network asked for."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint whose pickle asks to run code; nothing of it was executed."""


class InputSizeError(CareError):
    """An image too small (or of the wrong shape) for the network's four stages."""


class DataError(CareError):
    """A data set that cannot be opened, is empty, or does not fit the model."""


class BadImageError(DataError):
    """One image that cannot be decoded."""


class CalibrationError(CareError):
    """Calibration images that are missing, or that the float model cannot digest."""


class EvaluationError(CareError):
    """A model whose answers cannot be scored: none of them is a number."""


class TrainingError(CareError):
    """Training that cannot go on: a non-finite loss, or a state that does not fit."""


class RunError(CareError):
    """A run directory that cannot be used: locked, not writable, or somebody else's."""


class BusyRunError(RunError):
    """A run directory in which another process is at work."""


class DamagedRunError(RunError):
    """A file of a run that is not what was written: cut short, flipped bits, or edited."""


class Stopped(BaseException):
    """The process was told to stop. No `Exception`: nothing on the way out may take it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.hint = ""  # what was kept, by whoever kept it


class TargetError(CareError):
    """A runtime that is not installed here or cannot do what was asked."""


class ExportError(CareError):
    """An export that cannot be written, or whose file does not compute what the model does."""
