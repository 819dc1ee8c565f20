"""docs/PERFORMANCE.md: its generated part, between two markers, from the JSON of the measurements.

`table_of` is also what the bench prints. Plots are SVG files beside the JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from care_compress import machine
from care_compress.errors import CareError
from care_compress.files import write_text
from care_compress.quantize.plots import save_figure

BEGIN, END = "<!-- begin: written by make bench -->", "<!-- end -->"
OURS, PEER, BASE = "#2a7f4f", "#3b6ea5", "#999999"
OWN = 0.5  # what the bench adds to the load average beside its threads
Found = dict[str, Any]
# Files of processors without integer dot products, beside those of the others.
WITHOUT = "_without_dot_products"


def write_page(docs: Path) -> None:
    """Put what was measured, on any of the sizes, between the markers."""
    store, page = docs / "performance", docs / "PERFORMANCE.md"
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise CareError(f"{page} has lost its markers.", f"put back {BEGIN} and {END}")
    parts = []
    found_in = {path: json.loads(path.read_text()) for path in sorted(store.glob("*.json"))}
    for path, found in found_in.items():
        if "settings" not in found:  # of another bench
            continue
        plot_table(found, path.with_suffix(".svg"))
        parts.append(f"{table_of(found)}\n\n![{path.stem}](performance/{path.stem}.svg)\n")
    for path, found in found_in.items():
        if not path.stem.startswith("growth"):
            continue
        plot_growth(found, path.with_suffix(".svg"))
        class_ = said_of_class(not path.stem.endswith(WITHOUT))
        parts.append(f"{growth_text(found, class_)}\n![{path.stem}](performance/{path.stem}.svg)\n")
    parts += [
        dense_text(found) for path, found in found_in.items() if path.stem.startswith("dense")
    ]
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(page, f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}")


def said_of_class(dot_products: bool) -> str:
    """What distinguishes one class of processors from the other."""
    return f"{'with' if dot_products else 'without'} integer dot products"


def has_dot_products(found: Found) -> bool:
    """Of the processor that a table was measured on, by what it said of itself."""
    return machine.Cpu(**found["machine"]["cpu"]).dot_products is not False


def table_of(found: Found) -> str:
    """Every setting of one size as Markdown."""
    cpu = found["machine"]["cpu"]
    lines = [
        f"### {found['arch']}, {found['resolution']}x{found['resolution']}, "
        f"{said_of_class(has_dot_products(found))}",
        "",
        f"{found['date']}, {cpu['name']}, {cpu['logical_cores']} cores, {_libraries(found)}. "
        f"Files made at {_short(found['revision'])}.",
    ]
    answers = found.get("answers", {})
    lines += ["", _about(answers)]
    for setting in found["settings"]:
        lines += ["", *_setting(setting, answers)]
    lines += ["", "The files, by the digest that their runs evaluated them under:", ""]
    lines += [f"- `{sha[:16]}` {names}" for sha, names in _digests(found).items()]
    return "\n".join(lines)


def _about(answers: Found) -> str:
    if not answers:
        return "Its weights are random, so its answers are not scored; trained weights' are."
    base = answers["published/OpenVINO"]
    return (
        "Top-1 lost and the same answers are held against the published network in FP32 in the "
        f"same runtime, which has {base['top1']:.2f} %, on {base['images']:,} validation images."
    )


def _setting(setting: Found, answers: Found) -> list[str]:
    low, high = setting["load_average"]
    many = "one thread" if setting["threads"] == 1 else f"{setting['threads']} threads"
    busy = "; other work ran" if min(low, high) > setting["threads"] + OWN else ""
    load = f"load average {low:.1f} before, {high:.1f} after{busy}"
    scored = " top-1 lost [95 %] | same answer |" if answers else ""
    lines = [
        f"Batch {setting['batch']}, {many} ({load}):",
        "",
        "| runtime | file | ms (p50) | faster than published FP32 [95 %] "
        f"| our INT8 is faster by [95 %] |{scored}",
        "|---" * (7 if answers else 5) + "|",
    ]
    for row in setting["rows"]:
        head = f"| {row['runtime']} | {row['what']} |"
        if "reason" in row:
            empty = " |" * (4 if answers else 2)
            lines.append(f"{head} does not run: {_cell(row['reason'])} |{empty}")
            continue
        noise = " (noisy)" if row["noisy"] else ""
        ours = "" if row["key"].startswith("int8/") else _interval(row["int8_over_it"])
        line = (
            f"{head} {row['ms']['p50']:.2f}{noise} | {_interval(row['over_published'])} | {ours} |"
        )
        lines.append(line + (_answered(answers[row["key"]]) if answers else ""))
    return lines


def _answered(mine: Found) -> str:
    if "reason" in mine:
        return f" not scored: {_cell(mine['reason'])} | |"
    value, low, high = mine["lost"]
    return f" {value:.2f} [{low:.2f}, {high:.2f}] | {mine['same']:.2f} % |"


def _interval(ratio: list[float]) -> str:
    return f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def _short(revision: str) -> str:
    """A commit's first letters, and whether the tree differed from it."""
    commit, changed, _ = revision.partition("+")
    return commit[:7] + (" with changes" if changed else "")


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _libraries(found: Found) -> str:
    versions = found["machine"]["libraries"]
    return ", ".join(f"{name} {versions[name]}" for name in ("openvino", "onnxruntime", "nncf"))


def _digests(found: Found) -> dict[str, str]:
    """Digest -> what it is; one file may stand in several rows."""
    names: dict[str, str] = {}
    for key, about in found["files"].items():
        if "sha256" in about:
            names.setdefault(about["sha256"], f"`{about['file']}` ({key.partition('/')[2]})")
    return names


