"""Quantizers that are no dependencies of ours, run in a process with packages of their own.

    PYTHONPATH=.peers .venv/bin/python bench/peer_quantizers.py aimet in.onnx images.npy out.onnx

``make bench PEERS=all`` fills ``.peers`` from ``bench/peers.txt``; `peers.py` runs this. Settings
are the libraries' own for INT8, but for what only a GPU could run: Model-Optimizer looks for ranges
on the CPU and leaves the rest in float32. AIMET folds norms first, as its guide does, and exports
quantized weights.
"""

import os
import sys
import traceback
from collections.abc import Callable

import numpy as np
import onnx
from numpy.typing import NDArray

Images = NDArray[np.float32]  # (N, 3, H, W)


def modelopt(source: str, images: Images, target: str) -> None:
    """Model-Optimizer's quantization of ONNX files."""
    from modelopt.onnx.quantization import quantize

    quantize(
        source,
        calibration_data=images,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=target,
    )


def aimet(source: str, images: Images, target: str) -> None:
    """AIMET's simulation, written as the Q/DQ graph that it exports."""
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
    from aimet_onnx.quantsim import QuantizationSimModel

    model = onnx.load(source)
    fold_all_batch_norms_to_weight(model)
    simulation = QuantizationSimModel(model)
    name = model.graph.input[0].name
    simulation.compute_encodings([{name: image[None]} for image in images])
    onnx.save(simulation.to_onnx_qdq(prequantize_constants=True), target)


TOOLS: dict[str, Callable[[str, Images, str], None]] = {"modelopt": modelopt, "aimet": aimet}


if __name__ == "__main__":
    tool, source, images, target = sys.argv[1:]
    try:
        TOOLS[tool](source, np.load(images), target)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        # At once: what destructors say on the way out would hide the reason, the last line.
        os._exit(1)
