"""What an export left: files, how near each came to its model, and what a target cannot have."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.table import Table

from care_compress.evaluate.agreement import Agreement
from care_compress.files import digest_of, size_of
from care_compress.recipe.target import Target

NOT_ASKED = "only OpenVINO on a CPU says which products it runs in integers"


@dataclass(frozen=True)
class File:
    """One exported model: what it is, and how near it came to the model it was made from."""

    path: Path
    agreement: Agreement
    diverges: str  # the first layer that does not agree; nothing where all do

    def as_json(self) -> dict[str, Any]:
        """As ``export.json`` holds it."""
        return {
            "file": self.path.name,
            "sha256": digest_of(self.path),
            "size_bytes": size_of(self.path),
            **self.agreement.as_json(),
            **({"parts_at": self.diverges} if self.diverges else {}),
        }


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
        """Plain data for `of_record`; files by their names in the target's folder."""
        record = json.loads(_PLAIN.dump_json(self, exclude={"target"}))
        for file in record["files"].values():
            file["path"] = Path(file["path"]).name
        return record

    @classmethod
    def of_record(cls, target: Target, folder: Path, record: Any) -> "Exported":
        """What `as_record` gave."""
        done = _PLAIN.validate_python({**record, "target": target})
        for name, file in done.files.items():
            done.files[name] = replace(file, path=folder / file.path)
        return done

    def as_json(self) -> dict[str, Any]:
        """As ``export.json`` and ``results.json`` hold it."""
        for kind in ("skipped", "failed"):
            if reason := getattr(self, kind):
                return {"target": self.target.name, kind: reason}
        return {
            "target": self.target.name,
            "runtime": self.target.runtime,
            "placement": self.target.placement,
            "models": {name: file.as_json() for name, file in self.files.items()},
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

    def rows(self) -> list[tuple[str, ...]]:
        """One table row for each file."""
        share = "" if self.share is None else f"{100 * self.share:.1f} %"
        reader = "OpenVINO, CPU" if self.target.runtime == "openvino" else "ONNX Runtime, CPU"
        rows: list[tuple[str, ...]] = []
        for file in self.files.values():
            ties = file.agreement.ties
            tied = f" + {ties} tie{'s' if ties > 1 else ''}" if ties else ""
            same = f"{file.agreement.percent:.1f} %{tied}"
            near = str(file.agreement)
            size = _megabytes(size_of(file.path))
            rows.append((self.target.name, file.path.name, size, reader, same, near, share))
        for name, about in self.engines.items():
            size = _megabytes(about["size_bytes"])
            rows.append((self.target.name, f"{name}.engine", size, "not run", "", "", ""))
        return rows


_PLAIN = TypeAdapter(Exported)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def in_short(about: dict[str, Any]) -> dict[str, Any]:
    """An engine's description without its layers, which stand beside the engine."""
    keys = ("library", "version", "engine_sha256", "size_bytes", "layers_from", "precisions")
    return {key: about[key] for key in keys}


def export_table(rows: Sequence[tuple[str, ...]], images: int) -> Table:
    """Exported files, each compared with the model it was made from."""
    table = Table(title=f"Exports, read back and compared on {images:,} images")
    table.title_justify = "left"
    table.add_column("target", no_wrap=True)
    table.add_column("file", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("read by", no_wrap=True)
    for column in ("same answer", "SQNR", "integer MACs run"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
