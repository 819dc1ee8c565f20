"""What an export leaves: files and what they say of themselves, how near each came to its model.

`Exported` is written in two ways: whole, for the rerun that takes it over (`as_record`), and as the
figures that ``export.json`` and ``results.json`` show (`as_json`).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PlainSerializer, TypeAdapter, ValidationInfo
from rich.console import Console
from rich.table import Table

from care_compress.console import say, widened
from care_compress.evaluate.agreement import Agreement
from care_compress.evaluate.readback import Peak
from care_compress.files import digest_of, size_of
from care_compress.model.predictor import TASK
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import NEEDS, Target
from care_compress.runtime.feed import PREPROCESSING

NOT_ASKED = "only OpenVINO on a CPU says which products it runs in integers"
PREFIX = "care_compress."
LEAST_SHARE = 0.95  # of the planned integer MACs, below which a user should know
WIDTH = 112  # of a table: names must be whole even where a terminal is narrow


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input.

    RGB; the shorter side to `resize` pixels by Pillow's bicubic filter, the middle
    `resolution` x `resolution` of it, divided by 255, minus `mean`, over `std`.
    """

    resolution: int
    resize: int
    crop_pct: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif_rotate: bool  # turned as its EXIF orientation says, before all that
    # Where answers have a place: the longer side to `resolution` by a bilinear filter, the shorter
    # one centred between grey bars. Nothing is cut.
    letterbox: bool = False

    @classmethod
    def of(cls, data: DataSection, letterbox: bool = False) -> "Preprocessing":
        """As the recipe's evaluation does it."""
        size, crop = data.resolution, data.crop_pct
        resize = size if letterbox else math.floor(size / crop)
        crop = 1.0 if letterbox else crop
        return cls(size, resize, crop, data.mean, data.std, data.exif_rotate, letterbox)

    def as_json(self) -> dict[str, Any]:
        """As files hold it; of what is usual they say nothing."""
        said = asdict(self)
        return said if self.letterbox else {k: v for k, v in said.items() if k != "letterbox"}


@dataclass(frozen=True)
class About:
    """What an exported file says of itself: enough to serve it without the run that made it."""

    recipe: str
    fingerprint: str  # of the model's weights, the classes and the preprocessing
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    needs: str | None = None  # what a processor must have, or its answers are wrong
    input: Literal["float", "uint8"] = "float"
    task: str = "classification"

    def as_json(self) -> dict[str, Any]:
        """As ``export.json`` holds it; of what is usual it says nothing."""
        said = {**asdict(self), "preprocessing": self.preprocessing.as_json()}
        return (
            said
            if self.task != "classification"
            else {k: v for k, v in said.items() if k != "task"}
        )

    @property
    def layout(self) -> str:
        """Of the input: images, then height, width and channels, or the channels first."""
        return "NHWC" if self.input == "uint8" else "NCHW"

    def as_texts(self) -> dict[str, str]:
        """Key and value as ONNX metadata and OpenVINO's runtime information hold them."""
        texts = {
            PREFIX + "recipe": self.recipe,
            PREFIX + "fingerprint": self.fingerprint,
            PREFIX + "classes": json.dumps(self.classes),
            PREPROCESSING: json.dumps(self.preprocessing.as_json()),
        }
        if self.task != "classification":
            texts[TASK] = self.task
        if self.input == "uint8":  # of floats a file says nothing, as ever
            texts[PREFIX + "input"] = f"{self.input} {self.layout}"
        return texts if self.needs is None else {**texts, NEEDS: self.needs}


def _in_folder(name: Path, info: ValidationInfo) -> Path:
    assert isinstance(info.context, Path)
    return info.context / name


@dataclass(frozen=True)
class File:
    """One exported model, and how near it came to the model it was made from."""

    # A record knows it by its name in the target's folder: a run can be moved.
    path: Annotated[
        Path, AfterValidator(_in_folder), PlainSerializer(lambda path: path.name, return_type=str)
    ]
    agreement: Agreement
    diverges: str  # the first layer that does not agree; nothing where all do
    peak: Peak | None = None  # of its float16 values

    @property
    def holds(self) -> bool:
        """Whether it computes what its model does, here and where float16 is float16."""
        return self.agreement.holds and (self.peak is None or self.peak.fits)


