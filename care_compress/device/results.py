"""results.json: what was verified and measured on this board, to be taken home."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from care_compress.device.manifest import Bundle
from care_compress.device.storage import digest_file, read_json_object, write_json_whole

RESULTS_KIND = "care-deploy-results"


def results_path(bundle: Bundle) -> Path:
    """Where the results of a bundle lie."""
    return bundle.folder / "results.json"


def timestamp() -> str:
    """Now, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017 (Python 3.10)


def merge_results(
    bundle: Bundle,
    board: Mapping[str, Any],
    engines: Mapping[str, Mapping[str, Any]],
    part: str,
    values: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Add the "accuracy" or the "speed" of some models to results.json.

    What is there already stays if it speaks of the same bundle, board and engine: an accuracy of
    one engine beside the speed of another would look like one engine that has both.
    """
    old = read_json_object(results_path(bundle)) or {}
    head = {
        "format": 1,
        "kind": RESULTS_KIND,
        **{key: bundle.manifest[key] for key in ("target", "run", "recipe", "fingerprint")},
        "bundle_sha256": digest_file(bundle.folder / "manifest.json"),
        "board": dict(board),
    }
    same = all(old.get(key) == value for key, value in head.items())
    models: dict[str, Any] = dict(old["models"]) if same else {}
    for name, value in values.items():
        engine = engines[name]
        about = {
            "onnx_sha256": bundle.onnx_sha256(name),
            "engine_sha256": engine["engine_sha256"],
            "size_bytes": engine["size_bytes"],
            "layers_from": engine["layers_from"],
            "precisions": engine["precisions"],
        }
        known = models.get(name, {})
        kept = known if known.get("engine_sha256") == about["engine_sha256"] else {}
        models[name] = {**kept, **about, part: {**value, "measured_at": timestamp()}}
    merged = {**head, "models": models, "measured_at": timestamp()}
    write_json_whole(results_path(bundle), merged)
    return merged
