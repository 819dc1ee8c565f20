"""The same network by other people's tools, from their packages, with the settings they recommend.

ONNX Runtime (the docstring of its `quantize_static`): `quant_pre_process` first, Q/DQ, u8
activations and s8 weights on an x86 processor, of 7 bits where it has no VNNI, weights per channel;
once with its own choice of operations, once with convolutions and products alone, as many users
choose. NNCF (the docstring of its `quantize`): the mixed preset, which is for networks with GELU,
its own choice of operations and of bias correction; once more with the transformer model type, and
once on our float file instead of the published network, which tells what the rewriting is worth
and what the quantizers are. Model-Optimizer and AIMET: `peer_quantizers.py`. All get the images
that ours was calibrated on.
"""

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from care_compress import machine
from care_compress.export.to_onnx import INPUT, float_graph
from care_compress.files import atomic_file
from care_compress.libraries import load_nncf, load_openvino, openvino_core, silent
from care_compress.model.care import Care
from care_compress.quantize.nncf_ptq import save_openvino

PRODUCTS = ["Conv", "MatMul", "Gemm"]
PUBLISHED, STATIC, STATIC_PRODUCTS = "published", "ort_static", "ort_static_products"
NNCF, NNCF_OURS, NNCF_TRANSFORMER = "nncf_mixed", "nncf_on_ours", "nncf_transformer"
MODELOPT, AIMET = "modelopt", "aimet"
# Those who leave an ONNX file, for both runtimes, and those who leave OpenVINO's.
ONNX_PEERS = {
    STATIC: "quantize_static, its choice",
    STATIC_PRODUCTS: "quantize_static, products only",
    MODELOPT: "Model-Optimizer",
    AIMET: "AIMET",
}
OPENVINO_PEERS = {
    NNCF: "NNCF, mixed preset",
    NNCF_TRANSFORMER: "NNCF, transformer",
    NNCF_OURS: "NNCF, mixed preset, on our float form",
}
PACKAGES = Path(__file__).resolve().parent.parent / ".peers"  # of tools that are not ours
LENGTH = 200  # letters of a reason


@dataclass(frozen=True)
class Made:
    """A peer's file, or why there is none."""

    path: Path
    reason: str = ""


def publish(model: Care, resolution: int, folder: Path) -> Path:
    """The network as published, nothing rewritten, as ONNX; and the same as OpenVINO's IR."""
    path = folder / f"{PUBLISHED}.onnx"
    if not path.with_suffix(".xml").is_file():
        graph = ir.to_proto(float_graph(model, resolution))
        with atomic_file(path) as temporary:
            temporary.write_bytes(graph.SerializeToString(deterministic=True))
        _to_ir(path)
    return path


def make_peers(published: Path, ours: Path, images_NCHW: Tensor) -> dict[str, Made]:
    """Every peer's files beside the published network; those made before are kept.

    `ours` is our float file for OpenVINO.
    """
    images = [np.ascontiguousarray(image[None]) for image in images_NCHW.numpy()]
    network = published.with_suffix(".xml")
    recipes: dict[str, Callable[[Path], None]] = {
        f"{STATIC}.onnx": lambda path: _ort_static(published, path, images, None),
        f"{STATIC_PRODUCTS}.onnx": lambda path: _ort_static(published, path, images, PRODUCTS),
        f"{MODELOPT}.onnx": lambda path: _other(MODELOPT, published, path, images),
        f"{AIMET}.onnx": lambda path: _other(AIMET, published, path, images),
        f"{NNCF}.xml": lambda path: _nncf(network, path, images, None),
        f"{NNCF_TRANSFORMER}.xml": lambda path: _nncf(network, path, images, "transformer"),
        f"{NNCF_OURS}.xml": lambda path: _nncf(ours, path, images, None),
    }
    made = {name: _made(published.parent / name, work) for name, work in recipes.items()}
    for name in ONNX_PEERS:
        source = made[f"{name}.onnx"]
        made[f"{name}.xml"] = (
            Made(source.path, source.reason)
            if source.reason
            else _made(source.path.with_suffix(".xml"), lambda path: _to_ir(path))
        )
    return made


def _made(path: Path, work: Callable[[Path], None]) -> Made:
    if not path.is_file():
        try:
            work(path)
        except Exception as error:  # theirs to raise; what it says is the result
            return Made(path, reason_of(error))
    return Made(path)


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line; its last line is the cause."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return (lines[-1] if lines else type(root).__name__)[:LENGTH]


def _to_ir(path: Path) -> None:
    """OpenVINO's form of the ONNX file of this name."""
    with silent():
        model = load_openvino().convert_model(path.with_suffix(".onnx"))
    save_openvino(model, path.with_suffix(".xml"))


def _ort_static(
    published: Path, path: Path, images: list[NDArray[np.float32]], types: list[str] | None
) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.feeds: Iterator[Mapping[str, Any]] = iter({INPUT: image} for image in images)

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.feeds, None)

    arm = platform.machine().lower() in ("arm64", "aarch64")
    saturates = not arm and machine.dot_products_in("onnxruntime") is False
    with tempfile.TemporaryDirectory() as folder, silent():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(published, prepared)
        quantize_static(
            prepared,
            Path(folder) / path.name,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=types,
            per_channel=True,
            reduce_range=saturates,
            activation_type=QuantType.QInt8 if arm else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        with atomic_file(path) as temporary:
            temporary.write_bytes((Path(folder) / path.name).read_bytes())


def _other(tool: str, published: Path, path: Path, images: list[NDArray[np.float32]]) -> None:
    """A quantizer with packages of its own, in a process of its own."""
    if not PACKAGES.is_dir():
        raise RuntimeError("not installed: make bench PEERS=all")
    with tempfile.TemporaryDirectory() as folder:
        pixels, target = Path(folder) / "images.npy", Path(folder) / path.name
        source = Path(folder) / published.name  # Model-Optimizer writes into what it is given
        source.write_bytes(published.read_bytes())
        np.save(pixels, np.concatenate(images))
        script = str(Path(__file__).with_name("peer_quantizers.py"))
        done = subprocess.run(
            [sys.executable, script, tool, str(source), str(pixels), str(target)],
            env={**os.environ, "PYTHONPATH": str(PACKAGES)},
            cwd=folder,  # they leave files of their own there
            capture_output=True,
            text=True,
        )
        if done.returncode:
            stopped = f"{tool} was stopped: exit code {done.returncode}"
            raise RuntimeError(done.stderr if done.returncode == 1 else stopped)
        with atomic_file(path) as temporary:
            temporary.write_bytes(target.read_bytes())


def _nncf(
    source: Path, path: Path, images: list[NDArray[np.float32]], model_type: str | None
) -> None:
    nncf = load_nncf()
    with silent():
        model = openvino_core().read_model(source)
        quantized = nncf.quantize(
            model,
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=model_type and nncf.ModelType(model_type),
            subset_size=len(images),
        )
    save_openvino(quantized, path)
