"""Everything a reader should know about a run's numbers, put together once the run is through."""

from collections.abc import Sequence

from care_compress.console import Finding
from care_compress.data.checks import coverage_finding, overlap_findings
from care_compress.data.samples import Samples, spread_indices
from care_compress.evaluate.accuracy import Accuracy, answers_finding
from care_compress.evaluate.readback import exports_finding
from care_compress.evaluate.run_accuracy import seen_images
from care_compress.export.result import Exported
from care_compress.files import read_json
from care_compress.quantize.health import NNCF_TELLS_NOTHING, Health, read_health
from care_compress.quantize.stages import CALIBRATION_FILE, Candidate
from care_compress.run.context import Workshop

UNREADABLE = "health.json is not beside the model: make the run again under another --name"


def run_findings(
    shop: Workshop,
    validation: Samples,
    accuracy: Accuracy,
    best: Candidate | None,
    done: Sequence[Exported],
) -> list[Finding]:
    """One for each check; worst first."""
    indices = spread_indices(len(validation), shop.recipe.evaluate.images)
    scores = {"float": accuracy}
    if best is not None:
        scores = {"float": best.paired.baseline, best.name: best.paired.candidate}
    found = [
        exports_finding({one.target.name: one.as_json() for one in done}),
        answers_finding(scores),
        coverage_finding(validation, indices),
        *overlap_findings(validation, seen_images(shop, validation), _calibration(shop)),
        *([] if best is None else _health(shop, best)),
    ]
    order = ("warning", "not measured", "fine")
    return sorted(found, key=lambda finding: order.index(finding.status))


def _calibration(shop: Workshop) -> list[tuple[str, int]] | None:
    """Names of the calibration images and digests of what they are stored as, if known."""
    if shop.recipe.quantize is None:
        return []
    content = read_json(shop.run.path / CALIBRATION_FILE)
    if any("stored" not in image for image in content["images"]):
        return None  # a list of an earlier version, taken over with its stage
    return [(image["name"], int(image["stored"], 16)) for image in content["images"]]


def _health(shop: Workshop, best: Candidate) -> list[Finding]:
    assert shop.recipe.quantize is not None
    if shop.recipe.quantize.backend == "nncf":
        return Health.missing(NNCF_TELLS_NOTHING)
    health = read_health(best.path.with_name("health.json"))
    return Health.missing(UNREADABLE) if health is None else health.findings()
