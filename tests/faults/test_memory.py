"""Memory does not grow with the images: peak resident sets of processes with few and with many.

What may grow is the list of the images: names, labels, places and digests, some hundred bytes for
each. A batch, an activation or a decoded image that were kept would cost three thousand and more.
"""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from quantized import care
from tiny import CLASSES

from care_compress.model.checkpoint import save_checkpoint

FEW, MANY = 2_000, 20_000
HELD = 4_000  # more than the 2,441 of this size that a correction works on at once
# Bytes that one image more may cost: an evaluation keeps its place in the list and a digest, a
# calibration its name and two digests too, which are written to JSON and read from it (2,200 to
# 2,900). A decoded image that was kept would come on top: 3,072 as bytes, 12,288 as floats.
EVALUATED, CALIBRATED = 500, 3_000
NOISE = 10_000_000  # bytes by which the peaks of two equal runs differ
LIMIT = 1_500_000_000  # of the largest, torch and its libraries included
# Runs a verb, then says what the process took at its peak, in bytes, and its largest child too.
MEASURED = """
import json, resource, sys
from care_compress.cli import main
code = 0
try:
    main(sys.argv[2:])
except SystemExit as ended:
    code = ended.code or 0
peaks = [resource.getrusage(who).ru_maxrss * 1024
         for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
open(sys.argv[1], "w").write(json.dumps(peaks))
sys.exit(code)
"""


def zipped(path: Path, train: int, val: int) -> Path:
    """Noise of 32x32, every image another one."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
                content = io.BytesIO()
                image.save(content, "BMP")
                archive.writestr(f"{split}/{CLASSES[i % 4]}/{i}.bmp", content.getvalue())
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "four.safetensors"
    save_checkpoint(care(4), path, {})
    return path


def peaks(folder: Path, *arguments: str) -> tuple[int, int]:
    """Of a process that runs this verb, and of the largest of its workers."""
    out = folder / "peaks.json"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(out), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    own, children = json.loads(out.read_text())
    return own, children


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_of_twenty_thousand_images(
    checkpoint: Path, tmp_path: Path, workers: int
) -> None:
    found = {}
    for count in (FEW, MANY):
        source = zipped(tmp_path / f"{count}.zip", 4, count)
        found[count] = peaks(
            tmp_path, "accuracy", str(checkpoint), "--data", str(source), "--res", "32",
            "--crop", "1.0", "--json", f"{count}.json", "--set", f"workers={workers}",
        )  # fmt: skip
        assert json.loads((tmp_path / f"{count}.json").read_text())["images"] == count
    for few, many in zip(found[FEW], found[MANY], strict=True):
        assert many - few < EVALUATED * (MANY - FEW) + NOISE, (few, many)
        assert many < LIMIT


def peak_of_ptq(
    folder: Path, checkpoint: Path, name: str, train: int, val: int, calibrated: int
) -> int:
    """Of a process that quantizes with so many images of each kind."""
    source = zipped(folder / f"{name}.zip", train, val)
    settings = [
        f"model.checkpoint={checkpoint}", f"data.source={source}", "data.resolution=32",
        "data.crop_pct=1.0", "data.workers=0", f"quantize.calibrate.images={calibrated}",
        "export.targets=[]",
    ]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    own, _ = peaks(folder, "quantize", "int8_ptq", "--runs", ".", "--name", name, *options)
    return own


def test_a_calibration_on_twenty_thousand_images(checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for count in (HELD, MANY):
        found[count] = peak_of_ptq(tmp_path, checkpoint, str(count), count, 64, count)
        listed = json.loads((tmp_path / str(count) / "calibration.json").read_text())
        assert len(listed["images"]) == count
    assert found[MANY] - found[HELD] < CALIBRATED * (MANY - HELD) + NOISE, found
    assert found[MANY] < LIMIT


def test_a_run_that_scores_twenty_thousand_images(checkpoint: Path, tmp_path: Path) -> None:
    """Both models on every image, their digests kept for the search for duplicates."""
    found = {}
    for count in (FEW, MANY):
        found[count] = peak_of_ptq(tmp_path, checkpoint, str(count), 64, count, 64)
        results = json.loads((tmp_path / str(count) / "results.json").read_text())
        assert results["accuracy"]["images"] == count
        (checked,) = [c for c in results["checks"] if c["check"].endswith("in validation")]
        assert f"no two of {count:,}" in checked["text"]
    assert found[MANY] - found[FEW] < EVALUATED * (MANY - FEW) + NOISE, found
    assert found[MANY] < LIMIT
