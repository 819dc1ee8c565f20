"""``care_deploy.py tune``: builds every model as it could be built, and keeps what is fastest here.

Candidates are the models of the bundle at two levels of the builder's effort and, where the graph
leaves its batch open, three batch sizes. Each becomes a row of results.json as soon as it is known:
with its figures, or with the reason why it has none. A candidate that fails stops no other one, and
a tune that is killed goes on where it was.
"""

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from care_compress.device.bench import Benched, bench_sessions, capture_graphs
from care_compress.device.board import BoardSetting, describe_board
from care_compress.device.build import BuildOptions
from care_compress.device.cuda import Cuda
from care_compress.device.deploy import Host, build_file, bundle_library, open_engine
from care_compress.device.enginefile import copy_engine, origin_path
from care_compress.device.layer_times import explain
from care_compress.device.library import Library
from care_compress.device.manifest import Bundle, precision_of
from care_compress.device.problems import DeployError, EngineMismatchError, NoGpuError
from care_compress.device.results import (
    ENGINE_RESULTS,
    engine_record,
    merge_results,
    read_results,
    write_results,
)
from care_compress.device.samples import verify_samples
from care_compress.device.session import Session
from care_compress.device.storage import read_json_object
from care_compress.device.verbs import BuildProgress, format_table, say

LEVELS = (3, 5)  # TensorRT's default, and everything it can try
BATCHES = (1, 4, 8)
_MOST_TRIES = 2  # of a candidate at which the program itself ended

# A row of results.json; "state" is begun, failed (for good), lost (worth another try) or passed.
Row = dict[str, Any]


@dataclass(frozen=True)
class EngineCandidate:
    """One model, built in one way."""

    model: str
    level: int
    batch: int
    is_open: bool  # whether the graph takes other batches, too

    @property
    def name(self) -> str:
        """How it is called in results.json, and its engine."""
        return f"{self.model}-o{self.level}-b{self.batch}"

    def engine(self, bundle: Bundle) -> Path:
        """Where it is built; the one that is kept is copied from there."""
        return bundle.folder / "candidates" / f"{self.name}.engine"


def candidates_of(bundle: Bundle, models: Sequence[str]) -> tuple[EngineCandidate, ...]:
    """The field: those of the smallest batch first."""
    batch = bundle.input_shape[0]
    sizes = (batch,) if isinstance(batch, int) else BATCHES
    return tuple(
        EngineCandidate(model, level, size, not isinstance(batch, int))
        for size in sizes
        for model in models
        for level in LEVELS
    )


