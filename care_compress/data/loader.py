"""Batches of pixels in a fixed order, decoded by worker processes.

The order and the pixels depend on the seed and the step alone: any number of workers gives the
same batches, any number of training processes the same global batches, and a resumed run goes on
where it stopped without loading what came before.
"""

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from care_compress.data.annotated_transforms import MovingTransform, evaluation_transform
from care_compress.data.annotations import Annotation, check_size, is_annotated
from care_compress.data.checks import Contents
from care_compress.data.samples import Samples
from care_compress.data.transforms import Key, Transform, normalize, upright
from care_compress.errors import BadImageError, CareError, DataError
from care_compress.machine import usable_cores
from care_compress.recipe.sections import DataSection

CPU = torch.device("cpu")
# Of the temporary folder: a socket's whole name has room for 107 bytes, and Python adds 33.
LONGEST_FOLDER = 74
MAX_WORKERS = 8  # when data.workers is left out; more starve the process that feeds the network
BATCH_SIZES = {"cpu": 16, "cuda": 256}  # of an evaluation


class Batch(NamedTuple):
    """Some images: pixels, or what a network takes after `normalize`."""

    images: Tensor  # uint8 or normalised float, BCHW, channels_last
    labels: Tensor  # int64 B
    indices: Tensor  # int64 B, positions in the samples
    # Of training in pixels of `images`, of evaluation in those of the stored images.
    annotations: tuple[Annotation, ...] = ()


@dataclass
class BadImages:
    """The images that ``data.skip_bad_images`` left out: name to what is wrong with it."""

    reasons: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many different images were left out."""
        return len(self.reasons)


def worker_count(samples: Samples, data: DataSection) -> int:
    """How many decoding processes to start; 0 decodes in this one."""
    if data.workers is not None:
        return data.workers
    return 0 if samples.in_memory else min(len(usable_cores()), MAX_WORKERS)


def steps_per_epoch(samples: Samples, batch_size: int) -> int:
    """Full batches in one pass; the remainder is left out, another one in each epoch."""
    if len(samples) < batch_size:
        raise DataError(
            f"there are {len(samples)} training images, fewer than one batch of {batch_size}.",
            f"set the batch size to {len(samples)} or less",
        )
    return len(samples) // batch_size


def evaluation_batches(
    samples: Samples,
    transform: Transform,
    batch_size: int,
    data: DataSection,
    *,
    bad: BadImages,
    indices: Sequence[int] | None = None,
    contents: Contents | None = None,
) -> Generator[Batch]:
    """These images (all, if left out) in the given order; the last batch may be smaller.

    `contents` takes digests of them.
    """
    chosen = range(len(samples)) if indices is None else indices
    keys = (
        [(0, 0, index) for index in chosen[first : first + batch_size]]
        for first in range(0, len(chosen), batch_size)
    )
    with contextlib.closing(batches(samples, transform, keys, data, bad, contents)) as loaded:
        for batch in loaded:
            if len(batch.labels):  # a batch of bad images only has nothing to evaluate
                yield batch


def prepared_batches(
    samples: Samples,
    data: DataSection,
    batch_size: int,
    *,
    bad: BadImages,
    indices: Sequence[int] | None = None,
    device: torch.device = CPU,
    contents: Contents | None = None,
) -> Generator[Batch]:
    """`evaluation_batches` by the recipe's preprocessing, as the network takes them."""
    transform = evaluation_transform(samples, data)
    loaded = evaluation_batches(
        samples, transform, batch_size, data, bad=bad, indices=indices, contents=contents
    )
    with contextlib.closing(loaded):
        for batch in loaded:
            yield batch._replace(images=normalize(batch.images.to(device), data.mean, data.std))


def training_batches(
    samples: Samples,
    transform: Transform | MovingTransform,
    batch_size: int,
    data: DataSection,
    *,
    seed: int,
    start_step: int,
    total_steps: int,
    bad: BadImages,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch]:
    """The batches of steps `start_step` to `total_steps`, over as many epochs as that takes.

    `batch_size` counts the images of all processes together. The global batch of a step is the
    same for every `world_size`; process `rank` gets its contiguous slice of it.
    """
    per_epoch = steps_per_epoch(samples, batch_size)
    share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def shares() -> Iterator[list[Key]]:
        order: NDArray[np.int64] | None = None
        for step in range(start_step, total_steps):
            epoch, position = divmod(step, per_epoch)
            if order is None or position == 0:
                order = np.random.default_rng((seed, epoch)).permutation(len(samples))
            global_batch = order[position * batch_size : (position + 1) * batch_size]
            yield [(seed, epoch, index) for index in global_batch[share].tolist()]

    with contextlib.closing(batches(samples, transform, shares(), data, bad)) as loaded:
        for batch in loaded:
            if not len(batch.labels):
                raise DataError(
                    "a training batch holds nothing but images that cannot be decoded.",
                    "check data.source, or turn data.skip_bad_images off to see the first of them",
                )
            yield batch


