"""A quantized model as a file: weights, scales and what is needed to build the graph again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from care_compress.errors import CheckpointError
from care_compress.model.care import build_model
from care_compress.model.checkpoint import QUANTIZED_HEADER
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantization_sections import QuantizeSection
from care_compress.quantize.placement import QuantizedCare, simulate
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network
from care_compress.run import atomic_file
from care_compress.sections import RewriteSection


def save_quantized(
    model: QuantizedCare, section: QuantizeSection, rewrites: RewriteSection, path: Path
) -> None:
    """Write the model; its header holds everything but the numbers."""
    about = {
        "arch": model.arch,
        "num_classes": model.num_classes,
        "resolution": model.plan.resolution,
        "rewrite": rewrites.model_dump(mode="json"),
        "quantize": section.model_dump(mode="json"),
    }
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    content = save(tensors, metadata={QUANTIZED_HEADER: json.dumps(about, sort_keys=True)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def quantized_header(path: Path) -> dict[str, Any] | None:
    """What a quantized model says about itself; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(QUANTIZED_HEADER)
    except (OSError, SafetensorError):
        return None
    return None if header is None else dict(json.loads(header))


def quantized_section(path: Path) -> QuantizeSection:
    """How the model was quantized, with the rules that a search found."""
    return QuantizeSection.model_validate_json(json.dumps(_about(path)["quantize"]))


def _about(path: Path) -> dict[str, Any]:
    about = quantized_header(path)
    if about is None:
        raise CheckpointError(
            f"{path} is no quantized model.", "give one from runs/<name>/ptq or qat"
        )
    return about


@dataclass(frozen=True)
class Saved:
    """A quantized model read from its file."""

    model: QuantizedCare
    network: CompactCare  # the float network inside, as PTQ rescaled and QAT trained it
    section: QuantizeSection


def load_saved(path: Path) -> Saved:
    """The quantized model in simulation, ready to run, and what it was made from."""
    about, section = _about(path), quantized_section(path)
    rewrites = RewriteSection.model_validate_json(json.dumps(about["rewrite"]))
    with torch.random.fork_rng():
        network = rewrite(build_model(about["arch"], about["num_classes"]), rewrites)
    network, plan = planned(network, section, about["resolution"])
    model = simulate(network, plan)
    model.load_state_dict(load_file(path), strict=True)
    return Saved(model, float_network(model, network), section)


def load_quantized(path: Path) -> QuantizedCare:
    """The quantized model in simulation, ready to run."""
    return load_saved(path).model
