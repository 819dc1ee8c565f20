"""The verdict: what compression cost, what it gave, and whether every budget holds."""

from care_compress.console import listed
from care_compress.evaluate.slim_accuracy import SLIM, TRAINED
from care_compress.recipe.sections import DROPS
from care_compress.report.blocks import (
    Block,
    Cell,
    Row,
    Text,
    Tile,
    Tiles,
    Tone,
    interval,
    missing,
    table,
    titled,
)
from care_compress.report.size import float_bytes, float_energy, smallest
from care_compress.report.slim import cut_by
from care_compress.report.sources import Json, Sources
from care_compress.shipped import COMPARE, QUANTIZE

LISTED = 8  # items in one sentence
# Worst first.
SIGNS = {"warning": "✗ take note", "not measured": "not measured", "fine": "✓ fine"}


def verdict(sources: Sources) -> list[Block]:
    """Say whether the compressed model is worth having, in a few lines."""
    results = sources.results
    budget = results.get("budget")
    limit = None if budget is None else budget[DROPS[sources.task.name]]
    if sources.is_float and "slim" in results:
        said = f"Slimmed, in float, {cut_by(results['slim'])}"
        pair = results["slim"]["models"][SLIM]
        return [_judged(sources, said, pair, limit, _from_whole(pair)), *_speed(sources)]
    if sources.is_float:
        found = results["accuracy"]
        said = sources.task.told(found[sources.task.metric.key], found["images"])
        text = f"A float model, the baseline of others: {said}. Nothing was quantized in this run."
        return [Text(text), *_speed(sources)]
    pair = sources.pair or results["candidates"][results["kept"]]
    if "slim" in results:  # compare's baseline is the network as given, which was trained less
        pair = {**pair, **results["slim"]["models"][results["kept"]]}
    return [_headline(sources, pair, limit), _tiles(sources, pair, limit), *_speed(sources)]


def _headline(sources: Sources, pair: Json, limit: float | None) -> Text:
    """Put the drop beside its limit, of the exported files where compare has measured them."""
    results = sources.results
    said = results["precision"].upper()
    if "slim" in results:
        said = f"{said}, {cut_by(results['slim'])}"
        return _judged(sources, said, pair, limit, _from_whole(pair))
    made = "of NNCF's file" if results["backend"] == "nncf" else "in simulation"
    where = "on the exported files" if sources.pair else made
    return _judged(sources, said, pair, limit, where)


def _from_whole(pair: Json) -> str:
    as_long = " trained as long" if pair["against"] == TRAINED else ""
    return f"from the whole network{as_long}"


def _judged(sources: Sources, what: str, pair: Json, limit: float | None, where: str) -> Text:
    drop = f"{pair['drop']:.2f} points {interval(pair['drop_ci95'])}"
    name = sources.task.metric.name
    article = "a" if name.islower() else "an"  # an m, as it is spoken
    said = f"{what}: {article} {name} drop of {drop} {where}"
    if limit is None:
        return Text(f"{said}. The recipe sets no budget.")
    if pair["drop"] > limit:
        return Text(f"{said}: more than the {limit:g} that the recipe allows.", "bad")
    within = f"{said}: within the {limit:g} that the recipe allows"
    if pair["drop_ci95"][1] > limit:
        within += ", though the interval reaches beyond it"
    return Text(f"{within}.", "good")