@dataclass
class Tuner:
    """A board on which candidates are tried, and the rows that are known."""

    bundle: Bundle
    host: Host
    library: Library
    cuda: Cuda
    setting: BoardSetting
    seconds: float
    board: Mapping[str, Any]
    rows: dict[str, Row]

    def note(self, candidate: EngineCandidate, row: Row) -> None:
        """Write a row before anything else is tried."""
        self.rows[candidate.name] = row
        known = read_results(self.bundle, ENGINE_RESULTS, self.board)
        content = {"models": {}, **known, "candidates": self.rows}
        write_results(self.bundle, ENGINE_RESULTS, self.board, content)

    def is_measured(self, candidate: EngineCandidate) -> bool:
        """Whether nothing is left to do: it failed for good, or was timed in this power mode."""
        row = self.rows.get(candidate.name, {})
        if row.get("state") != "passed":
            return row.get("state") == "failed"
        speed = row.get("speed")
        mode = self.setting.power_mode
        return isinstance(speed, dict) and speed["during"]["power_mode"] == mode

    def has_engine(self, candidate: EngineCandidate) -> bool:
        """Whether its verified engine still lies there."""
        row, path = self.rows.get(candidate.name, {}), candidate.engine(self.bundle)
        about = read_json_object(origin_path(path)) or {}
        same = about.get("engine_sha256") == row.get("engine_sha256")
        return row.get("state") == "passed" and path.is_file() and same

    def try_out(self, candidate: EngineCandidate, progress: BuildProgress) -> None:
        """Build and verify one candidate."""
        before = self.rows.get(candidate.name, {})
        tries = int(before.get("tries", 0)) + 1 if before.get("state") == "begun" else 1
        row = _new_row(candidate, self.bundle.sha256(candidate.model))
        if tries > _MOST_TRIES:
            # A crash of a compiler would come again and again, and end every tune.
            reason = f"the program ended {_MOST_TRIES} times while it was built or verified"
            self.note(candidate, {**row, "state": "failed", "reason": reason})
            return
        self.note(candidate, {**row, "state": "begun", "tries": tries})
        try:
            row |= self._built_and_verified(candidate, partial(progress.show, candidate.name))
        except KeyboardInterrupt:
            self.note(candidate, {**row, "state": "lost", "reason": "it was interrupted"})
            raise
        except Exception as error:  # TensorRT's own errors have no class of their own
            # Memory that another program had may be free at the next try.
            row["state"] = "lost" if isinstance(error, (NoGpuError, OSError)) else "failed"
            text = error.message if isinstance(error, DeployError) else str(error)
            row["reason"] = f"{type(error).__name__}: {text}"
        self.note(candidate, row)
        if row["state"] != "passed":
            say(f"{candidate.name}: {row['reason']}")

    def _built_and_verified(self, candidate: EngineCandidate, notify: Any) -> Row:
        bundle, model = self.bundle, candidate.model
        engine, onnx, digest = candidate.engine(bundle), bundle.file(model), bundle.sha256(model)
        engine.parent.mkdir(exist_ok=True)
        options = BuildOptions(
            precision=precision_of(model),
            optimization_level=candidate.level,
            timing_cache=bundle.timing_cache,
            batch=(candidate.batch,) * 3 if candidate.is_open else None,
        )
        gpu = None if self.library.is_rtx else self.cuda.gpu()
        about = build_file(self.library, gpu, onnx, digest, engine, options, notify)
        session, _ = open_engine(self.library, self.cuda, engine, onnx, digest)
        with session:
            found = verify_samples({model: session}, bundle, say)[model]
        accuracy = found.as_record(bundle.limits(model))
        known = {key: about[key] for key in ("engine_sha256", "size_bytes", "build_seconds")}
        row: Row = {**known, "accuracy": accuracy, "state": "passed"}
        if not accuracy["passed"]:
            row["state"] = "failed"
            row["reason"] = (
                f"it answers otherwise: {accuracy['agreement']:.1f} % alike,"
                f" {accuracy['sqnr_db']:.1f} dB of at least {bundle.limits(model)['sqnr_db']:.1f}"
            )
        return row

    def time(self, group: Sequence[EngineCandidate]) -> dict[str, Any]:
        """Time all that passed in turns; what explains the fastest of them."""
        with contextlib.ExitStack() as stack:
            sessions: dict[str, Session] = {}
            engines: dict[str, dict[str, Any]] = {}
            for one in group:
                if not self.has_engine(one):
                    continue
                onnx, digest = self.bundle.file(one.model), self.bundle.sha256(one.model)
                try:
                    session, about = open_engine(
                        self.library, self.cuda, one.engine(self.bundle), onnx, digest
                    )
                except DeployError as error:  # memory for one engine may not suffice for all
                    reason = f"not timed: {error.message}"
                    self.note(one, {**self.rows[one.name], "state": "lost", "reason": reason})
                    continue
                sessions[one.name], engines[one.name] = stack.enter_context(session), about
            if not sessions:
                return {}
            captured = capture_graphs(sessions, True, say)
            benched: Benched = bench_sessions(
                sessions,
                self.bundle,
                self.cuda,
                self.host.root,
                self.setting,
                captured,
                self.seconds,
                say,
            )
            layers = explain(sessions, engines, benched, say)
        for warning in benched.warnings():
            say(f"take note: {warning}")
        records = benched.as_records()
        for one in group:
            if one.name in records:
                row = {**self.rows[one.name], "speed": records[one.name]}
                self.note(one, {**row, "layer_times": layers.get(one.name)})
        return layers


