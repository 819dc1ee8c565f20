"""Top-1 and top-5 with their intervals."""

from care_compress.evaluate.pairs import wilson
from care_compress.report.blocks import (
    Cell,
    Figure,
    PageSection,
    Picture,
    Table,
    Text,
    interval,
    number,
)
from care_compress.report.drawing import Span, spans
from care_compress.report.sources import Json, Sources

Model = tuple[str, str, Json]  # its name, the target where it is a file for one, its figures


def accuracy(sources: Sources) -> PageSection:
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
    section = PageSection("accuracy", "Accuracy")
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
    if not by_target:  # nothing ran here; compare may have measured the models elsewhere
        by_target["all targets"] = [
            (name, "all targets", {**_pair(compare, "", name), **one})
            for name, one in (compare.get("models") or {}).items()
            if one.get("top1") is not None
        ]
    if not any(by_target.values()):
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
