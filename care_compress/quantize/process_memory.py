"""How much memory one process takes: a worker that ``--ray`` hands pieces to, and a whole run.

    worker = libraries + COPIES x weights + images + SIMULATED x batch x activations
    run    = libraries + decoders + COPIES x weights + the larger of
             SIMULATED x images at once x activations   (ranges and corrections)
             TRAINED x batch x all activations + STATES x weights   (a training)

Activations are those of one image in float32, weighed on the meta device: the most at once in a
forward pass, and all of them together, which a training keeps. Factors were measured on a CPU
(docs/SCALE.md); on a GPU, activations and copies of weights are in its memory.
"""

from dataclasses import dataclass

from torch import nn

from care_compress.data.loader import BATCH_SIZES, MAX_WORKERS
from care_compress.machine import usable_cores
from care_compress.model.cost import measure_activations
from care_compress.quantize.ptq import LEAST_IMAGES, PIXELS
from care_compress.quantize.search import BATCH, NOISE_IMAGES
from care_compress.quantize.stages import SITE_BATCH
from care_compress.recipe.recipe import Recipe

LIBRARIES = 600_000_000  # bytes of a worker with torch, torchao, Ray and a traced graph
DECODER = 50_000_000  # of a decoding process, beside what it shares
FLOAT = 4
COPIES = 5  # of the weights: a file's content, two networks, a graph and its tensors
SIMULATED = 3  # times the float network's activations: each quantizer makes some of its own
TRAINED = 2  # times all of them: what quantizers keep, the teacher, gradients on the way back
RUN = "run"  # beside the verbs that --ray shares out
STATES = 4  # of every weight: gradient, two moments, an average
SITE_IMAGES = 256  # of a sensitivity, unless it is asked for others


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes at the peak, by what takes them."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        told = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in self.parts.items())
        return f"{self.total / 1e6:,.0f} MB ({told})"


def memory_of(recipe: Recipe, network: nn.Module) -> dict[str, ProcessMemory]:
    """Return what a run of a recipe takes, and a worker of each verb that measures its network."""
    size = recipe.data.resolution
    weights = FLOAT * sum(parameter.numel() for parameter in network.parameters())
    image, one = FLOAT * 3 * size**2, measure_activations(network, size)

    def worker(images: int, batch: int) -> ProcessMemory:
        return ProcessMemory(
            {
                "libraries": LIBRARIES,
                "weights": COPIES * weights,
                "images": images * image,
                "activations": SIMULATED * batch * one.live,
            }
        )

    scored = recipe.evaluate.batch_size or BATCH_SIZES["cpu"]
    found = {"accuracy": worker(scored, scored)}
    section, heal = recipe.quantize, None if recipe.slim is None else recipe.slim.heal
    at_once = scored
    if section is not None:
        at_once = max(scored, section.calibrate.batch_size, LEAST_IMAGES, PIXELS // size**2)
        if section.backend == "torchao":
            found["sensitivity"] = worker(SITE_IMAGES, SITE_BATCH)
        if section.search is not None:
            found["search"] = worker(NOISE_IMAGES, BATCH)
    forward = SIMULATED * at_once * one.live
    qat = None if section is None else section.qat
    trainings = [course.batch_size for course in (recipe.train, heal, qat) if course is not None]
    decoders = recipe.data.workers
    if decoders is None:
        decoders = min(len(usable_cores()), MAX_WORKERS)
    training = TRAINED * max(trainings) * one.kept + STATES * weights if trainings else 0
    batch = max([at_once, *trainings])
    found[RUN] = ProcessMemory(
        {
            "libraries": LIBRARIES,
            "decoders": decoders * DECODER,
            "weights": COPIES * weights,
            "images": batch * image,
            "activations": max(forward, training),
        }
    )
    return found
