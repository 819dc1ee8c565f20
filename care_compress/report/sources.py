"""The files of a run directory that a report is written from; only results.json must be there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from care_compress.errors import RunError
from care_compress.files import read_json, sha256_file
from care_compress.recipe.reading import read_yaml
from care_compress.report.differences import ChangedImage, read_pictures
from care_compress.shipped import QUANTIZE
from care_compress.tasks.known import task_of
from care_compress.tasks.task import Task

Json = dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """What a run left; None or empty for what it did not make."""

    name: str
    results: Json
    recipe: Json  # as it was resolved
    manifest: Json
    evidence: Json
    results_sha256: str
    calibration: Json | None = None
    tuning: Json | None = None
    slim: Json | None = None  # the widths that were chosen
    trained: Json | None = None  # history of the float training
    qat: Json | None = None
    compare: Json | None = None
    fidelity: Json | None = None
    sensitivity: Json | None = None
    exports: dict[str, Json] = field(default_factory=dict)  # by target
    measured: Sequence[Json] = ()  # by devices
    pictures: Sequence[ChangedImage] = ()  # that compare drew

    @property
    def task(self) -> Task:
        """What the models answer; older files are of the one task there was."""
        return task_of(self.results)

    @property
    def is_float(self) -> bool:
        """Whether nothing was quantized."""
        return "candidates" not in self.results

    @property
    def _mine(self) -> set[str]:
        """What compare may call this run's model."""
        return {self.name, self.results["recipe"], self.results["precision"]}

    @property
    def compared(self) -> dict[str, dict[str, Json]]:
        """What compare measured here: target -> model -> its values."""
        return (self.compare or {}).get("targets") or {}

    @property
    def pair(self) -> Json | None:
        """The run's model in compare.json beside its baseline, on the target that costs it most."""
        pairs = (self.compare or {}).get("pairs") or []
        named = [pair for pair in pairs if pair.get("candidate") in self._mine]
        chosen = named or (pairs if len(pairs) == 1 else [])
        return dict(max(chosen, key=lambda pair: float(pair["drop"]))) if chosen else None

    def series(self, name: str) -> int:
        """The colour and shape of a model, the same wherever it is drawn: 0 float, 1 this run's."""
        if name in self._mine or name == f"{self.results.get('kept')} (kept)":
            return 1
        bases = {pair.get("baseline") for pair in (self.compare or {}).get("pairs") or []}
        return (
            0 if name in {"float", "float, slimmed", "fp32", *bases} else 3 if "16" in name else 2
        )


def read_results(run_dir: Path) -> Json:
    """Read results.json, without which there is nothing to report."""
    found = _json(run_dir / "results.json")
    if found is None:
        raise RunError(f"{run_dir} has no results.json.", f"make the run first: {QUANTIZE}")
    return found


def read_sources(run_dir: Path, results: Json, evidence: Json) -> Sources:
    """Read everything else."""
    compare = _json(run_dir / "compare.json")
    if compare is not None and "targets" in compare:
        # Without the rows of other devices: `measured` has those, with all that is known of them.
        targets = {
            target: {name: one for name, one in models.items() if not one.get("measured_on")}
            for target, models in compare["targets"].items()
        }
        compare = {**compare, "targets": targets}
    path = run_dir / "recipe.yaml"
    recipe = read_yaml(path) if path.is_file() else {}
    beside = run_dir.with_name(f"{run_dir.resolve().name}_sensitivity")
    return Sources(
        name=results["run"],
        results=results,
        results_sha256=sha256_file(run_dir / "results.json"),
        recipe=recipe if isinstance(recipe, dict) else {},
        evidence=evidence,
        manifest=_json(run_dir / "manifest.json") or {},
        calibration=_json(run_dir / "calibration.json"),
        tuning=_json(run_dir / "ptq" / "tuning.json"),
        slim=_json(run_dir / "slim" / "plan.json"),
        trained=_json(run_dir / "float" / "history.json"),
        qat=_json(run_dir / "qat" / "history.json"),
        compare=compare,
        fidelity=_json(run_dir / "fidelity.json"),
        sensitivity=_json(beside / "sensitivity.json"),
        exports={path.parent.name: found for path, found in _all(run_dir, "exports/*/export.json")},
        measured=[found for _, found in _all(run_dir, "measured/*.json")],
        pictures=read_pictures(run_dir, compare or {}),
    )


def _all(run_dir: Path, pattern: str) -> Iterator[tuple[Path, Json]]:
    for path in sorted(run_dir.glob(pattern)):
        if (found := _json(path)) is not None:
            yield path, found


def _json(path: Path) -> Json | None:
    """Return None where there is no such file; raise RunError where it is damaged."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}.", "make it again") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no results.", "make it again")
    return content
