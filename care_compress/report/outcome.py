"""What came out: the verdict, accuracy with its intervals, size and energy."""

import math
from typing import Any

from care_compress.quantize.spec import ENERGY_PJ
from care_compress.report.blocks import (
    Cell,
    Figure,
    Picture,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    Tone,
    interval,
    megabytes,
    missing,
    number,
)
from care_compress.report.plots import Bar, Span, bars, spans
from care_compress.report.sources import Json, Sources

NORMAL_95 = 1.959964
Model = tuple[str, str, Json]  # its name, the target where it is a file for one, its figures


def verdict(sources: Sources) -> Section:
    """Whether the compressed model is worth having, in a few lines."""
    section = Section("verdict", "Verdict")
    results = sources.results
    if sources.is_float:
        top1, images = results["accuracy"]["top1"], results["accuracy"]["images"]
        section.blocks.append(
            Text(
                f"A float model, the baseline of others: {top1:.2f} % of {images:,} images right. "
                "Nothing was quantized in this run."
            )
        )
    else:
        section.blocks += [_headline(sources), Tiles(tuple(_tiles(sources)))]
    section.blocks += _speed(sources)
    return section


def _headline(sources: Sources) -> Text:
    """The drop beside its limit, of the exported files where compare has measured them."""
    results = sources.results
    pair = sources.pair or sources.kept
    made = "of NNCF's file" if results["backend"] == "nncf" else "in simulation"
    where = "on the exported files" if sources.pair else made
    name = results["precision"].upper()
    drop = f"{pair['drop']:.2f} points {interval(pair['drop_ci95'])}"
    said = f"{name}: a top-1 drop of {drop} {where}"
    budget = results["budget"]
    if budget is None:
        return Text(f"{said}. The recipe sets no budget.")
    limit = budget["max_top1_drop"]
    if pair["drop"] > limit:
        return Text(f"{said}: more than the {limit:g} that the recipe allows.", "bad")
    if pair["drop_ci95"][1] > limit:
        return Text(
            f"{said}: within the {limit:g} that the recipe allows, though the interval reaches "
            "beyond it.",
            "good",
        )
    return Text(f"{said}: within the {limit:g} that the recipe allows.", "good")


def _tiles(sources: Sources) -> list[Tile]:
    results, pair = sources.results, sources.pair or sources.kept
    budget = results["budget"]
    limit = None if budget is None else budget["max_top1_drop"]
    tone: Tone = "plain" if limit is None else "good" if pair["drop"] <= limit else "bad"
    note = f"95 % {interval(pair['drop_ci95'])}"
    tiles = [
        Tile(
            "Top-1 drop",
            f"{pair['drop']:.2f} pt",
            note if limit is None else f"{note}, allowed {limit:g}",
            tone,
        ),
        Tile("Same answer as float", f"{pair['agreement']:.2f} %"),
    ]
    smallest = _smallest(sources)
    if smallest:
        ratio = _float_bytes(results) / smallest["size_bytes"]
        tiles.append(
            Tile("Size", f"{ratio:.1f}x", f"smaller: {smallest['size_bytes'] / 1e6:.2f} MB")
        )
    plan = results.get("plan")
    if plan:
        macs, total = plan["macs"], sum(plan["macs"].values())
        share = 100 * sum(n for kind, n in macs.items() if _in_integers(kind)) / total
        tiles.append(Tile("In integers", f"{share:.1f} %", f"of {total / 1e6:.1f} M products"))
    energy = _float_energy(sources)
    if plan and energy:
        ratio = energy / plan["energy_mj"]
        tiles.append(Tile("Energy", f"{ratio:.1f}x", "less, estimated for 45 nm"))
    return tiles


def _in_integers(precision: str) -> bool:
    """Whether ``w8a8`` or ``a8`` multiplies integers; ``w8a16`` and ``float`` do not."""
    return precision.rpartition("a")[2] in {"4", "6", "8"}


