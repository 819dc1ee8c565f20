"""The verdict: what compression cost, what it gave, and whether every budget holds."""

from care_compress.console import listed
from care_compress.report.blocks import (
    Cell,
    PageSection,
    Table,
    Text,
    Tile,
    Tiles,
    Tone,
    interval,
    missing,
)
from care_compress.report.size import float_bytes, float_energy, smallest
from care_compress.report.sources import Json, Sources


def verdict(sources: Sources) -> PageSection:
    """Whether the compressed model is worth having, in a few lines."""
    section = PageSection("verdict", "Verdict")
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
    small = smallest(sources)
    if small:
        ratio = float_bytes(results) / small["size_bytes"]
        tiles.append(Tile("Size", f"{ratio:.1f}x", f"smaller: {small['size_bytes'] / 1e6:.2f} MB"))
    plan = results.get("plan")
    if plan:
        macs, total = plan["macs"], sum(plan["macs"].values())
        share = 100 * sum(n for kind, n in macs.items() if _in_integers(kind)) / total
        tiles.append(Tile("In integers", f"{share:.1f} %", f"of {total / 1e6:.1f} M products"))
    energy = float_energy(sources)
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


LISTED = 8  # items in one sentence
# Worst first.
SIGNS = {"warning": "✗ take note", "not measured": "not measured", "fine": "✓ fine"}


def checks(sources: Sources) -> PageSection:
    """The warnings as sentences, then all checks in a table."""
    section = PageSection("checks", "What to know about these numbers")
    found = sources.results.get("checks")
    if found is not None and sources.compare is not None:
        # What the files do comes first, and warnings before what is fine, as in the run's own.
        found = [*sources.compare.get("checks", []), *found]
        found.sort(key=lambda one: list(SIGNS).index(one["status"]))
    if found is None:
        section.blocks.append(
            missing("The run was made before its data and ranges were checked: make quantize does.")
        )
        return section
    warnings = [one for one in found if one["status"] == "warning"]
    section.blocks += [Text(f"✗ {_note(one)}", "bad") for one in warnings]
    unknown = sum(one["status"] == "not measured" for one in found)
    if not warnings:
        though = f", though {unknown} of {len(found)} checks could not be made" if unknown else ""
        said = f"✓ Nothing was found that should make you doubt them{though}."
        section.blocks.append(Text(said, "good"))
    rows = [(Cell(one["check"]), Cell(SIGNS[one["status"]]), Cell(one["text"])) for one in found]
    section.blocks.append(Table("What was checked", ("check", "result", "found"), rows))
    return section


def _note(one: Json) -> str:
    shown = [str(item) for item in one["items"][:LISTED]]
    more = one["count"] - len(shown)
    named = listed(shown) + (f" and {more:,} more" if more > 0 else "")
    said = f"{one['check']}: {one['text']}"
    return f"{said}: {named.removesuffix('.')}." if named else f"{said}."
