"""What every stage works with: the run it writes to, its processes, and who is watching."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console

from care_compress import machine
from care_compress.data.checks import Contents
from care_compress.data.loader import BadImages
from care_compress.recipe.recipe import Recipe
from care_compress.run.directory import Run
from care_compress.run.processes import World

# Told of each validation: the training's folder, how many there were, the last one's metric. It
# ends the run by raising.
Watch = Callable[[str, int, float], None]


@dataclass
class RunContext:
    """One process's view of a run. What a stage does is in its own arguments, not here."""

    run: Run
    world: World
    console: Console
    bad: BadImages = field(default_factory=BadImages)
    seen: Contents = field(default_factory=Contents)  # of the validation images
    seconds: dict[str, float] = field(default_factory=dict)
    repair: bool = False  # make again what was damaged on the disk
    watch: Watch | None = None

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
        """Count times and images left out from nothing within the block."""
        seconds, reasons = self.seconds, self.bad.reasons
        self.seconds, self.bad.reasons = {}, {}
        try:
            yield
        finally:
            self.seconds, self.bad.reasons = seconds, reasons


@contextlib.contextmanager
def open_run(
    run: Run,
    recipe: Recipe,
    world: World,
    console: Console,
    repair: bool = False,
    watch: Watch | None = None,
) -> Iterator[RunContext]:
    """Hold the run directory while the block works in it; only the main process writes there."""
    held = (
        run.open(recipe, machine.describe(), repair) if world.is_main else contextlib.nullcontext()
    )
    with held:
        yield RunContext(run, world, console, repair=repair, watch=watch)