@dataclass
class Exported:
    """What one target got; only a reason where it cannot execute the model."""

    target: Target
    files: dict[str, File] = field(default_factory=dict)  # by precision
    engines: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # in short, built ahead of time
    not_built: str = ""  # why there is none, of a target whose engines can be
    skipped: str = ""
    failed: str = ""
    planned_macs: int = 0  # in integers
    executed_macs: int | None = None  # as the compiled model says; None: it cannot be asked here
    answers_as_float: float | None = None  # percent

    @property
    def share(self) -> float | None:
        """Executed of planned integer MACs, where that can be known."""
        if self.executed_macs is None or not self.planned_macs:
            return None
        return self.executed_macs / self.planned_macs

    def as_record(self) -> Any:
        """Plain data for `of_record`; through text, where alone the infinite has its own form."""
        return json.loads(_RECORD.dump_json(self, exclude={"target"}))

    @classmethod
    def of_record(cls, target: Target, folder: Path, record: Any) -> "Exported":
        """What `as_record` gave, of a target whose files lie in `folder`."""
        return _RECORD.validate_python({**record, "target": target}, context=folder)

    def as_json(self) -> dict[str, Any]:
        """As ``export.json`` and ``results.json`` hold it."""
        for kind in ("skipped", "failed"):
            if reason := getattr(self, kind):
                return {"target": self.target.name, kind: reason}
        return {
            "target": self.target.name,
            "runtime": self.target.runtime,
            "placement": self.target.placement,
            "models": {
                name: {
                    "file": file.path.name,
                    "sha256": digest_of(file.path),
                    "size_bytes": size_of(file.path),
                    **file.agreement.as_json(),
                    "holds": file.holds,
                    **({} if file.peak is None else {"float16_peak": file.peak.as_json()}),
                    **({"parts_at": file.diverges} if file.diverges else {}),
                }
                for name, file in self.files.items()
            },
            "integer_macs": {
                "planned": self.planned_macs,
                "executed": self.executed_macs,
                "share": self.share,
                **({"not_measured": NOT_ASKED} if self.executed_macs is None else {}),
            },
            "answers_as_float": self.answers_as_float,
            "engines": self.engines,
            **({"engines_missing": self.not_built} if self.not_built else {}),
        }


_RECORD = TypeAdapter(Exported)


def show_exports(done: Sequence[Exported], console: Console) -> None:
    """Print how near every file came to its model, and what a target does not get."""
    images = [file.agreement.images for one in done for file in one.files.values()]
    if images:
        widened(console, WIDTH).print(_table(done, max(images)))
    alike: dict[str, list[str]] = {}
    for one in done:
        if one.skipped:
            reason = one.skipped.replace(one.target.name, "it")
            alike.setdefault(reason, []).append(one.target.name)
    for reason, names in alike.items():
        say(f"no export for {', '.join(names)}: {reason}", console)
    for one in done:
        if one.share is not None and one.share < LEAST_SHARE:
            part = f"{100 * one.share:.1f} % of the planned integer MACs"
            console.print(
                f"[yellow]{one.target.name} runs only {part} in integers[/]: this processor may "
                "lack them (care-compress doctor)"
            )
        if one.not_built:
            say(f"no engine for {one.target.name}: {one.not_built}", console)


def _table(done: Sequence[Exported], images: int) -> Table:
    """Exported files, each compared with the model it was made from."""
    table = Table(title=f"Exports, read back and compared on {images:,} images")
    table.title_justify = "left"
    for column in ("target", "file", "size", "read by", "same answer", "SQNR", "integer MACs run"):
        left = column in ("target", "file", "read by")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for one in done:
        share = "" if one.share is None else f"{100 * one.share:.1f} %"
        reader = "OpenVINO, CPU" if one.target.runtime == "openvino" else "ONNX Runtime, CPU"
        for file in one.files.values():
            size, near = f"{size_of(file.path) / 1e6:.2f} MB", file.agreement
            tied = f" + {near.ties} tie{'s' if near.ties > 1 else ''}" if near.ties else ""
            same = f"{near.percent:.1f} %{tied}"
            table.add_row(one.target.name, file.path.name, size, reader, same, str(near), share)
        for name, about in one.engines.items():
            size = f"{about['size_bytes'] / 1e6:.2f} MB"
            table.add_row(one.target.name, f"{name}.engine", size, "not run", "", "", "")
    return table
