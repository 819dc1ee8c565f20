"""What the run was: the plan, the exported files, and the manifest."""

from typing import Any

from care_compress.report.blocks import (
    Block,
    Cell,
    PageSection,
    Table,
    Text,
    megabytes,
    missing,
    number,
)
from care_compress.report.sources import Json, Sources

PLAN = ("site", "role", "input", "weight", "precision", "rule", "MACs (M)", "share %")


def plan(sources: Sources) -> PageSection:
    """Every site with the rule that decided it."""
    section = PageSection("plan", "Plan")
    found = sources.evidence.get("plan")
    if found is None:
        section.blocks.append(missing(sources.evidence["missing"]["plan"]))
        return section
    target = found["target"] or "no runtime: simulated"
    section.blocks.append(
        Text(
            f"Made for {target} at {found['resolution']}x{found['resolution']}. Rules are an "
            "ordered list; the last that matches a site decides."
        )
    )
    rules = [
        (number(index, 0), Cell(rule)) for index, rule in enumerate(sources.evidence["rules"], 1)
    ]
    rows = [_site(site) for site in found["sites"]]
    kept = [
        (Cell(one["what"]), number(one["count"], 0), number(one["macs"] / 1e6, 3), Cell(one["why"]))
        for one in found["kept_in_float"]
    ]
    columns = ("what", "count", "MACs (M)", "why")
    section.blocks += [
        Table("Rules", ("rule", "says"), rules, ("rule",)),
        Table("Sites", PLAN, rows, PLAN[6:], tall=True),
        Table("Float by nature", columns, kept, columns[1:3]),
    ]
    return section


def _site(site: Json) -> tuple[Cell, ...]:
    rules = [site["input_rule"]] + ([] if site["weight"] is None else [site["weight_rule"]])
    said = ", ".join(str(rule) if rule else "none" for rule in dict.fromkeys(rules))
    return (
        Cell(site["name"]),
        Cell(site["role"]),
        Cell(_tensor(site["input"])),
        Cell("" if site["weight"] is None else _tensor(site["weight"])),
        Cell(site["precision"]),
        Cell(said, float(rules[0])),
        number(site["macs"] / 1e6, 3),
        number(100 * site["share"], 2),
    )


def _tensor(spec: Json) -> str:
    """As the plan prints it: ``s8 per channel, mse``."""
    if not isinstance(spec["bits"], int):
        return str(spec["bits"])
    grouped = spec["granularity"] == "group"
    where = f"group {spec['group']}" if grouped else spec["granularity"]
    clip = "" if spec["range"] == "min_max" else f", {spec['range']}"
    return f"{'s' if spec['symmetric'] else 'u'}{spec['bits']} per {where}{clip}"


def exports(sources: Sources) -> PageSection:
    """Each file beside the model it was made from, engines, and what could not be exported."""
    section = PageSection("exports", "Exports")
    found = sources.results["exports"]
    files = [row for export in found.values() for row in _files(export)]
    if files:
        columns = ("target", "file", "size", "same answer %", "ties", "SQNR dB", "result")
        numeric = ("size", "same answer %", "ties", "SQNR dB")
        section.blocks += [
            Table("Files, read back and compared with their model", columns, files, numeric),
            _integers(found),
        ]
    engines = [row for export in found.values() for row in _engines(export)]
    if engines:
        built = ("target", "engine", "size", "library", "layers by precision")
        section.blocks.append(Table("Engines built ahead of time", built, engines, ("size",)))
    section.blocks += _not_exported(found)
    if not found:
        section.blocks.append(
            missing("This run exported nothing: make quantize with export.targets does that.")
        )
    return section


def _files(export: Json) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for model in export.get("models", {}).values():
        near = Cell("exact", 1e9) if model["sqnr_db"] is None else number(model["sqnr_db"], 1)
        if reason := model.get("not_measured", {}).get("sqnr_db"):
            near = Cell(f"not measured: {reason}", -1e9)
        rows.append(
            (
                Cell(export["target"]),
                Cell(model["file"]),
                megabytes(model["size_bytes"]),
                number(model["agreement"], 1),
                number(model["ties"], 0),
                near,
                Cell("✓ agrees" if model["holds"] else "✗ differs"),
            )
        )
    return rows


