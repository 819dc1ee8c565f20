"""What the run was: the plan, the exported files, and the manifest."""

from typing import Any

from care_compress.report.blocks import (
    Block,
    Cell,
    Row,
    Table,
    Text,
    megabytes,
    missing,
    number,
    percent,
    table,
)
from care_compress.report.sources import Json, Sources
from care_compress.shipped import QUANTIZE


def plan(sources: Sources) -> list[Block]:
    """List every site with the rule that decided it."""
    found = sources.evidence.get("plan")
    if found is None:
        return [missing(sources.evidence["missing"]["plan"])]
    target = found["target"] or "no runtime: simulated"
    rules = enumerate(sources.evidence["rules"], 1)
    sites: list[Row] = []
    for site in found["sites"]:
        deciding = [site["input_rule"]] + ([] if site["weight"] is None else [site["weight_rule"]])
        said = ", ".join(str(rule) if rule else "none" for rule in dict.fromkeys(deciding))
        sites.append(
            {
                "site": site["name"],
                "role": site["role"],
                "input": _tensor(site["input"]),
                "weight": "" if site["weight"] is None else _tensor(site["weight"]),
                "precision": site["precision"],
                "rule": Cell(said, float(deciding[0])),
                "MACs (M)": number(site["macs"] / 1e6, 3),
                "share %": percent(site["share"], 2),
            }
        )
    kept: list[Row] = []
    for one in found["kept_in_float"]:
        count, macs = number(one["count"], 0), number(one["macs"] / 1e6, 3)
        kept.append({"what": one["what"], "count": count, "MACs (M)": macs, "why": one["why"]})
    return [
        Text(
            f"Made for {target} at {found['resolution']}x{found['resolution']}. Rules are an "
            "ordered list; the last that matches a site decides."
        ),
        *table("Rules", [{"rule": number(index, 0), "says": rule} for index, rule in rules]),
        *table("Sites", sites, tall=True),
        *table("Float by nature", kept),
    ]


def _tensor(spec: Json) -> str:
    """Describe a tensor as the plan prints it: ``s8 per channel, mse``."""
    if not isinstance(spec["bits"], int):
        return str(spec["bits"])
    grouped = spec["granularity"] == "group"
    where = f"group {spec['group']}" if grouped else spec["granularity"]
    clip = "" if spec["range"] == "min_max" else f", {spec['range']}"
    return f"{'s' if spec['symmetric'] else 'u'}{spec['bits']} per {where}{clip}"


def exports(sources: Sources) -> list[Block]:
    """List files beside the models they were made from, engines, and what was not exported."""
    found = sources.results["exports"]
    if not found:
        return [missing(f"This run exported nothing: {QUANTIZE} with export.targets does that.")]
    files: list[Row] = [
        {
            "target": export["target"],
            "file": model["file"],
            "size": megabytes(model["size_bytes"]),
            "same answer %": number(model["agreement"], 1),
            "ties": number(model["ties"], 0),
            "SQNR dB": _nearness(model),
            "result": "✓ agrees" if model["holds"] else "✗ differs",
        }
        for export in found.values()
        for model in export.get("models", {}).values()
    ]
    engines: list[Row] = []
    alike: dict[tuple[str, str], list[str]] = {}  # one sentence for each reason
    for export in found.values():
        for name, engine in export.get("engines", {}).items():
            precisions = engine["precisions"].items()
            engines.append(
                {
                    "target": export["target"],
                    "engine": f"{name}.engine",
                    "size": megabytes(engine["size_bytes"]),
                    "library": f"{engine['library']} {engine['version']}",
                    "layers by precision": ", ".join(f"{kind} {n}" for kind, n in precisions),
                }
            )
        for kind, said in (
            ("skipped", "No export"),
            ("failed", "The export failed"),
            ("engines_missing", "No engine"),
        ):
            if reason := export.get(kind):
                key = (said, reason.replace(export["target"], "it"))
                alike.setdefault(key, []).append(export["target"])
    return [
        *table("Files, read back and compared with their model", files),
        *_integers(found),
        *table("Engines built ahead of time", engines),
        *(
            missing(f"{said} for {', '.join(names)}: {reason}")
            for (said, reason), names in alike.items()
        ),
    ]


def _nearness(model: Json) -> Cell:
    """Show a file's SQNR, sorted above all others where exact and below them where unknown."""
    if reason := model.get("not_measured", {}).get("sqnr_db"):
        return Cell(f"not measured: {reason}", -1e9, numeric=True)
    if model["sqnr_db"] is None:
        return Cell("exact", 1e9, numeric=True)
    return number(model["sqnr_db"], 1)


def _integers(found: Json) -> list[Table]:
    """List what was planned in integers, and what the runtime here really runs so."""
    unknown = Cell("cannot be asked here", numeric=True)
    rows: list[Row] = []
    for export in found.values():
        if export.get("models"):
            macs = export["integer_macs"]
            executed = macs["executed"]
            rows.append(
                {
                    "target": export["target"],
                    "planned (M)": number(macs["planned"] / 1e6, 2),
                    "executed (M)": unknown if executed is None else number(executed / 1e6, 2),
                    "share %": percent(macs["share"]),
                    "answers as float %": number(export["answers_as_float"], 1),
                }
            )
    return table("Multiplications in integers", rows)


def manifest(sources: Sources) -> list[Block]:
    """List all that is needed to make the run again, and to know that it is the same."""
    results, found = sources.results, sources.manifest
    rows = [
        ("run", sources.name),
        ("recipe", results["recipe"]),
        ("claim", sources.recipe.get("claim", "")),
        ("seed", sources.recipe.get("seed", "")),
        ("git revision", found.get("git_revision") or "not in a git checkout"),
        *((key, found[key]) for key in ("started", "finished") if key in found),
        *_flat("input", found.get("inputs") or {}),
        *_flat("data", {k: v for k, v in results["data"].items() if k != "classes"}),
        ("data classes", len(results["data"]["classes"])),
    ]
    if sources.calibration:
        rows.append(("calibration method", sources.calibration.get("method", "")))
    if sources.tuning:
        alphas = sources.tuning.get("alphas") or {}
        changed = sum(alpha is not None for alpha in alphas.values())
        rows.append(("layers rescaled", f"{changed} of {len(alphas)}"))
    rows += _flat("seconds", results["seconds"])
    rows += [(f"export {target}", one["fingerprint"]) for target, one in sources.exports.items()]
    again = _pairs("How to make it again", rows)
    if not found:
        return [*again, missing(f"manifest.json is gone: {QUANTIZE} writes one.")]
    return [*again, *_pairs("Machine and versions", _flat("", found["machine"]))]


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Flatten nested plain data to names, joined by blanks, and values."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [
        pair
        for key, inner in value.items()
        for pair in _flat(f"{name} {key}".strip().replace("_", " "), inner)
    ]


def _pairs(caption: str, rows: list[tuple[str, Any]]) -> list[Table]:
    return table(caption, [{"what": name, "value": _said(value)} for name, value in rows])


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_said(one) for one in value) or "none"
    return str(value)
