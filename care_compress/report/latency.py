"""Latency on every target: from compare where it ran here, from devices where they measured."""

from collections.abc import Sequence

from care_compress.evaluate.device_field import device_field
from care_compress.evaluate.device_measurements import counted_threads, power_mode_of
from care_compress.quantize.plots import short_name
from care_compress.report.blocks import (
    Block,
    Cell,
    Figure,
    Picture,
    Row,
    Table,
    interval,
    missing,
    number,
    percent,
    table,
)
from care_compress.report.drawing import Labelled, bars
from care_compress.report.sources import Json, Sources
from care_compress.runtime.layer_times import FLOAT, INTEGER
from care_compress.shipped import COMPARE

PRODUCTS = (INTEGER, FLOAT)
HERE = "this machine"
MADE_HERE = "made by the runtime"


def latency(sources: Sources) -> list[Block]:
    """Draw bars from zero to p50 with ticks at p90 and p99, each target on a scale of its own."""
    key = sources.task.metric.key
    places = [(target, HERE, models) for target, models in sources.compared.items()]
    for board in sources.measured:
        engines = {}
        for name, engine in board["models"].items():
            right = (engine.get("accuracy") or {}).get(key)
            engines[name] = {**(engine.get("speed") or {}), key: right}
        places.append((board["target"], _device(board), engines))
    pictures: list[Picture] = []
    rows: list[Row] = []
    for target, where, models in places:
        timed = {name: one for name, one in models.items() if one.get("latency_ms")}
        if timed:
            title = target if where == HERE else f"{target}, measured on {where}"
            pictures.append(_picture(sources, title, timed))
            rows += [_row(sources, target, where, name, one) for name, one in timed.items()]
    blocks: list[Block] = []
    if pictures:
        blocks = [
            Figure(
                pictures,
                "Milliseconds of one run",
                note="The bar ends at p50, ticks stand at p90 and p99; an arrow means that p99 is "
                "much farther. Each target has its own scale.",
            ),
            *table("Latency and throughput", rows),
        ]
    blocks += [*_settings(sources), *layer_times(sources), *_fields(sources)]
    if sources.compare is None:
        blocks.append(
            missing(
                f"Latency here has not been measured: {COMPARE} fp32 {sources.name} "
                "does that, each model beside the other."
            )
        )
    return [*blocks, *_unavailable(sources), *_provenance(sources)]


def _picture(sources: Sources, title: str, found: dict[str, Json]) -> Picture:
    rows = []
    for name, one in found.items():
        ms = one["latency_ms"]
        marks = tuple(ms[key] for key in ("p90", "p99") if ms.get(key) is not None)
        said = f"{ms['p50']:.3f} ms" if ms["p50"] < 1 else f"{ms['p50']:.2f} ms"
        rows.append(Labelled(name, ms["p50"], said, sources.series(name), marks))
    told = f"{title}: " + "; ".join(f"{row.label} p50 {row.text}" for row in rows)
    return Picture(bars(rows, told), told, title)


def _row(sources: Sources, target: str, where: str, name: str, one: Json) -> Row:
    ms, metric = one["latency_ms"], sources.task.metric
    return {
        "target": target,
        "measured on": where,
        "model": name,
        "p50 ms": number(ms.get("p50"), 3),
        "p90 ms": number(ms.get("p90"), 3),
        "p99 ms": number(ms.get("p99"), 3),
        "images/s": number(one.get("throughput"), 0),
        "in integers %": percent(one.get("int8_mac_share")),
        f"{metric.name} %": number(one.get(metric.key)),
    }


def _device(board: Json) -> str:
    """Name the device; a CPU's times mean nothing without the number of threads."""
    speeds = [one["speed"] for one in board["models"].values() if one.get("speed")]
    threads = {speed["threads"] for speed in speeds if "threads" in speed}
    return ", ".join([str(board["board"]["name"]), *map(counted_threads, sorted(threads))])


def _settings(sources: Sources) -> list[Table]:
    """List other batches and numbers of threads, where compare tells them."""
    rows: list[Row] = [
        {
            "batch": number(setting["batch"], 0),
            "threads": number(setting["threads"], 0),
            "target": one["target"],
            "model": one["name"],
            "p50 ms": number(one["latency_ms"]["p50"], 3),
            "images/s": number(one["throughput"], 0),
            "speed-up": number(one.get("speedup"), 2),
            "95 %": interval(one.get("speedup_ci95")),
            "": "too noisy to say" if one.get("noisy") else "",
        }
        for setting in (sources.compare or {}).get("latency") or []
        for one in setting["rows"]
    ]
    return table("By batch and threads, models timed in turn", rows, tall=True)


def layer_times(sources: Sources) -> list[Table]:
    """Show where the time goes, by kind and by layer; nothing where compare did not tell."""
    tables: list[Table] = []
    for target, compared in sources.compared.items():
        models = {name: one for name, one in compared.items() if one.get("layers")}
        if models:
            tables += _sums(target, models) + _layers(sources, target, models)
    return tables