def _integers(found: Json) -> Table:
    """What was planned in integers, and what the runtime here really runs so."""
    columns = ("target", "planned (M)", "executed (M)", "share %", "answers as float %")
    rows = []
    for export in found.values():
        if "models" not in export:
            continue
        macs = export["integer_macs"]
        executed = macs["executed"]
        unknown = Cell("cannot be asked here")
        rows.append(
            (
                Cell(export["target"]),
                number(macs["planned"] / 1e6, 2),
                unknown if executed is None else number(executed / 1e6, 2),
                number(None if macs["share"] is None else 100 * macs["share"], 1),
                number(export["answers_as_float"], 1),
            )
        )
    return Table("Multiplications in integers", columns, rows, columns[1:])


def _engines(export: Json) -> list[tuple[Cell, ...]]:
    return [
        (
            Cell(export["target"]),
            Cell(f"{name}.engine"),
            megabytes(engine["size_bytes"]),
            Cell(f"{engine['library']} {engine['version']}"),
            Cell(", ".join(f"{kind} {n}" for kind, n in engine["precisions"].items())),
        )
        for name, engine in export.get("engines", {}).items()
    ]


def _not_exported(found: Json) -> list[Block]:
    """One sentence for each reason, naming its targets."""
    alike: dict[tuple[str, str], list[str]] = {}
    for export in found.values():
        for kind, said in (
            ("skipped", "No export"),
            ("failed", "The export failed"),
            ("engines_missing", "No engine"),
        ):
            if reason := export.get(kind):
                key = (said, reason.replace(export["target"], "it"))
                alike.setdefault(key, []).append(export["target"])
    return [
        missing(f"{said} for {', '.join(names)}: {reason}")
        for (said, reason), names in alike.items()
    ]


def manifest(sources: Sources) -> PageSection:
    """Everything that is needed to make the run again, and to know that it is the same."""
    section = PageSection("manifest", "Manifest")
    results, found = sources.results, sources.manifest
    rows = [("run", sources.name), ("recipe", results["recipe"])]
    rows += [("claim", sources.recipe.get("claim", "")), ("seed", sources.recipe.get("seed", ""))]
    rows += [("git revision", found.get("git_revision") or "not in a git checkout")]
    rows += [(key, found[key]) for key in ("started", "finished") if key in found]
    rows += list(_flat("input", found.get("inputs") or {}))
    rows += list(_flat("data", {k: v for k, v in results["data"].items() if k != "classes"}))
    rows += [("data classes", len(results["data"]["classes"]))]
    if sources.calibration:
        rows += [("calibration method", sources.calibration.get("method", ""))]
    if sources.tuning:
        alphas = sources.tuning.get("alphas") or {}
        changed = sum(alpha is not None for alpha in alphas.values())
        rows += [("layers rescaled", f"{changed} of {len(alphas)}")]
    rows += list(_flat("seconds", results["seconds"]))
    rows += [(f"export {target}", one["fingerprint"]) for target, one in sources.exports.items()]
    section.blocks.append(_pairs("How to make it again", rows))
    if not found:
        section.blocks.append(missing("manifest.json is gone: make quantize writes one."))
        return section
    section.blocks.append(_pairs("Machine and versions", list(_flat("", found["machine"]))))
    return section


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Nested plain data as dotted names and values."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [
        pair
        for key, inner in value.items()
        for pair in _flat(f"{name} {key}".strip().replace("_", " "), inner)
    ]


def _pairs(caption: str, rows: list[tuple[str, Any]]) -> Table:
    cells = [(Cell(name), Cell(_said(value))) for name, value in rows]
    return Table(caption, ("what", "value"), cells)


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_said(one) for one in value) or "none"
    return str(value)