def _tiles(sources: Sources, pair: Json, limit: float | None) -> Tiles:
    task = sources.task
    tone: Tone = "plain" if limit is None else "good" if pair["drop"] <= limit else "bad"
    note = f"95 % {interval(pair['drop_ci95'])}" + ("" if limit is None else f", allowed {limit:g}")
    tiles = [
        Tile(f"{titled(task.metric.name)} drop", f"{pair['drop']:.2f} pt", note, tone),
        Tile(f"{titled(task.same.name)} as float", f"{pair['agreement']:.2f} %"),
    ]
    small = smallest(sources)
    if small:
        ratio = float_bytes(sources.results) / small["size_bytes"]
        tiles.append(Tile("Size", f"{ratio:.1f}x", f"smaller: {small['size_bytes'] / 1e6:.2f} MB"))
    plan = sources.results.get("plan")
    if plan:
        macs, total = plan["macs"], sum(plan["macs"].values())
        # w8a8 and a8 multiply integers; w8a16 and float do not.
        whole = (n for kind, n in macs.items() if kind.rpartition("a")[2] in {"4", "6", "8"})
        share = 100 * sum(whole) / total
        tiles.append(Tile("In integers", f"{share:.1f} %", f"of {total / 1e6:.1f} M products"))
    energy = float_energy(sources)
    if plan and energy:
        ratio = energy / plan["energy_mj"]
        tiles.append(Tile("Energy", f"{ratio:.1f}x", "less, estimated for 45 nm"))
    return Tiles(tiles)


def _speed(sources: Sources) -> list[Block]:
    """Write a line for each target, and every budget, as compare judged them."""
    compare = sources.compare
    if compare is None:
        return [
            missing(
                "Speed, and the accuracy of the exported files themselves, have not been measured: "
                f"{COMPARE} fp32 {sources.name} does that."
            )
        ]
    rows: list[Row] = []
    blocks: list[Block] = []
    for one in compare.get("budgets") or []:
        limit, value, ok = _limit(one.get("limit")), _limit(one.get("value")), bool(one.get("ok"))
        result = Cell("✓ holds" if ok else "✗ broken", float(ok))
        rows.append(
            {"budget": str(one["name"]), "limit": limit, "measured": value, "result": result}
        )
        if not ok:
            text = f"✗ {one['name']} is broken: {value.text}, limit {limit.text}."
            blocks.append(Text(text, "bad"))
    for said in compare.get("verdicts") or []:
        if isinstance(said, str):  # it names its target itself
            blocks.append(Text(said))
            continue
        text = f"{said.get('target')}: {said.get('text')}"
        if "pays" not in said:
            blocks.append(Text(text))
        else:
            blocks.append(Text(f"✓ {text}", "good") if said["pays"] else Text(f"✗ {text}", "bad"))
    return [*blocks, *table("Budgets of the recipe", rows)]


def _limit(value: float | None) -> Cell:
    """Make a cell of a limit, which may be points, a ratio or bytes."""
    said = "not measured" if value is None else f"{value:,.6g}"
    return Cell(said, None if value is None else float(value), numeric=True)


def checks(sources: Sources) -> list[Block]:
    """Write the warnings as sentences, then all checks in a table."""
    found = sources.results.get("checks")
    if found is None:
        return [
            missing(f"The run was made before its data and ranges were checked: {QUANTIZE} does.")
        ]
    if sources.compare is not None:
        # What the files do comes first, and warnings before what is fine, as in the run's own.
        found = [*sources.compare.get("checks", []), *found]
        found.sort(key=lambda one: list(SIGNS).index(one["status"]))
    blocks: list[Block] = []
    made: list[Row] = []
    for one in found:
        if one["status"] == "warning":
            shown = [str(item) for item in one["items"][:LISTED]]
            more = one["count"] - len(shown)
            named = listed(shown) + (f" and {more:,} more" if more > 0 else "")
            said = f"✗ {one['check']}: {one['text']}"
            said += f": {named.removesuffix('.')}." if named else "."
            blocks.append(Text(said, "bad"))
        made.append({"check": one["check"], "result": SIGNS[one["status"]], "found": one["text"]})
    if not blocks:
        unknown = sum(one["status"] == "not measured" for one in found)
        though = f", though {unknown} of {len(found)} checks could not be made" if unknown else ""
        said = f"✓ Nothing was found that should make you doubt them{though}."
        blocks.append(Text(said, "good"))
    return [*blocks, *table("What was checked", made)]