def tune(
    host: Host, bundle: Bundle, models: Sequence[str], power_mode: str | None, seconds: float
) -> int:
    """Try every candidate, time those that passed, and keep the best engine of each model."""
    library, cuda = bundle_library(host, bundle), host.load_cuda()
    board = describe_board(host.root, library, cuda)
    rows = read_results(bundle, ENGINE_RESULTS, board).get("candidates", {})
    setting = BoardSetting.of(host.root, power_mode)
    tuner = Tuner(bundle, host, library, cuda, setting, seconds, board, dict(rows))
    field = candidates_of(bundle, models)
    for size in dict.fromkeys(one.batch for one in field):
        group = [one for one in field if one.batch == size]
        if all(tuner.is_measured(one) for one in group):
            say(f"batch {size}: measured before")
            continue
        with BuildProgress() as progress:
            for one in group:
                failed = tuner.rows.get(one.name, {}).get("state") == "failed"
                if failed or tuner.has_engine(one):
                    say(f"{one.name}: known from before")
                else:
                    tuner.try_out(one, progress)
        tuner.time(group)
    first = [one for one in field if one.batch == field[0].batch]
    winner = _keep_best(tuner, first)
    if all(tuner.is_measured(one) for one in field):
        # Else some may be tried again, beside those that passed.
        shutil.rmtree(bundle.folder / "candidates", ignore_errors=True)
    _show_field(tuner, field, winner)
    print(f"Written to {bundle.results}")
    return 0 if winner is not None else 1


def _new_row(candidate: EngineCandidate, onnx_sha256: str) -> Row:
    return {
        "model": candidate.model,
        "optimization_level": candidate.level,
        "batch": candidate.batch,
        "onnx_sha256": onnx_sha256,
        "state": "begun",
        "reason": "",
        "tries": 0,
        "engine_sha256": None,
        "size_bytes": None,
        "build_seconds": None,
        "accuracy": None,
        "speed": None,
        "layer_times": None,
    }


def _keep_best(tuner: Tuner, group: Sequence[EngineCandidate]) -> str | None:
    """Put the fastest engine of each model where the other verbs look; the name of the winner.

    Latency of the smallest batch decides: rows of larger ones tell what throughput they bring.
    """
    bundle, winner = tuner.bundle, None
    fastest: dict[str, EngineCandidate] = {}
    measured = [one for one in group if tuner.rows[one.name].get("speed")]
    for one in sorted(measured, key=lambda one: _p50(tuner.rows[one.name])):
        winner = winner or one.name
        fastest.setdefault(one.model, one)
    about, parts = {}, {"accuracy": {}, "speed": {}, "layer_times": {}}  # type: ignore[var-annotated]
    for model, one in fastest.items():
        row, target = tuner.rows[one.name], bundle.engine(model)
        if tuner.has_engine(one):
            copy_engine(one.engine(bundle), target)
        engine = read_json_object(origin_path(target)) or {}
        if engine.get("engine_sha256") != row["engine_sha256"]:
            raise EngineMismatchError(
                f"{target.name} was replaced after {one.name} had been kept there.",
                "delete results.json and tune again",
            )
        about[model] = engine_record(bundle, model, engine)
        for part, found in parts.items():
            if row[part] is not None:
                found[model] = row[part]
    for part, found in parts.items():
        merge_results(bundle, ENGINE_RESULTS, tuner.board, about, part, found)
    known = read_results(bundle, ENGINE_RESULTS, tuner.board)
    write_results(bundle, ENGINE_RESULTS, tuner.board, {**known, "winner": winner})
    return winner


def _p50(row: Row) -> float:
    return float(row["speed"]["latency_ms"]["p50"])


def _show_field(tuner: Tuner, field: Sequence[EngineCandidate], winner: str | None) -> None:
    rows = [["candidate", "level", "batch", "GPU p50 ms", "images/s", "SQNR dB", ""]]
    for one in sorted(
        field,
        key=lambda one: (
            one.batch,
            _p50(row) if (row := tuner.rows[one.name])["speed"] else float("inf"),
        ),
    ):
        row = tuner.rows[one.name]
        speed, accuracy = row["speed"], row["accuracy"]
        rows.append(
            [
                one.model,
                str(one.level),
                str(one.batch),
                "" if speed is None else f"{speed['latency_ms']['p50']:.3f}",
                "" if speed is None else f"{speed['throughput']:.0f}",
                "" if accuracy is None else f"{accuracy['sqnr_db']:.1f}",
                "kept: the fastest" if one.name == winner else str(row["reason"])[:100],
            ]
        )
    print(format_table(rows))