def _speed(sources: Sources) -> list[Text | Table]:
    """A line for each target, and every budget, as compare judged them."""
    compare = sources.compare
    if compare is None:
        return [
            missing(
                "Speed, and the accuracy of the exported files themselves, have not been measured: "
                f"python eval/compare.py fp32 {sources.name} does that."
            )
        ]
    blocks: list[Text | Table] = []
    for one in compare.get("budgets") or []:
        if not one.get("ok"):
            value, limit = (_limit(one.get(key)).text for key in ("value", "limit"))
            blocks.append(Text(f"✗ {one['name']} is broken: {value}, limit {limit}.", "bad"))
    blocks += [_said(said) for said in compare.get("verdicts") or []]
    budgets = compare.get("budgets") or []
    if budgets:
        rows = [
            (
                Cell(str(one["name"])),
                _limit(one.get("limit")),
                _limit(one.get("value")),
                Cell("✓ holds" if one.get("ok") else "✗ broken", float(bool(one.get("ok")))),
            )
            for one in budgets
        ]
        columns = ("budget", "limit", "measured", "result")
        blocks.append(Table("Budgets of the recipe", columns, rows, ("limit", "measured")))
    return blocks


def _said(verdict: Json | str) -> Text:
    """A verdict of compare as a sentence; plain text names its target itself."""
    if isinstance(verdict, str):
        return Text(verdict)
    text = f"{verdict.get('target')}: {verdict.get('text')}"
    if "pays" not in verdict:
        return Text(text)
    return Text(f"✓ {text}", "good") if verdict["pays"] else Text(f"✗ {text}", "bad")


def _limit(value: float | None) -> Cell:
    """A limit may be points, a ratio or bytes."""
    return Cell("not measured") if value is None else Cell(f"{value:,.6g}", float(value))


def wilson(percent: float, images: int) -> tuple[float, float]:
    """95 % interval of a share of images, in percent (Wilson's score interval)."""
    p, z2 = percent / 100, NORMAL_95**2
    middle = (p + z2 / (2 * images)) / (1 + z2 / images)
    half = NORMAL_95 / (1 + z2 / images) * math.sqrt(p * (1 - p) / images + z2 / (4 * images**2))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def accuracy(sources: Sources) -> Section:
    """Top-1 and top-5 with intervals: in simulation, and of the exported files."""
    results = sources.results
    images = results["accuracy"]["images"]
    found: list[Model] = []
    if sources.is_float:
        found.append(("float", "", dict(results["accuracy"])))
    else:
        found.append(("float", "", dict(results["float"])))
        for name, candidate in results["candidates"].items():
            kept = f"{name} (kept)" if name == results["kept"] else name
            found.append((kept, "", candidate))
    section = Section("accuracy", "Accuracy")
    section.blocks += [
        _accuracy_plot(sources, "In this run", {"": found}, images),
        _accuracy_table(f"On {images:,} validation images", found, images),
    ]
    section.blocks += _exported(sources)
    section.blocks.append(
        Text(
            "The interval of a top-1 is Wilson's; that of a drop is of paired images, and so far "
            "narrower: only images whose answer changed sides count."
        )
    )
    return section


def _exported(sources: Sources) -> list[Figure | Table]:
    """The files themselves, as compare measured them: by target where it says so."""
    compare = sources.compare
    if compare is None:
        return []
    by_target: dict[str, list[Model]] = {}
    for target, models in (compare.get("targets") or {}).items():
        found = [
            (name, target, {**_pair(compare, target, name), **one})
            for name, one in models.items()
            if one.get("top1") is not None
        ]
        if found:
            by_target[target] = found
    if not by_target:
        return []
    images = compare["images"]
    rows = [row for found in by_target.values() for row in found]
    return [
        _accuracy_plot(sources, "Exported files", by_target, images),
        _accuracy_table(f"Exported files on {images:,} images", rows, images),
    ]


def _pair(compare: Json, target: str, name: str) -> Json:
    """What compare found about a model beside its baseline, on this target or on all."""
    for pair in compare.get("pairs") or []:
        if pair.get("candidate") == name and pair.get("target", target) == target:
            return {key: pair.get(key) for key in ("drop", "drop_ci95", "agreement", "mcnemar_p")}
    return {}


def _accuracy_plot(
    sources: Sources, title: str, groups: dict[str, list[Model]], images: int
) -> Figure:
    pictures = []
    for group, found in groups.items():
        rows = []
        for name, _, one in found:
            low, high = wilson(one["top1"], images)
            text = f"{one['top1']:.2f} %"
            rows.append(Span(name, one["top1"], low, high, text, sources.series(name)))
        told = "; ".join(f"{row.label} {row.text}" for row in rows)
        pictures.append(Picture(spans(rows, f"Top-1 with 95 % intervals: {told}"), told, group))
    return Figure(tuple(pictures), f"{title}: top-1 with its 95 % interval")


