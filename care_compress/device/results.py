"""results.json: what was verified and measured on this board, to be taken home."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from care_compress.device.manifest import Bundle
from care_compress.device.storage import digest_file, read_json_object, write_json_whole


def results_path(bundle: Bundle) -> Path:
    """Where the results of a bundle lie."""
    return bundle.folder / "results.json"


def timestamp() -> str:
    """Now, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017 (Python 3.10)


def merge_results(
    bundle: Bundle,
    kind: str,
    board: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    part: str,
    values: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Add the "accuracy" or the "speed" of some models to results.json.

    `models` tells each one from another engine or setting of it. What is there already stays if it
    speaks of the same bundle, board and model: an accuracy of one engine beside the speed of
    another would look like one engine that has both.
    """
    old = read_json_object(results_path(bundle)) or {}
    head = {
        "format": 1,
        "kind": kind,
        **{key: bundle.manifest[key] for key in ("target", "run", "recipe", "fingerprint")},
        "bundle_sha256": digest_file(bundle.folder / "manifest.json"),
        "board": dict(board),
    }
    same = all(old.get(key) == value for key, value in head.items())
    merged: dict[str, Any] = dict(old["models"]) if same else {}
    for name, value in values.items():
        about = models[name]
        known = merged.get(name, {})
        kept = known if all(known.get(key) == said for key, said in about.items()) else {}
        merged[name] = {**kept, **about, part: {**value, "measured_at": timestamp()}}
    results = {**head, "models": merged, "measured_at": timestamp()}
    write_json_whole(results_path(bundle), results)
    return results
