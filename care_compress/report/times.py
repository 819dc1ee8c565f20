"""Where the time goes: sums by kind, and every layer beside the baseline's."""

from care_compress.evaluate.plots import short_name
from care_compress.report.blocks import Block, Cell, Table, number
from care_compress.report.sources import Json, Sources
from care_compress.runtime.layer_times import FLOAT, INTEGER

LAYERS = ("site", "kind", "enters as", "ms", "share %", "baseline as", "baseline ms", "times")
NUMERIC = ("ms", "share %", "baseline ms", "times")
PRODUCTS = (INTEGER, FLOAT)
MADE_HERE = "made by the runtime"
Key = tuple[str, str]


def layer_times(sources: Sources) -> list[Block]:
    """Nothing where compare did not tell."""
    told = {
        target: {name: one for name, one in models.items() if one.get("layers")}
        for target, models in ((sources.compare or {}).get("targets") or {}).items()
    }
    blocks: list[Block] = []
    for target, models in told.items():
        if not models:
            continue
        blocks += [_sums(target, models), *_layers(sources, target, models)]
    return blocks


def _sums(target: str, models: dict[str, Json]) -> Table:
    """Kinds by models; how many layers there are, where nothing was timed."""
    timed = any(one["layers_ms"] is not None for one in models.values())
    units = ("ms", "%") if timed else ("layers",)
    columns = [f"{name} {unit}" for name in models for unit in units]
    rows = []
    for kind in next(iter(models.values()))["by_kind"]:
        row = [Cell(kind)]
        for one in models.values():
            found = one["by_kind"][kind]
            if timed:
                share = found["share"]
                row += [number(found["ms"], 3), number(None if share is None else 100 * share, 0)]
            else:
                row.append(number(found["layers"], 0))
        rows.append(tuple(row))
    caption = f"{target}: where the time goes, batch 1, one thread"
    if not timed:
        caption = f"{target}: what the engine's layers are; their times need its GPU"
    return Table(caption, ("kind", *columns), rows, tuple(columns))


def _layers(sources: Sources, target: str, models: dict[str, Json]) -> list[Block]:
    """Layers of the run's model on one target; products alone where nothing was timed."""
    name = next((name for name in models if sources.series(name) == 1), None)
    if name is None:
        return []
    layers, timed = models[name]["layers"], models[name]["layers_ms"] is not None
    baseline = next((one for other, one in models.items() if sources.series(other) == 0), None)
    before = [] if baseline is None or baseline is models[name] else baseline["layers"]
    if not timed:
        layers, before = _products(layers), _products(before)
    mine, theirs = _joined(layers), _joined(before)
    rows = [_row(key, mine.get(key, []), theirs.get(key, [])) for key in {**mine, **theirs}]
    what = "every layer" if timed else "the engine's products"
    return [Table(f"{target}: {what}, beside the baseline's", LAYERS, rows, NUMERIC, tall=True)]


def _products(layers: list[Json]) -> list[Json]:
    return [one for one in layers if one["group"] in PRODUCTS]


def _joined(layers: list[Json]) -> dict[Key, list[Json]]:
    """Layers by where they came from and what they do, so that two models can stand in one row."""
    found: dict[Key, list[Json]] = {}
    for layer in layers:
        work = "product" if layer["group"] in PRODUCTS else str(layer["kind"])
        # Short, because a site that a norm was folded into has another number behind it.
        site = short_name(str(layer["sites"][0])) if layer["sites"] else MADE_HERE
        found.setdefault((site, work), []).append(layer)
    return found


def _row(key: Key, mine: list[Json], theirs: list[Json]) -> tuple[Cell, ...]:
    now, before = _ms(mine), _ms(theirs)
    share = [one["share"] for one in mine if one["share"] is not None]
    count = max(len(mine), len(theirs))
    kinds = ", ".join(dict.fromkeys(str(one["kind"]) for one in mine or theirs))
    return (
        Cell(key[0]),
        Cell(f"{kinds} x{count}" if count > 1 else kinds),
        Cell(_precisions(mine)),
        number(now, 3),
        number(100 * sum(share) if share else None, 1),
        Cell(_precisions(theirs)),
        number(before, 3),
        number(before / now if now and before else None, 2),
    )


def _ms(layers: list[Json]) -> float | None:
    known = [one["ms"] for one in layers if one["ms"] is not None]
    return sum(known) if known else None


def _precisions(layers: list[Json]) -> str:
    return ", ".join(dict.fromkeys(str(one["precision"]) for one in layers))