def growth_text(found: Found, class_: str) -> str:
    """The curves as tables: milliseconds of every point and the exponent."""
    low, high = found["load_average"]
    lines = [
        f"### How time grows: {found['arch']}, {class_}",
        "",
        f"{found['date']}, load average {low:.1f} before, {high:.1f} after. The exponent is the p "
        "of time ~ x^p, with its 95 % interval over the turns; 1 is linear.",
    ]
    titles = {"resolution": "pixels", "batch": "images at once", "threads": "threads"}
    for name, title in titles.items():
        part = found[name]
        lines += ["", _head(f"ms over {title}", part["points"])]
        lines.append("|---" * (len(part["points"]) + 2) + "|")
        for row in part["rows"]:
            lines.append(_curve(row, row["ms"]))
        if name == "resolution":
            for row in part["rows"]:
                spent = [1e6 * ms / p for ms, p in zip(row["ms"], part["points"], strict=True)]
                lines.append(_curve({"what": f"{row['what']}: ns per pixel"}, spent))
    images, macs = found["pipeline"]["images"], found["pipeline"]["macs"]
    lines += ["", "Seconds of PTQ, one run each, selection of the images included:", ""]
    lines += _row("care_nano at 64, calibration images", images["points"], head=True)
    lines += _row("seconds", images["seconds"])
    sizes = [
        f"{name}, {points / 1e6:,.0f} M MACs"
        for name, points in zip(macs["names"], macs["points"], strict=True)
    ]
    lines += ["", *_row("64 images at 96x96", sizes, head=True), *_row("seconds", macs["seconds"])]
    lines += [""]
    return "\n".join(lines)


def dense_text(found: Found) -> str:
    """Both heads at one size, and how the one for masks grows."""
    side, (low, high) = found["side"], found["load_average"]
    lines = [
        f"### Masks at {side}x{side}: {found['arch']}, {said_of_class(has_dot_products(found))}",
        "",
        f"{found['date']}, {found['machine']['cpu']['name']}, {_libraries(found)}, one image, one "
        f"thread, load average {low:.1f} before, {high:.1f} after. The backbone is the same, the "
        "head is a class for the image or for every place.",
        "",
        "| head | file | ms (p50) | faster than published FP32 [95 %] | than ours in FP32 [95 %] |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        noise = " (noisy)" if row["noisy"] else ""
        over = " | ".join(_interval(ratio) for ratio in row["over"].values())
        lines.append(f"| {row['task']} | {row['what']} | {row['ms']:.1f}{noise} | {over} |")
    growth = found["growth"]
    lines += ["", _head("ms over pixels, masks", growth["points"])]
    lines.append("|---" * (len(growth["points"]) + 2) + "|")
    lines += [_curve(row, row["ms"]) for row in growth["rows"]]
    return "\n".join((*lines, ""))


def _head(name: str, points: Sequence[int]) -> str:
    return f"| {name} | {' | '.join(f'{point:,}' for point in points)} | exponent [95 %] |"


def _row(name: str, values: Sequence[object], head: bool = False) -> list[str]:
    line = f"| {name} | {' | '.join(str(value) for value in values)} |"
    return [line, "|---" * (len(values) + 1) + "|"] if head else [line]


def _curve(row: Found, values: list[float]) -> str:
    fitted = row.get("exponent")
    last = "" if not fitted else f"{fitted[0]:.2f} [{fitted[1]:.2f}, {fitted[2]:.2f}]"
    noise = " (noisy)" if row.get("noisy") else ""
    cells = " | ".join(f"{value:.1f}" for value in values)
    return f"| {row['what']}{noise} | {cells} | {last} |"


def plot_table(found: Found, path: Path) -> None:
    """Bars of the first setting: one image, one thread."""
    rows = [row for row in found["settings"][0]["rows"] if "ms" in row]
    figure = Figure(figsize=(8, 0.8 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{row['what']} - {row['runtime']}" for row in rows]
    values = [row["ms"]["p50"] for row in rows]
    bars = axes.barh(names, values, color=[_colour(row) for row in rows], height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("ms for one image, one thread (median)")
    size = f"{found['arch']}, {found['resolution']}x{found['resolution']}"
    axes.set_title(f"{size}, {said_of_class(has_dot_products(found))}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _colour(row: Found) -> str:
    if row["what"].startswith("ours"):
        return OURS
    return BASE if row["what"].startswith("published") else PEER


def plot_growth(found: Found, path: Path) -> None:
    """Plots with both axes logarithmic: a straight line of slope 1 is linear."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.subplots(2, 3)
    titles = {"resolution": "pixels", "batch": "images at once", "threads": "threads"}
    for (name, title), axes in zip(titles.items(), figure.axes, strict=False):
        part = found[name]
        for row, colour in zip(part["rows"], (BASE, OURS, PEER), strict=True):
            axes.loglog(part["points"], row["ms"], "o-", color=colour, label=row["what"], ms=4)
        _finish(axes, title, "ms", part["points"])
    figure.axes[0].legend(frameon=False, fontsize=7)
    images, macs = found["pipeline"]["images"], found["pipeline"]["macs"]
    millions = [point / 1e6 for point in macs["points"]]
    figure.axes[3].loglog(images["points"], images["seconds"], "o-", color=OURS, ms=4)
    _finish(figure.axes[3], "calibration images (care_nano)", "seconds of PTQ", images["points"])
    figure.axes[4].loglog(millions, macs["seconds"], "o-", color=OURS, ms=4)
    _finish(figure.axes[4], "million MACs of the network", "seconds of PTQ", millions)
    figure.axes[5].set_axis_off()
    save_figure(figure, path)


def _finish(axes: Any, x: str, y: str, points: list[float]) -> None:
    """Ticks where something was measured."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xticks(points, [f"{point:,.0f}" for point in points], fontsize=7, rotation=30)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
