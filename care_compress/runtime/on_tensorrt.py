"""Predictions by a TensorRT engine, on the GPU it was built for."""

from pathlib import Path

import onnx
import torch
from torch import Tensor

from care_compress.device.deploy import REAL_HOST, Host
from care_compress.device.enginefile import origin_path, read_engine
from care_compress.device.problems import DeployError
from care_compress.device.session import Session
from care_compress.errors import TargetError
from care_compress.files import read_json, sha256_file
from care_compress.model.predictor import NOT_CLASSES, TASK, answers
from care_compress.runtime.feed import PREPROCESSING, feed_for


class EnginePredictor:
    """Runs an engine beside whose graph and description it lies, as the export leaves them."""

    def __init__(self, path: Path, host: Host = REAL_HOST) -> None:
        graph, about = path.with_suffix(".onnx"), origin_path(path)
        if not graph.is_file() or not about.is_file():
            raise TargetError(
                f"{path} has no {graph.name} and {about.name} beside it to be checked by.",
                "keep the files of an export together",
            )
        try:
            name = str(read_json(about)["library"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TargetError(
                f"{about} is unreadable: {error!r}.", "build the engine again"
            ) from error
        try:
            library = host.load_library(name)
            cuda = host.load_cuda()
            plan, description = read_engine(path, library, cuda.gpu(), sha256_file(graph))
            stripped = graph if description.get("stripped") else None
            self.session = Session(library, cuda, plan, stripped)
        except DeployError as error:
            raise TargetError(error.message, error.fix) from error
        metadata = onnx.load(graph, load_external_data=False).metadata_props
        said = {one.key: one.value for one in metadata}
        self.task = answers(said.get(TASK))
        self.num_classes = self.session.classes - NOT_CLASSES.get(self.task, 0)
        preparing = said.get(PREPROCESSING)
        self.feed = feed_for(path, self.session.takes_bytes, self.session.shape, preparing)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        return torch.from_numpy(self.session.run(self.feed(images_BCHW))).to(images_BCHW.device)
