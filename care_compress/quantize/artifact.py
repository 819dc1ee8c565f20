"""A quantized model as a file: weights, scales and what is needed to build the graph again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from care_compress.console import one_line, shortened
from care_compress.errors import CareError, CheckpointError
from care_compress.files import atomic_file
from care_compress.model.care import Widths
from care_compress.model.checkpoint import QUANTIZED_HEADER, kind_of
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantize.placement import QuantizedCare, simulate
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.sections import Arch, Count, RewriteSection, Section, Task


class _Header(Section):
    """What is needed to build the network again, beside its numbers."""

    arch: Arch
    num_classes: Count
    resolution: Annotated[int, Field(ge=32, le=2048)]
    rewrite: RewriteSection
    quantize: QuantizeSection
    widths: Widths | None = None  # of a slimmed network
    task: Task = "classification"


def save_quantized(
    model: QuantizedCare, section: QuantizeSection, rewrites: RewriteSection, path: Path
) -> None:
    """Write the model; its header holds everything but the numbers."""
    about: dict[str, object] = {
        "arch": model.arch,
        "num_classes": model.num_classes,
        "resolution": model.plan.resolution,
        "rewrite": rewrites.model_dump(mode="json"),
        "quantize": section.model_dump(mode="json"),
    }
    if model.task != "classification":
        about["task"] = model.task
    if model.widths != Widths.published(model.arch):
        about["widths"] = asdict(model.widths)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    content = save(tensors, metadata={QUANTIZED_HEADER: json.dumps(about, sort_keys=True)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def quantized_header(path: Path) -> _Header | None:
    """What a quantized model says about itself; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(QUANTIZED_HEADER)
    except (OSError, SafetensorError):
        return None
    if header is None:
        return None
    try:
        about = _Header.model_validate_json(header)
    except ValueError as error:
        reason = shortened(one_line(str(error)))
        raise _damaged(path, f"its header says {reason}") from error
    if "full_range" in about.quantize.model_fields_set:
        return about
    # Older than the limit of 8-bit weights on CPUs: its weights use all 8 bits.
    section = about.quantize.model_copy(update={"full_range": True})
    return about.model_copy(update={"quantize": section})


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no quantized model that can be read: {reason}.", "quantize again"
    )


@dataclass(frozen=True)
class Saved:
    """A quantized model read from its file."""

    model: QuantizedCare
    network: CompactCare  # the float network inside, as PTQ rescaled and QAT trained it
    section: QuantizeSection  # with the rules that a search found


def load_saved(path: Path) -> Saved:
    """The quantized model in simulation, ready to run, and what it was made from."""
    about = quantized_header(path)
    if about is None:
        raise CheckpointError(
            f"{path} is no quantized model.", "give one from runs/<name>/ptq or qat"
        )
    if 4 * about.num_classes > path.stat().st_size:  # a number for each, in the head's bias
        raise _damaged(path, f"it is too small for {about.num_classes:,} classes")
    with torch.random.fork_rng():  # new layers draw their numbers, which are replaced
        try:
            kind = kind_of(about.task)
            made = kind(about.arch, about.num_classes, widths=about.widths)
        except CareError as error:
            raise _damaged(path, shortened(one_line(str(error)))) from error
        network = rewrite(made, about.rewrite)
        network, plan = planned(network, about.quantize, about.resolution)
        model = simulate(network, plan)
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (RuntimeError, SafetensorError, ValueError, OSError) as error:
        raise _damaged(path, shortened(one_line(str(error)))) from error
    return Saved(model, float_network(model, network), about.quantize)


def load_quantized(path: Path) -> QuantizedCare:
    """The quantized model in simulation, ready to run."""
    return load_saved(path).model
