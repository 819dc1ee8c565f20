"""Everything a reader should know about a run's numbers, put together once the run is through."""

from collections.abc import Mapping
from typing import Any

from care_compress.console import CheckResult
from care_compress.data.checks import coverage_check, overlap_checks
from care_compress.data.samples import Samples, spread_indices
from care_compress.evaluate.accuracy import answers_check
from care_compress.evaluate.readback import exports_check
from care_compress.evaluate.run_accuracy import Candidate, Scores, seen_images
from care_compress.files import read_json
from care_compress.quantize.health import NNCF_TELLS_NOTHING, Health, read_health
from care_compress.quantize.stages import CALIBRATION_FILE
from care_compress.recipe.recipe import Recipe
from care_compress.run.context import RunContext

UNREADABLE = "health.json is not beside the model: make the run again under another --name"


def run_checks(
    context: RunContext,
    recipe: Recipe,
    validation: Samples,
    scores: Scores,
    exports: Mapping[str, Any],
) -> list[CheckResult]:
    """One for each check; worst first."""
    indices, best = spread_indices(len(validation), recipe.evaluate.images), scores.best
    answers = {"float": scores.accuracy}
    if best is not None:
        answers = {"float": best.paired.baseline, best.name: best.paired.candidate}
    found = [
        exports_check(exports),
        answers_check(answers),
        coverage_check(validation, indices),
        *overlap_checks(
            validation, seen_images(context, validation), _calibration(context, recipe)
        ),
        *([] if best is None else _health(recipe, best)),
    ]
    order = ("warning", "not measured", "fine")
    return sorted(found, key=lambda check: order.index(check.status))


def _calibration(context: RunContext, recipe: Recipe) -> list[tuple[str, int]] | None:
    """Names of the calibration images and digests of what they are stored as, if known."""
    if recipe.quantize is None:
        return []
    content = read_json(context.run.path / CALIBRATION_FILE)
    if any("stored" not in image for image in content["images"]):
        return None  # a list of an earlier version, taken over with its stage
    return [(image["name"], int(image["stored"], 16)) for image in content["images"]]


def _health(recipe: Recipe, best: Candidate) -> list[CheckResult]:
    assert recipe.quantize is not None
    if recipe.quantize.backend == "nncf":
        return Health.missing(NNCF_TELLS_NOTHING)
    health = read_health(best.path.with_name("health.json"))
    return Health.missing(UNREADABLE) if health is None else health.checks()
