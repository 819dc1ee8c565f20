"""Where the time goes: sums by kind, and every layer beside the baseline's."""

from collections.abc import Iterable

from care_compress.report.blocks import Block, Cell, Table, number
from care_compress.report.sources import Json, Sources

KINDS = ("target", "model", "kind", "layers", "ms", "share %")
LAYERS = ("site", "kind", "enters as", "ms", "share %", "baseline as", "baseline ms", "times")
NUMERIC = ("ms", "share %", "baseline ms", "times")
PRODUCTS = ("integer products", "float products")
MADE_HERE = "made by the runtime"
Key = tuple[str, str]


def layer_times(sources: Sources) -> list[Block]:
    """Nothing where compare did not tell."""
    told = {
        target: {name: one for name, one in models.items() if one.get("layers")}
        for target, models in ((sources.compare or {}).get("targets") or {}).items()
    }
    told = {target: models for target, models in told.items() if models}
    if not told:
        return []
    sums = [row for target, models in told.items() for row in _sums(target, models)]
    blocks: list[Block] = [
        Table("Where the time goes, batch 1, one thread", KINDS, sums, KINDS[3:], tall=True)
    ]
    for target, models in told.items():
        blocks += _target(sources, target, models)
    return blocks


def _sums(target: str, models: dict[str, Json]) -> Iterable[tuple[Cell, ...]]:
    for name, one in models.items():
        for kind, found in one["by_kind"].items():
            share = found["share"]
            yield (
                Cell(target),
                Cell(name),
                Cell(kind),
                number(found["layers"], 0),
                number(found["ms"], 3),
                number(None if share is None else 100 * share, 1),
            )


def _target(sources: Sources, target: str, models: dict[str, Json]) -> list[Block]:
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
    what = "every layer" if timed else "the engine's products; nothing was timed without its GPU"
    return [Table(f"{target}: {what}, beside the baseline's", LAYERS, rows, NUMERIC, tall=True)]


def _products(layers: list[Json]) -> list[Json]:
    return [one for one in layers if one["group"] in PRODUCTS]


def _joined(layers: list[Json]) -> dict[Key, list[Json]]:
    """Layers by where they came from and what they do, so that two models can stand in one row."""
    found: dict[Key, list[Json]] = {}
    for layer in layers:
        work = "product" if layer["group"] in PRODUCTS else str(layer["kind"])
        site = str(layer["sites"][0]) if layer["sites"] else MADE_HERE
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
        number(now, 4),
        number(100 * sum(share) if share else None, 1),
        Cell(_precisions(theirs)),
        number(before, 4),
        number(before / now if now and before else None, 2),
    )


def _ms(layers: list[Json]) -> float | None:
    known = [one["ms"] for one in layers if one["ms"] is not None]
    return sum(known) if known else None


def _precisions(layers: list[Json]) -> str:
    return ", ".join(dict.fromkeys(str(one["precision"]) for one in layers))
