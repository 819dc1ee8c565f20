"""Predictions by an ONNX file through ONNX Runtime."""

from pathlib import Path

import onnxruntime
from torch import Tensor

from care_compress.errors import TargetError
from care_compress.model.predictor import (
    NOT_CLASSES,
    RANKS,
    TASK,
    answers,
    as_answers,
    failed,
    in_slices,
)
from care_compress.recipe.target import NEEDS
from care_compress.runtime.dot_products import check_needs
from care_compress.runtime.feed import PREPROCESSING, Feed, feed_for


def open_session(
    path: Path,
    content: bytes | None = None,
    threads: int | None = None,
    profile: str | None = None,
) -> onnxruntime.InferenceSession:
    """A file, or what was made of it, on the CPU; warnings of the optimizer stay inside.

    Raises TargetError for a file that needs what this processor does not have. `profile` is the
    beginning of the name of a file that takes the times of every node.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    model = str(path) if content is None else content
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    needs = session.get_modelmeta().custom_metadata_map.get(NEEDS)
    check_needs(path, needs, "onnxruntime")
    return session


def feed_of(session: onnxruntime.InferenceSession, path: Path) -> Feed:
    """How the images of an opened file are given to it."""
    image = session.get_inputs()[0]
    said = session.get_modelmeta().custom_metadata_map.get(PREPROCESSING)
    return feed_for(path, image.type == "tensor(uint8)", image.shape, said)


class OnnxPredictor:
    """Runs an ONNX file with one image input and one output on the CPU."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            self.session = open_session(path, threads=threads)
        except TargetError:
            raise
        # onnxruntime raises a class of its own per status code, all straight below Exception.
        except Exception as error:
            reason = str(error).splitlines()[0][:200]
            raise TargetError(
                f"{path} is no ONNX model that ONNX Runtime can run: {reason}.", "export it again"
            ) from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        single = len(inputs) == 1 and len(outputs) == 1
        self.task = answers(self.session.get_modelmeta().custom_metadata_map.get(TASK))
        rank = len(outputs[0].shape)
        if not single or len(inputs[0].shape) != 4 or rank != RANKS[self.task]:
            told = ", ".join(str(one.shape) for one in (*inputs, *outputs)[:4])
            raise TargetError(
                f"{path} has {len(inputs)} inputs and {len(outputs)} outputs ({told}).",
                "give a classifier with one (B, 3, H, W) input and one (B, K) output of logits",
            )
        self.path = path
        self.input, self.feed = inputs[0], feed_of(self.session, path)
        rows = outputs[0].shape[1]
        if not isinstance(rows, int):
            raise TargetError(f"{path} does not state its number of classes.", "export it again")
        self.rows, self.rank = rows, rank
        self.num_classes = rows - NOT_CLASSES.get(self.task, 0)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Answers (B, ...); a model of fixed batch size is fed slice by slice."""
        batch, _, *wanted = self.feed.as_images(self.input.shape)
        given = list(images_BCHW.shape[2:])
        if any(isinstance(w, int) and w != g for w, g in zip(wanted, given, strict=True)):
            raise TargetError(
                f"{self.path} wants {wanted[0]}x{wanted[1]} images, these are "
                f"{given[0]}x{given[1]}.",
                "set data.resolution to the model's, or export it with a free size",
            )

        def run(part_BCHW: Tensor) -> Tensor:
            feed = {self.input.name: self.feed(part_BCHW)}
            try:
                (logits,) = self.session.run(None, feed)
            except Exception as error:  # as above
                raise failed(self.path, error) from error
            return as_answers(logits, part_BCHW, self.rows, self.rank, self.path)

        return in_slices(run, images_BCHW, batch if isinstance(batch, int) else None)
