"""Bytes on disk, multiplications by precision, and the energy of them."""

from typing import Any

from care_compress.quantize.spec import ENERGY_PJ
from care_compress.report.blocks import (
    Block,
    Cell,
    Figure,
    PageSection,
    Picture,
    Table,
    Text,
    megabytes,
    missing,
    number,
)
from care_compress.report.drawing import Bar, bars
from care_compress.report.sources import Json, Sources


def size(sources: Sources) -> PageSection:
    """Bytes on disk, multiplications by precision, energy of them."""
    section = PageSection("size", "Size and energy")
    plain = float_bytes(sources.results)
    rows = [Bar("float32 weights", plain, f"{plain / 1e6:.2f} MB", 0)]
    for label, one in _files(sources):
        smaller = f"{one['size_bytes'] / 1e6:.2f} MB ({plain / one['size_bytes']:.1f}x)"
        rows.append(Bar(label, one["size_bytes"], smaller, 1))
    told = "; ".join(f"{row.label} {row.text}" for row in rows)
    section.blocks.append(
        Figure(
            (Picture(bars(rows, told), told),),
            "Size on disk",
            note="The float32 weights are parameters times 4 bytes, without a file around them.",
        )
    )
    if len(rows) == 1:
        section.blocks.append(
            missing(
                "No file was exported: make quantize with export.targets naming a target that "
                "executes this precision writes one."
            )
        )
    section.blocks.append(_memory(sources))
    plan = sources.results.get("plan")
    if plan is None:
        section.blocks.append(missing("Energy is estimated from a plan, which this run has not."))
        return section
    total = sum(plan["macs"].values())
    macs = [
        (Cell(kind), number(count / 1e6, 3), number(100 * count / total, 2))
        for kind, count in plan["macs"].items()
    ]
    columns = ("precision", "MACs (M)", "share %")
    section.blocks.append(Table("Multiplications of one image", columns, macs, columns[1:]))
    energy = f"{plan['energy_mj']:.4f} mJ an image"
    before = float_energy(sources)
    if before:
        energy += f", {before / plan['energy_mj']:.1f}x below the {before:.4f} mJ of float32"
    section.blocks.append(
        Text(f"Energy of the products, by the 45 nm figures (an estimate, not measured): {energy}.")
    )
    return section


def _memory(sources: Sources) -> Block:
    """What each compared file adds to its runtime."""
    rows = [
        (Cell(target), Cell(name), megabytes(one["peak_memory_bytes"]))
        for target, models in ((sources.compare or {}).get("targets") or {}).items()
        for name, one in models.items()
        if one.get("peak_memory_bytes")
    ]
    if not rows:
        return missing(
            f"Memory has not been measured: python eval/compare.py fp32 {sources.name} does that."
        )
    columns = ("target", "model", "peak memory")
    return Table("Memory of one image, above the runtime's own", columns, rows, columns[2:])


def float_bytes(results: Json) -> int:
    """Of the weights alone, after the rewrites."""
    return 4 * int(results["rewrites"][-1]["parameters"])


def float_energy(sources: Sources) -> float | None:
    """Of the same products in float32; the rotations of a quantized model are none of them."""
    plan = sources.evidence.get("plan")
    if plan is None:
        return None
    macs = sum(site["macs"] for site in plan["sites"])
    return float(macs * sum(ENERGY_PJ["float"]) * 1e-9)


def _files(sources: Sources) -> list[tuple[str, dict[str, Any]]]:
    """Every kind of exported file once, with the targets it is for."""
    found: dict[tuple[str, str], tuple[list[str], dict[str, Any]]] = {}
    for target, export in sources.results["exports"].items():
        for model in export.get("models", {}).values():
            kind = (model["file"], megabytes(model["size_bytes"]).text)
            found.setdefault(kind, ([], model))[0].append(target)
    return [
        (f"{one['file']}, {names[0] if len(names) == 1 else f'{len(names)} targets'}", one)
        for names, one in found.values()
    ]


def smallest(sources: Sources) -> dict[str, Any] | None:
    """The smallest file of the run's own precision; megabytes decide about a device."""
    own = [
        export["models"][sources.results["precision"]]
        for export in sources.results["exports"].values()
        if sources.results["precision"] in export.get("models", {})
    ]
    return min(own, key=lambda model: int(model["size_bytes"]), default=None)
