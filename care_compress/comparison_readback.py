"""The files of a comparison read back on this processor, each beside what its model answers.

What the model answers lies beside the file since its export (`answers_beside`), so neither the
checkpoint nor the placement a target asked for then is needed again.
"""

import numpy as np
import torch
from rich.console import Console

from care_compress.comparison import BF16, Comparison, Entry
from care_compress.contenders import Contender
from care_compress.data.loader import BadImages
from care_compress.data.samples import Samples
from care_compress.evaluate.exports import answers_beside, what_failed
from care_compress.evaluate.images import HeldImages, hold_images
from care_compress.evaluate.readback import ReadBack, counted_only, read_back, read_back_findings
from care_compress.finished import as_written
from care_compress.progress import step_line
from care_compress.runtime.opening import open_predictor
from care_compress.sections import DataSection

BARE = "a file without a run says nothing of the model it was made from"
OTHER_IMAGES = "its export was checked on other images; make quantize exports it again"


def read_files_back(
    found: Comparison, data: DataSection, samples: Samples, console: Console
) -> None:
    """Fill `found` with what each file does here, and the findings that follow."""
    held: dict[int, HeldImages] = {}
    unread: dict[str, str] = {}
    with step_line(console) as notify:
        for entry in found.entries:
            if entry.name.endswith(BF16):  # the same file once more
                continue
            one = found.model(entry.name)
            if one.run is None or one.recipe is None:
                unread[entry.key] = BARE
                continue
            notify(f"reading back {entry.key}")
            with as_written(entry.path.parent):
                expected = _answers(one, entry)
                if expected is None:
                    found.read_backs[entry.key] = _by_count(found, one, entry)
                    continue
                count = one.recipe.export.images
                if count not in held:
                    held[count] = hold_images(samples, data, count, BadImages())
                same_list = one.results["data"]["fingerprint"] == samples.fingerprint()
                if not same_list or len(held[count].labels) != len(expected):
                    unread[entry.key] = OTHER_IMAGES
                    continue
                found.read_backs[entry.key] = _beside_answers(one, entry, expected, held[count])
    found.failed = _failed(found)
    found.findings += read_back_findings(found.read_backs, found.failed, unread)


def _answers(one: Contender, entry: Entry) -> torch.Tensor | None:
    """What the model of a file answers; None of an export by an earlier version."""
    assert one.recipe is not None
    path = answers_beside(entry.path, one.recipe.precision)
    return torch.from_numpy(np.load(path, allow_pickle=False)) if path.is_file() else None


def _beside_answers(
    one: Contender, entry: Entry, expected: torch.Tensor, images: HeldImages
) -> ReadBack:
    """On the images of the export, floats in float32 as the export had them on a CPU."""
    assert one.recipe is not None
    precision = "f32" if entry.device == "CPU" else entry.precision
    predict = open_predictor(
        str(entry.path), torch.device("cpu"), precision=precision, plugin=entry.device
    )
    export = one.results["exports"][entry.target]
    least_db = float(export["models"][one.recipe.precision]["least_sqnr_db"])
    return read_back(expected, images.logits(predict), images.labels, least_db)


def _by_count(found: Comparison, one: Contender, entry: Entry) -> ReadBack:
    """Top-1 here beside the model's, as the run counted it."""
    answers, counted = found.collected.answers[entry.key], one.results["accuracy"]
    return counted_only(answers.top1, len(answers.right), counted["top1"], counted["images"])


def _failed(found: Comparison) -> dict[str, str]:
    """Exports that failed where they were made, of every target that is compared, by its file."""
    failed = {}
    for one in found.models:
        if one.run is None or one.recipe is None:
            continue
        with as_written(one.run / "results.json"):
            exports = one.results.get("exports", {})
            for target in found.targets:
                export = exports.get(target, {})
                for why in what_failed(export, one.recipe.precision).values():
                    written = "" if "failed" in export else "its file failed where it was made: "
                    failed[f"{target}/{one.name}"] = f"{written}{why}"
    return failed
