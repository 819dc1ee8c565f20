"""One inference, ready to be timed: a model loaded for one batch size and a number of threads."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from care_compress.errors import CareError, TargetError
from care_compress.libraries import load_openvino, openvino_core
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_onnxruntime import feed_of, open_session
from care_compress.runtime.on_openvino import openvino_feed, read_to_run
from care_compress.shipped import QUANTIZE


@dataclass(frozen=True)
class Runner:
    """Runs the same images again and again."""

    run: Callable[[], object]
    load_seconds: float  # reading and compiling


def open_runner(
    path: Path, images_BCHW: Tensor, threads: int, precision: str, device: str = "CPU"
) -> Runner:
    """Any artifact for this batch; `precision` is what OpenVINO may round to.

    The file itself stays as it is: our graphs name their batch in one place only, and that is
    changed in memory.
    """
    began = time.perf_counter()
    try:
        run: Callable[[], object]
        if path.suffix == ".onnx":
            session = open_session(path, batched_onnx(path, len(images_BCHW)), threads)
            feed = {session.get_inputs()[0].name: feed_of(session, path)(images_BCHW)}
            run = partial(session.run, None, feed)
        elif path.suffix == ".xml":
            run = openvino_request(path, images_BCHW, threads, precision, device)
        else:
            # As a user of torch or TensorRT would wait for it: images in, logits out.
            predict = open_predictor(str(path), torch.device("cpu"))

            def answer() -> object:
                torch.set_num_threads(threads)  # one setting for the whole process
                return predict(images_BCHW)

            run = answer
        run()
    except CareError:
        raise
    except Exception as error:  # each runtime has classes of its own
        raise TargetError(
            f"{path.name} does not run on {len(images_BCHW)} images at once.",
            f"export it again: {QUANTIZE}",
        ) from error
    return Runner(run, time.perf_counter() - began)


def batched_onnx(path: Path, batch: int) -> bytes:
    """The content of an ONNX file, for this batch."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    content: bytes = model.SerializeToString()
    return content


def openvino_request(
    path: Path,
    images_BCHW: Tensor,
    threads: int,
    precision: str,
    device: str,
    profiled: bool = False,
) -> "Request":
    """An IR file compiled for these images; `profiled`, it counts the time of every layer."""
    openvino = load_openvino()
    core = openvino_core()
    model = read_to_run(path, device)
    images = openvino_feed(model, path)(images_BCHW)
    model.reshape(list(images.shape))
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = threads
    if profiled:
        settings["PERF_COUNT"] = True
    request = core.compile_model(model, device, settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
    return Request(request, images)


@dataclass(frozen=True)
class Request:
    """An inference request with the images whose address it holds."""

    request: Any
    images: Any

    def __call__(self) -> Any:
        """Run them."""
        return self.request.infer()