def _accuracy_table(caption: str, found: list[Model], images: int) -> Table:
    columns = ["model", "top-1 %", "95 %", "top-5 %", "drop", "drop 95 %", "same answer %"]
    exported = any(target for _, target, _ in found)
    if exported:
        columns = ["target", *columns, "McNemar p"]
    rows = []
    for name, target, one in found:
        drop = one.get("drop")
        row = [
            Cell(name),
            number(one["top1"]),
            Cell(interval(wilson(one["top1"], images))),
            number(one.get("top5")),
            number(drop),
            Cell("" if drop is None else interval(one["drop_ci95"])),
            number(one.get("agreement")),
        ]
        if exported:
            row = [Cell(target), *row, number(one.get("mcnemar_p"), 3)]
        rows.append(tuple(row))
    numeric = ("top-1 %", "top-5 %", "drop", "same answer %", "McNemar p")
    return Table(caption, tuple(columns), rows, numeric)


def size(sources: Sources) -> Section:
    """Bytes on disk, multiplications by precision, energy of them."""
    section = Section("size", "Size and energy")
    plain = _float_bytes(sources.results)
    rows = [Bar("float32 weights", plain, f"{plain / 1e6:.2f} MB", 0)]
    for label, one in _files(sources):
        smaller = f"{one['size_bytes'] / 1e6:.2f} MB ({plain / one['size_bytes']:.1f}x)"
        rows.append(Bar(label, one["size_bytes"], smaller, 1))
    told = "; ".join(f"{row.label} {row.text}" for row in rows)
    section.blocks.append(
        Figure(
            (Picture(bars(rows, told), told),),
            "Size on disk",
            note="The float32 weights are parameters times 4 bytes, without a file around them.",
        )
    )
    if len(rows) == 1:
        section.blocks.append(
            missing(
                "No file was exported: make quantize with export.targets naming a target that "
                "executes this precision writes one."
            )
        )
    plan = sources.results.get("plan")
    if plan is None:
        section.blocks.append(missing("Energy is estimated from a plan, which this run has not."))
        return section
    total = sum(plan["macs"].values())
    macs = [
        (Cell(kind), number(count / 1e6, 3), number(100 * count / total, 2))
        for kind, count in plan["macs"].items()
    ]
    columns = ("precision", "MACs (M)", "share %")
    section.blocks.append(Table("Multiplications of one image", columns, macs, columns[1:]))
    energy = f"{plan['energy_mj']:.4f} mJ an image"
    before = _float_energy(sources)
    if before:
        energy += f", {before / plan['energy_mj']:.1f}x below the {before:.4f} mJ of float32"
    section.blocks.append(
        Text(f"Energy of the products, by the 45 nm figures (an estimate, not measured): {energy}.")
    )
    return section


def _float_bytes(results: Json) -> int:
    return 4 * int(results["rewrites"][-1]["parameters"])


def _float_energy(sources: Sources) -> float | None:
    """Of the same products in float32; the rotations of a quantized model are none of them."""
    plan = sources.evidence.get("plan")
    if plan is None:
        return None
    macs = sum(site["macs"] for site in plan["sites"])
    return float(macs * sum(ENERGY_PJ["float"]) * 1e-9)


def _files(sources: Sources) -> list[tuple[str, dict[str, Any]]]:
    """Every kind of exported file once, with the targets it is for."""
    found: dict[tuple[str, str], tuple[list[str], dict[str, Any]]] = {}
    for target, export in sources.results["exports"].items():
        for model in export.get("models", {}).values():
            kind = (model["file"], megabytes(model["size_bytes"]).text)
            found.setdefault(kind, ([], model))[0].append(target)
    return [
        (f"{one['file']}, {names[0] if len(names) == 1 else f'{len(names)} targets'}", one)
        for names, one in found.values()
    ]


def _smallest(sources: Sources) -> dict[str, Any] | None:
    """The smallest file of the run's own precision; megabytes decide about a device."""
    own = [
        export["models"][sources.results["precision"]]
        for export in sources.results["exports"].values()
        if sources.results["precision"] in export.get("models", {})
    ]
    return min(own, key=lambda model: int(model["size_bytes"]), default=None)
