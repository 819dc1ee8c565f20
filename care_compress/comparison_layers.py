"""Where every file of a comparison spends its time, layer by layer, at batch 1 on one thread."""

import torch
from rich.console import Console

from care_compress.comparison import CompareOptions, Comparison
from care_compress.contenders import Contender
from care_compress.data.loader import BadImages
from care_compress.data.samples import Samples
from care_compress.evaluate.images import hold_images
from care_compress.progress import step_line
from care_compress.runtime.profile import SECONDS, profile_layers, read_engine_profile
from care_compress.sections import DataSection


def profile_files(
    found: Comparison,
    data: DataSection,
    samples: Samples,
    options: CompareOptions,
    console: Console,
) -> None:
    """Layers of what runs here with their times; of engines that were built, their precisions."""
    single = data.model_copy(update={"workers": 0})
    (image,) = hold_images(samples, single, 1, BadImages()).batches(1)
    image = image.contiguous(memory_format=torch.contiguous_format)
    seconds = min(SECONDS, options.latency.seconds)
    with step_line(console) as notify:
        for entry in found.entries:
            if entry.path.suffix in (".onnx", ".xml"):
                notify(f"profiling {entry.name} on {entry.target}")
                found.layers[entry.key] = profile_layers(
                    entry.path, image, 1, entry.precision, entry.device, seconds
                )
    for target, name in found.missing:
        model = next(one for one in found.models if one.name == name)
        _engine(found, model, target)


def _engine(found: Comparison, model: Contender, target: str) -> None:
    """What an engine that was built ahead says of its layers; its GPU need not be here."""
    path = model.files.get(target)
    engine = None if path is None else path.with_suffix(".engine")
    if engine is not None and engine.is_file():
        found.layers[f"{target}/{model.name}"] = read_engine_profile(engine)
