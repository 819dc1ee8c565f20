"""What the stages share: the run they write to, who is watching, and how a model is measured."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console

from care_compress import machine
from care_compress.data.checks import Contents
from care_compress.data.loader import BadImages
from care_compress.recipe.recipe import Recipe
from care_compress.run.directory import Run
from care_compress.run.processes import World


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


def share_bad(shop: Workshop) -> None:
    """Every process knows all images that were left out; the main one reports them."""
    for reasons in shop.world.gathered(shop.bad.reasons):
        shop.bad.reasons.update(reasons)
