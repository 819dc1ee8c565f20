"""What the stages share: the run they write to, who is watching, and how a model is measured."""

from collections.abc import Sequence

from torch import nn

from care_compress.data.checks import Contents
from care_compress.data.samples import Samples, spread_indices
from care_compress.evaluate.accuracy import (
    NOTHING,
    Accuracy,
    images_at_once,
    measure_accuracy,
    own_share,
)
from care_compress.evaluate.pairs import Paired, measure_pair
from care_compress.files import write_text
from care_compress.model.compact import CompactCare
from care_compress.model.predictor import Predictor
from care_compress.run.context import Workshop
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.train.loop import Validate

SEEN_FILE = "validation.digests"


def batch_size(shop: Workshop) -> int:
    """How many images an evaluation looks at together."""
    return images_at_once(shop.recipe.evaluate.batch_size, shop.world.device)


def measured(
    shop: Workshop,
    model: nn.Module,
    validation: Samples,
    indices: Sequence[int],
    contents: Contents | None = None,
) -> Accuracy:
    """Accuracy of a torch module on these validation images, all by this process."""
    predict = TorchPredictor(model, len(validation.classes), shop.world.device)
    return measure_accuracy(
        predict,
        validation,
        shop.recipe.data,
        batch_size=batch_size(shop),
        indices=indices,
        bad=shop.bad,
        console=shop.console,
        device=shop.world.device,
        contents=contents,
    )


def scored(shop: Workshop, model: nn.Module, validation: Samples) -> Accuracy:
    """Accuracy on the recipe's validation images; each process counts its share."""
    evaluate, world = shop.recipe.evaluate, shop.world
    chosen = spread_indices(len(validation), evaluate.images)
    with shop.stage("evaluate"):
        share = own_share(chosen, batch_size(shop), world)
        mine = measured(shop, model, validation, share, shop.seen)
        _keep_seen(shop, validation)
        return sum(world.gathered(mine), NOTHING)


def _keep_seen(shop: Workshop, validation: Samples) -> None:
    """Every process knows what all have seen; the main one keeps it, as a part of the scores."""
    shop.seen.take(shop.world.gathered(shop.seen))
    if shop.world.is_main and len(shop.seen):
        # With the images' own digest: a run that takes these scores over takes this over, too.
        text = f"{validation.content_digest()}\n{shop.seen.as_text()}\n"
        write_text(shop.run.path / SEEN_FILE, text)
        shop.run.record_output(shop.run.path / SEEN_FILE)


def seen_images(shop: Workshop, validation: Samples) -> Contents:
    """Digests of the validation images, from this run or the one whose scores it took over."""
    path = shop.run.path / SEEN_FILE
    if not len(shop.seen) and path.is_file():
        known, _, text = path.read_text(encoding="utf-8").strip().partition("\n")
        if known == validation.content_digest():
            return Contents.of_text(text)
    return shop.seen


def validating(shop: Workshop, validation: Samples) -> Validate:
    """What a training calls to know how it is doing; each process counts its share."""

    def validate(candidate: nn.Module) -> tuple[int, int]:
        chosen = spread_indices(len(validation), shop.recipe.evaluate.images)
        share = chosen[slice(*shop.world.share(len(chosen)))]
        accuracy = measured(shop, candidate, validation, share)
        return accuracy.images, accuracy.correct

    return validate


def compared(
    shop: Workshop,
    compact: CompactCare,
    model: Predictor,
    validation: Samples,
    images: int | None = None,
) -> Paired:
    """A quantized model beside the float one; on `images`, or as many as the recipe evaluates.

    Each process counts its share, so all of the shop's world must come here.
    """
    recipe, world, device = shop.recipe, shop.world, shop.world.device
    classes = len(validation.classes)
    chosen = spread_indices(len(validation), images or recipe.evaluate.images)
    with shop.stage("evaluate"):
        mine = measure_pair(
            TorchPredictor(compact, classes, device),
            model,
            validation,
            recipe.data,
            batch_size=batch_size(shop),
            indices=own_share(chosen, batch_size(shop), world),
            bad=shop.bad,
            console=shop.console,
            device=device,
            # The whole set is read at least once; what a search looks at is a part of it.
            contents=None if images or len(shop.seen) else shop.seen,
        )
        _keep_seen(shop, validation)
        first, *others = world.gathered(mine)
        return sum(others, first)
