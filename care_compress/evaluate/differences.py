"""Pictures of what changed: an image, the first model's answer to it and the last one's.

Only of tasks that draw their answers. They lie beside compare.json, which names each with its
digest: a picture of another comparison is not taken for one of this.
"""

import contextlib
from collections.abc import Iterator

import torch
from PIL import Image
from rich.console import Console

from care_compress.console import step_line
from care_compress.data.loader import CPU, BadImages, prepared_batches
from care_compress.data.transforms import to_rgb, upright
from care_compress.evaluate.comparison import Comparison
from care_compress.files import atomic_file, sha256_file
from care_compress.runtime.artifact import open_predictor
from care_compress.tasks.task import Drawn

SHOWN = 6  # images, the most changed first
FOLDER = "differences"
EDGE = 640  # pixels of a picture's longer side: what a phone shows, twice
KINDS = ("image", "before", "after")


def draw_differences(found: Comparison, console: Console) -> None:
    """Draw the images that differ most between the first model and the last, on one target.

    That is the target where the fewest answers are the same, and the last model has to be a run:
    the pictures lie in it.
    """
    run, names = found.models[-1].run, (found.baseline.name, found.models[-1].name)
    shares = {target: found.agreement(target, names[1]) for target in found.targets}
    known = {target: share for target, share in shares.items() if share is not None}
    if run is None or not known:
        return
    target = min(known, key=lambda target: known[target])
    pair = found.pair(target, names[1])
    assert pair is not None
    details = pair[0].details(pair[1], names, found.collected, found.samples.classes)
    worst = details.get("changed", [])[:SHOWN]
    with step_line(console) as notify:
        notify(f"drawing what changed on {target}")
        drawn = list(_drawn(found, target, names, [one["index"] for one in worst]))
    for path in (run / FOLDER).glob("*.png"):  # of an earlier comparison
        path.unlink()
    if not drawn:
        return
    (run / FOLDER).mkdir(exist_ok=True)
    images = []
    for number, (one, pictures) in enumerate(zip(worst, drawn, strict=True), start=1):
        written = {}
        for kind, picture in zip(KINDS, pictures, strict=True):
            path = run / FOLDER / f"{number}-{kind}.png"
            picture.picture.thumbnail((EDGE, EDGE))
            with atomic_file(path) as beside:
                picture.picture.save(beside, "PNG")
            written[kind] = {"file": f"{FOLDER}/{path.name}", "sha256": sha256_file(path)}
        images.append({"name": found.samples.name(one["index"]), **one, "pictures": written})
    legend = {name: colour for of in drawn for one in of for name, colour in one.legend.items()}
    found.pictures = {
        "target": target,
        "baseline": names[0],
        "candidate": names[1],
        "legend": {
            name: f"#{bytes(legend[name]).hex()}"
            for name in found.samples.classes
            if name in legend
        },
        "images": images,
    }


@torch.inference_mode()
def _drawn(
    found: Comparison, target: str, names: tuple[str, str], indices: list[int]
) -> Iterator[tuple[Drawn, Drawn, Drawn]]:
    """Yield an image and both answers to it; nothing where the task draws none."""
    predictors = []
    for name in names:
        entry = found.entry(target, name)
        assert entry is not None  # it was scored
        predictors.append(
            open_predictor(str(entry.path), CPU, precision=entry.precision, plugin=entry.device)
        )
    data, samples = found.data.model_copy(update={"workers": 0}), found.samples
    batches = prepared_batches(samples, data, 1, bad=BadImages(), indices=indices)
    with contextlib.closing(batches):
        for batch in batches:
            image = samples.image(int(batch.indices[0]))
            image = to_rgb(upright(image) if data.exif_rotate else image)
            before, after = (
                found.task.draw(
                    image, predict(batch.images)[0].float().cpu(), data.resolution, samples.classes
                )
                for predict in predictors
            )
            if before is not None and after is not None:
                # Drawings of a small image are enlarged.
                same = image.resize(before.picture.size, Image.Resampling.NEAREST)
                yield Drawn(same, {}), before, after
