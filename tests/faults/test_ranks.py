"""Several processes of one training: what any of them had to leave out is counted."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import image_folder, recipe_file


def test_images_that_other_processes_skipped_are_counted_too(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    broken = [folder / "train" / name / "5.png" for name in ("blue", "green", "grey", "red")]
    for path in broken:
        path.write_bytes(b"broken")
    # One epoch: each image is decoded by one process alone.
    recipe = recipe_file(tmp_path, folder, epochs=1, warmup_epochs=0)
    several = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    skipped = {}
    for name, launcher in (("one", []), ("two", several)):
        subprocess.run(
            [
                sys.executable, *launcher, "-m", "care_compress", "quantize", str(recipe),
                "--skip-bad-images", "--runs", str(tmp_path), "--name", name,
            ],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        results = json.loads((tmp_path / name / "results.json").read_text())
        skipped[name] = results["data"]["skipped_images"]
    assert skipped["two"] == skipped["one"] and len(skipped["one"]) == len(broken)
