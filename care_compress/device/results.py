"""results.json: what was verified and measured on this device, to be taken home."""

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from care_compress.device.manifest import Bundle
from care_compress.device.storage import digest_file, read_json_object, write_json_whole

# What the file calls itself, and its format: 1 of engines timed the gap before a launch, too.
ENGINE_RESULTS = ("care-deploy-results", 2)
CPU_RESULTS = ("care-deploy-cpu-results", 1)


def merge_results(
    bundle: Bundle,
    kind: tuple[str, int],
    board: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    part: str,
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Add a part ("accuracy", "speed", "layer_times") of some models to results.json.

    `models` tells each one from another engine or setting of it. What is there already stays if it
    speaks of the same bundle, board and model: an accuracy of one engine beside the speed of
    another would look like one engine that has both.
    """
    known = read_results(bundle, kind, board)
    merged: dict[str, Any] = dict(known.get("models", {}))
    for name, value in values.items():
        about = models[name]
        one = merged.get(name, {})
        kept = one if all(one.get(key) == said for key, said in about.items()) else {}
        merged[name] = {**kept, **about, part: {**value, "measured_at": _now()}}
    write_results(bundle, kind, board, {**known, "models": merged})


def engine_record(bundle: Bundle, model: str, engine: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one engine from another in results.json; `engine` is its description."""
    keys = ("engine_sha256", "size_bytes", "layers_from", "precisions")
    return {"onnx_sha256": bundle.sha256(model), **{key: engine[key] for key in keys}}


def read_results(bundle: Bundle, kind: tuple[str, int], board: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds of this bundle on this board; nothing of any other."""
    old = read_json_object(bundle.results) or {}
    head = _head(bundle, kind, board)
    same = all(old.get(key) == value for key, value in head.items())
    return {key: old[key] for key in old.keys() - head.keys()} if same else {}


def write_results(
    bundle: Bundle, kind: tuple[str, int], board: Mapping[str, Any], content: Mapping[str, Any]
) -> None:
    """Write what `read_results` gives, with what it is of and when."""
    head = _head(bundle, kind, board)
    write_json_whole(bundle.results, {**head, **content, "measured_at": _now()})


def _head(bundle: Bundle, kind: tuple[str, int], board: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": kind[1],
        "kind": kind[0],
        **{key: bundle.manifest[key] for key in ("target", "run", "recipe", "fingerprint")},
        "bundle_sha256": digest_file(bundle.folder / "manifest.json"),
        "board": dict(board),
    }


def _now() -> str:
    now = datetime.now(timezone.utc)  # noqa: UP017 (Python 3.10)
    return now.isoformat(timespec="seconds")
