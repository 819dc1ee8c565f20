"""What the stages share: the run they write to, who is watching, and how a model is measured."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from torch import nn

from care_compress import machine
from care_compress.data.loader import BadImages
from care_compress.data.overlap import Contents
from care_compress.data.samples import Samples
from care_compress.evaluate.accuracy import (
    NOTHING,
    Accuracy,
    images_at_once,
    measure_accuracy,
    own_share,
    spread_indices,
)
from care_compress.evaluate.paired import Paired, measure_pair
from care_compress.model.compact import CompactCare
from care_compress.predictor import Predictor
from care_compress.recipe import Recipe
from care_compress.run import Run, write_text
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.train.distributed import World
from care_compress.train.loop import Validate
from care_compress.train.network import Training
from care_compress.train.state import STATE_FILE, drop_damaged

SEEN_FILE = "validation.digests"


@dataclass
class Workshop:
    """What every stage may use: the recipe, the run it writes to, and who is watching."""

    recipe: Recipe
    run: Run
    world: World
    console: Console
    bad: BadImages = field(default_factory=BadImages)
    seen: Contents = field(default_factory=Contents)  # of the validation images
    seconds: dict[str, float] = field(default_factory=dict)
    repair: bool = False  # make again what was damaged on the disk

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        began = time.monotonic()
        yield
        self.spend(name, time.monotonic() - began)

    def spend(self, name: str, seconds: float) -> None:
        """Add to the time of a stage."""
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 2)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within the block, times and images left out are counted from nothing."""
        seconds, reasons = self.seconds, self.bad.reasons
        self.seconds, self.bad.reasons = {}, {}
        try:
            yield
        finally:
            self.seconds, self.bad.reasons = seconds, reasons


@contextlib.contextmanager
def opened(run: Run, recipe: Recipe, world: World, repair: bool = False) -> Iterator[Run]:
    """Only the main process holds and writes the run directory."""
    if not world.is_main:
        yield run
        return
    with run.open(recipe, machine.describe(), repair):
        yield run


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


def share_bad(shop: Workshop) -> None:
    """Every process knows all images that were left out; the main one reports them."""
    for reasons in shop.world.gathered(shop.bad.reasons):
        shop.bad.reasons.update(reasons)


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


def training_in(shop: Workshop, samples: Samples, validation: Samples, folder: str) -> Training:
    """What a training of this run works with; its state goes to `folder` of the run."""
    if shop.repair and shop.world.is_main:
        drop_damaged(shop.run.path / folder / STATE_FILE)
    shop.world.wait()
    return Training(
        recipe=shop.recipe,
        samples=samples,
        validate=validating(shop, validation),
        folder=shop.run.path / folder,
        world=shop.world,
        console=shop.console,
        bad=shop.bad,
    )


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
