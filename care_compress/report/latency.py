"""Latency on every target: from compare where it ran here, from boards where they measured."""

from typing import Any

from care_compress.evaluate.device_measurements import counted_threads
from care_compress.quantize.plots import short_name
from care_compress.report.blocks import (
    Block,
    Cell,
    Figure,
    PageSection,
    Picture,
    Table,
    interval,
    missing,
    number,
)
from care_compress.report.drawing import Bar, bars
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
    rows = [_times_row(key, mine.get(key, []), theirs.get(key, [])) for key in {**mine, **theirs}]
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


def _times_row(key: Key, mine: list[Json], theirs: list[Json]) -> tuple[Cell, ...]:
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


COLUMNS = (
    "target",
    "measured on",
    "model",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "images/s",
    "in integers %",
    "top-1 %",
)


def latency(sources: Sources) -> PageSection:
    """Bars from zero to p50 with ticks at p90 and p99, each target on a scale of its own."""
    section = PageSection("latency", "Latency")
    pictures: list[Picture] = []
    rows: list[tuple[Cell, ...]] = []
    unavailable: list[tuple[Cell, ...]] = []
    for target, models in ((sources.compare or {}).get("targets") or {}).items():
        unavailable += _unavailable(target, models)
        found = {name: one for name, one in models.items() if one.get("latency_ms")}
        if found:
            pictures.append(_picture(sources, target, found))
            rows += [_row(target, "this machine", name, one) for name, one in found.items()]
    for board in sources.measured.values():
        found, title = _board(board), f"{board['target']}, measured on {_device(board)}"
        if found:
            pictures.append(_picture(sources, title, found))
            rows += [
                _row(board["target"], _device(board), name, one) for name, one in found.items()
            ]
    section.blocks += _figures(pictures, rows)
    section.blocks += _settings(sources)
    section.blocks += layer_times(sources)
    if sources.compare is None:
        section.blocks.append(
            missing(
                f"Latency here has not been measured: python eval/compare.py fp32 {sources.name} "
                "does that, each model beside the other."
            )
        )
    if unavailable:
        columns = ("target", "why, and how to get it", "model")
        section.blocks.append(Table("Not measured here", columns, unavailable))
    section.blocks += _provenance(sources)
    return section


def _figures(pictures: list[Picture], rows: list[tuple[Cell, ...]]) -> list[Block]:
    if not pictures:
        return []
    return [
        Figure(
            tuple(pictures),
            "Milliseconds of one run",
            note="The bar ends at p50, ticks stand at p90 and p99; an arrow means that p99 is much "
            "farther. Each target has its own scale.",
        ),
        Table("Latency and throughput", COLUMNS, rows, COLUMNS[3:]),
    ]


def _settings(sources: Sources) -> list[Block]:
    """Other batches and numbers of threads, where compare tells them."""
    rows = []
    for setting in (sources.compare or {}).get("latency") or []:
        for one in setting["rows"]:
            ends = one.get("speedup_ci95")
            rows.append(
                (
                    number(setting["batch"], 0),
                    number(setting["threads"], 0),
                    Cell(one["target"]),
                    Cell(one["name"]),
                    number(one["latency_ms"]["p50"], 3),
                    number(one["throughput"], 0),
                    number(one.get("speedup"), 2),
                    Cell(interval(ends) if ends else ""),
                    Cell("too noisy to say" if one.get("noisy") else ""),
                )
            )
    if not rows:
        return []
    columns = ("batch", "threads", "target", "model", "p50 ms", "images/s", "speed-up", "95 %", "")
    numeric = ("batch", "threads", "p50 ms", "images/s", "speed-up")
    return [Table("By batch and threads, models timed in turn", columns, rows, numeric, tall=True)]


def _unavailable(target: str, models: dict[str, Json]) -> list[tuple[Cell, ...]]:
    """One row for each reason, not one for each model."""
    reasons: dict[str, list[str]] = {}
    for name, one in models.items():
        if not one.get("latency_ms"):
            reasons.setdefault(str(one.get("why") or "it was not timed"), []).append(name)
    return [(Cell(target), Cell(why), Cell(", ".join(names))) for why, names in reasons.items()]


def _picture(sources: Sources, title: str, found: dict[str, Json]) -> Picture:
    rows = []
    for name, one in found.items():
        ms = one["latency_ms"]
        marks = tuple(ms[key] for key in ("p90", "p99") if ms.get(key) is not None)
        rows.append(Bar(name, ms["p50"], _milliseconds(ms["p50"]), sources.series(name), marks))
    told = f"{title}: " + "; ".join(f"{row.label} p50 {row.text}" for row in rows)
    return Picture(bars(rows, told), told, title)


def _milliseconds(value: float) -> str:
    return f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms"


def _row(target: str, where: str, name: str, one: Json) -> tuple[Cell, ...]:
    ms, share = one["latency_ms"], one.get("int8_mac_share")
    return (
        Cell(target),
        Cell(where),
        Cell(name),
        *(number(ms.get(key), 3) for key in ("p50", "p90", "p99")),
        number(one.get("throughput"), 0),
        number(None if share is None else 100 * share, 1),
        number(one.get("top1")),
    )


def _device(board: Json) -> str:
    """Its name; a CPU's figures are nothing without the number of threads."""
    threads = {
        one["speed"]["threads"]
        for one in board["models"].values()
        if one.get("speed") and "threads" in one["speed"]
    }
    told = ", ".join(counted_threads(count) for count in sorted(threads))
    return f"{board['board']['name']}, {told}" if told else str(board["board"]["name"])


def _board(board: Json) -> dict[str, Json]:
    """A board's engines in the form of compare's; those that were not timed are left out."""
    found = {}
    for name, engine in board["models"].items():
        if engine.get("speed"):
            accuracy = engine.get("accuracy") or {}
            found[name] = {**engine["speed"], "top1": accuracy.get("top1")}
    return found


def _provenance(sources: Sources) -> list[Block]:
    """Which board, library and setting each imported measurement comes from."""
    if not sources.measured:
        return [
            missing(
                "No device has been measured: make bundle packs what one needs, and care-compress "
                "import-results takes its results home."
            )
        ]
    columns = ("target", "model", "device", "library", "set to", "batch", "verified", "date")
    rows = []
    for board in sources.measured.values():
        for name, engine in board["models"].items():
            rows.append(_provenance_row(board, name, engine))
    return [Table("Measured on devices, by the script of the bundle", columns, rows, ("batch",))]


def _setting(speed: dict[str, Any]) -> str:
    """A board's power mode, or how many threads of a CPU were used."""
    if "threads" in speed:
        return counted_threads(speed["threads"])
    return str((speed.get("before") or {}).get("power_mode") or "not told")


def _provenance_row(board: Json, name: str, engine: dict[str, Any]) -> tuple[Cell, ...]:
    speed, accuracy = engine.get("speed") or {}, engine.get("accuracy")
    checked = "no"
    if accuracy is not None:
        result = "passed" if accuracy["passed"] else "FAILED"
        checked = f"{result}: {accuracy['agreement']:.1f} % as exported"
    about = board["board"]
    return (
        Cell(board["target"]),
        Cell(name),
        Cell(about["name"]),
        Cell(f"{about['library']} {about['library_version']}"),
        Cell(_setting(speed)),
        number(speed.get("batch"), 0),
        Cell(checked),
        Cell(board["measured_at"]),
    )
