"""What an export left: files, how near each came to its model, and what a target cannot have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.table import Table

from care_compress.console import Finding
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


def what_failed(export: Mapping[str, Any], precision: str | None = None) -> dict[str, str]:
    """Why an export, as ``results.json`` holds it, is no model to use, by file.

    The target itself stands for a file that was not written. `precision` asks for one file only.
    """
    if "failed" in export:
        return {str(export["target"]): f"the export failed: {export['failed']}"}
    models = export.get("models", {})
    chosen = models.values() if precision is None else [models.get(precision, {"holds": True})]
    return {model["file"]: _difference(model) for model in chosen if not model["holds"]}


def _difference(model: Mapping[str, Any]) -> str:
    """How far a file is from its model, as the export measured it."""
    if model["sqnr_db"] is None:
        said = "it answers NaN or infinity"
    else:
        said = (
            f"{model['agreement']:.1f} % of answers as its model's, {model['sqnr_db']:.1f} dB of "
            f"at least {model['least_sqnr_db']:.1f}"
        )
    where = model.get("parts_at")
    return f"{said}; it parts at {where}" if where else said


def exports_finding(exports: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Whether every file is there and computes what its model does, by ``exports`` of results.json.

    A target that cannot execute the model is no failure, and counts for nothing here.
    """
    files = sum(len(export.get("models", {})) for export in exports.values())
    failed = [
        f"{target}: {why}" if file == target else f"{target}, {file}: {why}"
        for target, export in exports.items()
        for file, why in what_failed(export).items()
    ]
    if failed:
        missing = sum("failed" in export for export in exports.values())
        text = (
            f"{len(failed)} of {files + missing} files could not be made, or do not compute what "
            "their model does; the accuracy of the run is not theirs"
        )
        return Finding("exports", "warning", text, tuple(failed))
    if not files:
        return Finding("exports", "not measured", "this run has no exported file to read back")
    text = f"every file, of {files}, was read back and computes what its model does"
    return Finding("exports", "fine", text)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def in_short(about: dict[str, Any]) -> dict[str, Any]:
    """An engine's description without its layers, which stand beside the engine."""
    keys = ("library", "version", "engine_sha256", "size_bytes", "layers_from", "precisions")
    return {key: about[key] for key in keys}


def answers_beside(path: Path, name: str) -> Path:
    """Where the logits lie that a file's model gives; `name` is its precision."""
    return path.with_name(f"expected_{name}.npy")


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
