"""Bytes on disk, multiplications by precision, and the energy of them."""

from typing import Any

from care_compress.quantize.spec import ENERGY_PJ
from care_compress.report.blocks import (
    Block,
    Figure,
    Picture,
    Row,
    Text,
    megabytes,
    missing,
    number,
    table,
)
from care_compress.report.drawing import Labelled, bars
from care_compress.report.sources import Json, Sources
from care_compress.shipped import COMPARE, QUANTIZE


def size(sources: Sources) -> list[Block]:
    """Show bytes on disk and in memory, multiplications by precision, and their energy."""
    plain = float_bytes(sources.results)
    rows = [Labelled("float32 weights", plain, megabytes(plain).text, 0)]
    # Every kind of exported file once, with the targets it is for.
    kinds: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for target, export in sources.results["exports"].items():
        for model in export.get("models", {}).values():
            kind = (model["file"], megabytes(model["size_bytes"]).text)
            kinds.setdefault(kind, (model["size_bytes"], []))[1].append(target)
    for (file, said), (count, targets) in kinds.items():
        where = targets[0] if len(targets) == 1 else f"{len(targets)} targets"
        rows.append(Labelled(f"{file}, {where}", count, f"{said} ({plain / count:.1f}x)", 1))
    told = "; ".join(f"{row.label} {row.text}" for row in rows)
    blocks: list[Block] = [
        Figure(
            [Picture(bars(rows, told), told)],
            "Size on disk",
            note="The float32 weights are parameters times 4 bytes, without a file around them.",
        )
    ]
    if len(rows) == 1:
        blocks.append(
            missing(
                f"No file was exported: {QUANTIZE} with export.targets naming a target that "
                "executes this precision writes one."
            )
        )
    memory: list[Row] = [
        {"target": target, "model": name, "peak memory": megabytes(one["peak_memory_bytes"])}
        for target, models in sources.compared.items()
        for name, one in models.items()
        if one.get("peak_memory_bytes")
    ]
    blocks += table("Memory of one image, above the runtime's own", memory) or [
        missing(f"Memory has not been measured: {COMPARE} fp32 {sources.name} does that.")
    ]
    plan = sources.results.get("plan")
    if plan is None:
        return [*blocks, missing("Energy is estimated from a plan, which this run has not.")]
    total = sum(plan["macs"].values())
    macs: list[Row] = [
        {
            "precision": kind,
            "MACs (M)": number(count / 1e6, 3),
            "share %": number(100 * count / total, 2),
        }
        for kind, count in plan["macs"].items()
    ]
    energy = f"{plan['energy_mj']:.4f} mJ an image"
    before = float_energy(sources)
    if before:
        energy += f", {before / plan['energy_mj']:.1f}x below the {before:.4f} mJ of float32"
    return [
        *blocks,
        *table("Multiplications of one image", macs),
        Text(
            f"Energy of the products, by the 45 nm figures (an estimate, not measured): {energy}."
        ),
    ]


def float_bytes(results: Json) -> int:
    """Count the bytes of the weights alone in float32, after the rewrites."""
    return 4 * int(results["rewrites"][-1]["parameters"])


def float_energy(sources: Sources) -> float | None:
    """Estimate mJ of the same products in float32; a quantized model's rotations are left out."""
    plan = sources.evidence.get("plan")
    if plan is None:
        return None
    macs = sum(site["macs"] for site in plan["sites"])
    return float(macs * sum(ENERGY_PJ["float"]) * 1e-9)


def smallest(sources: Sources) -> dict[str, Any] | None:
    """Find the smallest file of the run's own precision; megabytes decide about a device."""
    own = [
        export["models"][sources.results["precision"]]
        for export in sources.results["exports"].values()
        if sources.results["precision"] in export.get("models", {})
    ]
    return min(own, key=lambda model: int(model["size_bytes"]), default=None)
