"""Fidelity: what each step from the float model to a file cost, and where."""

from care_compress.evaluate.fidelity import ABSENT, decibels, hardest_sites, parting_text
from care_compress.quantize.plots import short_name
from care_compress.report.blocks import Cell, PageSection, Table, Text, missing, number
from care_compress.report.sources import Json, Sources

COLUMNS = ("version", "logits dB", "to float dB", "same answers %", "first parts at", "made from")


def fidelity(sources: Sources) -> PageSection:
    """Every version beside the one before it."""
    section = PageSection("fidelity", "From float to file, version by version")
    found = sources.fidelity
    if found is None:
        section.blocks.append(missing(f"Not measured: care-compress fidelity {sources.name}."))
        return section
    if found.get("results_sha256") != sources.results_sha256:
        section.blocks.append(
            missing(
                "fidelity.json is of an earlier run of this name: care-compress fidelity "
                f"{sources.name} measures this one."
            )
        )
        return section
    versions = [_version(row) for row in found["rungs"]]
    section.blocks += [
        Text(
            "Each version is compared with the one it was made from: a step answers for its "
            "own loss alone; 80 dB and more is the order of float sums. With its quantizers off "
            "a quantized model still has the biases that PTQ corrected and the weights that QAT "
            "trained: that is the version called rescaled."
        ),
        Table(f"On {found['images']:,} images", COLUMNS, versions, COLUMNS[1:4]),
    ]
    names, cells = hardest_sites(found)
    rows = [(Cell(short_name(site)), *map(_decibels, distances)) for site, distances in cells]
    caption = f"The {len(rows)} hardest sites, dB of each step; empty where a site's meaning moved"
    if rows:
        section.blocks.append(Table(caption, ("site", *names), rows, tuple(names)))
    section.blocks += [
        missing(f"{row['rung']}: {row['missing']}") for row in found["rungs"] if "missing" in row
    ]
    return section


def _version(row: Json) -> tuple[Cell, ...]:
    if "missing" in row:
        return (Cell(row["rung"]), *[Cell("")] * 3, Cell(ABSENT), Cell(""))
    return (
        Cell(row["rung"]),
        _decibels(row["sqnr_db"]),
        _decibels(row["to_float_db"]),
        number(row["same_percent"], 1),
        Cell(parting_text(row)),
        Cell(row["before"] or ""),
    )


def _decibels(value: float | None) -> Cell:
    return Cell(decibels(value).removesuffix(" dB"), value)
