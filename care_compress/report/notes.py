"""What to know about the numbers: every check that was made of what they rest on."""

from care_compress.findings import listed
from care_compress.report.blocks import Cell, Section, Table, Text, missing
from care_compress.report.sources import Json, Sources

LISTED = 8  # items in one sentence
# Worst first.
SIGNS = {"warning": "✗ take note", "not measured": "not measured", "fine": "✓ fine"}


def checks(sources: Sources) -> Section:
    """The warnings as sentences, then all checks in a table."""
    section = Section("checks", "What to know about these numbers")
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
    section.blocks += [Text(f"✗ {_said(one)}", "bad") for one in warnings]
    unknown = sum(one["status"] == "not measured" for one in found)
    if not warnings:
        though = f", though {unknown} of {len(found)} checks could not be made" if unknown else ""
        said = f"✓ Nothing was found that should make you doubt them{though}."
        section.blocks.append(Text(said, "good"))
    rows = [(Cell(one["check"]), Cell(SIGNS[one["status"]]), Cell(one["text"])) for one in found]
    section.blocks.append(Table("What was checked", ("check", "result", "found"), rows))
    return section


def _said(one: Json) -> str:
    shown = [str(item) for item in one["items"][:LISTED]]
    more = one["count"] - len(shown)
    named = listed(shown) + (f" and {more:,} more" if more > 0 else "")
    said = f"{one['check']}: {one['text']}"
    return f"{said}: {named.removesuffix('.')}." if named else f"{said}."