def batches(
    samples: Samples,
    transform: Transform | MovingTransform,
    keys: Iterable[list[Key]],
    data: DataSection,
    bad: BadImages,
    contents: Contents | None = None,
) -> Generator[Batch]:
    """One batch for each list of (seed, epoch, index); closing the iterator ends the workers."""
    workers = worker_count(samples, data)
    # A worker that cannot open its socket there says so to nobody, and is waited for for ever.
    if workers and len(os.fsencode(folder := tempfile.gettempdir())) > LONGEST_FOLDER:
        raise DataError(
            f"decoding processes cannot talk through {folder}: the path is too long.",
            f"set TMPDIR to a folder of at most {LONGEST_FOLDER} letters, or data.workers to 0",
        )
    loader = DataLoader(
        _Decoding(samples, transform, data, contents is not None),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_as_is,
        # Without its own generator the loader would draw from, and so move, the global one.
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    with contextlib.ExitStack() as afterwards:
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            # Not left to garbage collection: a traceback could keep the workers for long.
            afterwards.callback(iterator._shutdown_workers)
            if threading.current_thread() is threading.main_thread():
                # For a dead worker torch's handler of SIGCHLD raises wherever the main thread
                # happens to be, in the middle of saving a checkpoint for example. Without it the
                # same death is found at the next batch.
                torch_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                afterwards.callback(signal.signal, signal.SIGCHLD, torch_handler)
        yield from _receive(iterator, bad, contents)


def _receive(
    iterator: _BaseDataLoaderIter, bad: BadImages, contents: Contents | None
) -> Iterator[Batch]:
    """What the workers decoded, or why they could not."""
    while True:
        try:
            decoded: _Decoded | CareError = next(iterator)
        except StopIteration:
            return
        # One that dies while it hands a batch over is seen at its socket.
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(
                f"a decoding process died: {str(error) or type(error).__name__}.",
                "memory or shared memory (/dev/shm) may have run out: lower data.workers",
            ) from None
        if isinstance(decoded, CareError):
            raise decoded
        bad.reasons.update(decoded.bad)
        if contents is not None:
            contents.add(decoded.batch.indices.tolist(), decoded.digests)
        yield decoded.batch


class _Decoded(NamedTuple):
    """What a worker sends back for one batch."""

    batch: Batch
    bad: dict[str, str]
    digests: list[int]  # of what the images are stored as; zeros where nobody wants them


class _Decoding(Dataset["_Decoded | CareError"]):
    """The work of a worker: a list of keys in, one batch out."""

    def __init__(
        self,
        samples: Samples,
        transform: Transform | MovingTransform,
        data: DataSection,
        hashing: bool,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.skip_bad = data.skip_bad_images
        self.exif_rotate = data.exif_rotate
        self.hashing = hashing

    def __getitems__(self, keys: list[Key]) -> "_Decoded | CareError":
        """The batch, or the error as a value: raised here, it would reach the user mangled."""
        rows: list[Tensor] = []
        indices: list[int] = []
        digests: list[int] = []
        annotations: list[Annotation] = []
        bad: dict[str, str] = {}
        for key in keys:
            index = key[2]
            try:
                if self.hashing:
                    image, digest = self.samples.hashed(index)
                else:
                    image, digest = self.samples.image(index), 0
                pixels, annotation = self._prepared(image, key)
            except BadImageError as error:
                if not self.skip_bad:
                    return error
                bad[self.samples.name(index)] = error.message
                continue
            except CareError as error:
                return error
            rows.append(pixels.permute(1, 2, 0))
            annotations += annotation
            indices.append(index)
            digests.append(digest)
        images = torch.empty((0, 3, 0, 0), dtype=torch.uint8)
        if rows:  # stacked as rows of pixels, in shared memory, so that nothing is transposed
            images = default_collate(rows).permute(0, 3, 1, 2)
        labels = torch.from_numpy(self.samples.labels[indices])
        batch = Batch(images, labels, torch.tensor(indices, dtype=torch.int64), tuple(annotations))
        return _Decoded(batch, bad, digests)

    def _prepared(self, image: Image.Image, key: Key) -> tuple[Tensor, list[Annotation]]:
        """The pixels, and the annotation of samples that have one."""
        if not is_annotated(self.samples):
            assert not isinstance(self.transform, MovingTransform), "nothing to move"
            return self.transform(image, key), []
        annotation = self.samples.annotation(key[2])
        size = (upright(image) if self.exif_rotate else image).size
        check_size(annotation, size, self.samples.name(key[2]))
        if isinstance(self.transform, MovingTransform):
            pixels, annotation = self.transform(image, annotation, key)
            return pixels, [annotation]
        return self.transform(image, key), [annotation]


def _as_is(decoded: Any) -> Any:
    """The collate function: `_Decoding` has already made the batch."""
    return decoded


def pixel_batches(
    samples: Samples, data: DataSection, indices: Sequence[int], size: int, bad: BadImages
) -> Generator[Batch]:
    """Pixels of these images, cut as the recipe says, in the order given."""
    transform = evaluation_transform(samples, data)
    return evaluation_batches(samples, transform, size, data, bad=bad, indices=indices)


def images_at_once(wanted: int | None, device: torch.device) -> int:
    """How many images a model looks at together; on a CPU so few that its caches hold them."""
    return wanted or BATCH_SIZES[device.type]