def _fields(sources: Sources) -> list[Table]:
    """Show what `tune` tried on devices, and where the GPU's time goes in what it explains."""
    tables: list[Table] = []
    for board in sources.measured:
        field = device_field(sources.name, board)
        if field is None:
            continue
        where = f"{field['target']} on {field['board']}"
        rows: list[Row] = [
            {
                "model": one["model"],
                "level": number(one["optimization_level"], 0),
                "batch": number(one["batch"], 0),
                "p50 ms": number((one["latency_ms"] or {}).get("p50"), 3),
                "images/s": number(one["throughput"], 0),
                "mJ/image": number(one["millijoules_per_image"], 2),
                "SQNR dB": number(one["sqnr_db"], 1),
                "": "kept: the fastest" if one["name"] == field["winner"] else one["reason"],
            }
            for one in field["candidates"]
        ]
        tables += table(f"{where}: every way to build the models", rows, tall=True)
        if field["layers"]:
            tables += _sums(where, field["layers"], "")
    return tables


def _sums(
    target: str, models: dict[str, Json], setting: str = ", batch 1, one thread"
) -> list[Table]:
    """List kinds by models; the number of layers where nothing was timed."""
    timed = any(one["layers_ms"] is not None for one in models.values())
    rows: list[Row] = []
    for kind in next(iter(models.values()))["by_kind"]:
        row: dict[str, Cell | str] = {"kind": kind}
        for name, one in models.items():
            found = one["by_kind"][kind]
            if timed:
                row[f"{name} ms"] = number(found["ms"], 3)
                row[f"{name} %"] = percent(found["share"], 0)
            else:
                row[f"{name} layers"] = number(found["layers"], 0)
        rows.append(row)
    if timed:
        return table(f"{target}: where the time goes{setting}", rows)
    return table(f"{target}: what the engine's layers are; their times need its GPU", rows)


def _layers(sources: Sources, target: str, models: dict[str, Json]) -> list[Table]:
    """List layers of the run's model on one target; products alone where nothing was timed."""
    named = {sources.series(name): one for name, one in reversed(models.items())}
    if 1 not in named:
        return []
    timed = named[1]["layers_ms"] is not None
    mine, theirs = (_joined(named.get(series, {}).get("layers", []), timed) for series in (1, 0))
    rows = [
        _times_row(key[0], mine.get(key, []), theirs.get(key, [])) for key in {**mine, **theirs}
    ]
    what = "every layer" if timed else "the engine's products"
    return table(f"{target}: {what}, beside the baseline's", rows, tall=True)


def _joined(layers: list[Json], timed: bool) -> dict[tuple[str, str], list[Json]]:
    """Group layers by origin and work, so that those of two models can stand in one row."""
    found: dict[tuple[str, str], list[Json]] = {}
    for layer in layers:
        product = layer["group"] in PRODUCTS
        if timed or product:
            # Short, because a site that a norm was folded into has another number behind it.
            site = short_name(str(layer["sites"][0])) if layer["sites"] else MADE_HERE
            work = "product" if product else str(layer["kind"])
            found.setdefault((site, work), []).append(layer)
    return found


def _times_row(site: str, mine: list[Json], theirs: list[Json]) -> Row:
    now, before = _sum(mine, "ms"), _sum(theirs, "ms")
    count = max(len(mine), len(theirs))
    kinds = _different(mine or theirs, "kind")
    return {
        "site": site,
        "kind": f"{kinds} x{count}" if count > 1 else kinds,
        "enters as": _different(mine, "precision"),
        "ms": number(now, 3),
        "share %": percent(_sum(mine, "share")),
        "baseline as": _different(theirs, "precision"),
        "baseline ms": number(before, 3),
        "times": number(before / now if now and before else None, 2),
    }


def _sum(layers: list[Json], what: str) -> float | None:
    known = [one[what] for one in layers if one[what] is not None]
    return sum(known) if known else None


def _different(layers: list[Json], what: str) -> str:
    return ", ".join(dict.fromkeys(str(one[what]) for one in layers))


def _unavailable(sources: Sources) -> list[Table]:
    """List what was not timed here: one row for each reason, not one for each model."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for target, models in sources.compared.items():
        for name, one in models.items():
            if not one.get("latency_ms"):
                why = str(one.get("why") or "it was not timed")
                reasons.setdefault((target, why), []).append(name)
    rows = [
        {"target": target, "why, and how to get it": why, "model": ", ".join(names)}
        for (target, why), names in reasons.items()
    ]
    return table("Not measured here", rows)


def _provenance(sources: Sources) -> Sequence[Block]:
    """List which device, library and setting each imported measurement comes from."""
    if not sources.measured:
        return [
            missing(
                "No device has been measured: make bundle packs what one needs, and care-compress "
                "import-results takes its results home."
            )
        ]
    rows: list[Row] = []
    for board in sources.measured:
        about = board["board"]
        for name, engine in board["models"].items():
            speed, accuracy = engine.get("speed") or {}, engine.get("accuracy")
            if "threads" in speed:
                setting = counted_threads(speed["threads"])
            else:
                setting = power_mode_of(speed) or "not told"
            checked = "no"
            if accuracy is not None:
                result = "passed" if accuracy["passed"] else "FAILED"
                checked = f"{result}: {accuracy['agreement']:.1f} % as exported"
            rows.append(
                {
                    "target": board["target"],
                    "model": name,
                    "device": about["name"],
                    "library": f"{about['library']} {about['library_version']}",
                    "set to": setting,
                    "batch": number(speed.get("batch"), 0),
                    "verified": checked,
                    "date": board["measured_at"],
                }
            )
    return table("Measured on devices, by the script of the bundle", rows)
