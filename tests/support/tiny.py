"""A learnable image folder small enough for a unit test, and recipes that train on it."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from care_compress.recipe.sections import DataSection

CLASSES = ("blue", "green", "grey", "red")
COLOURS = {
    "blue": (60, 80, 200),
    "green": (60, 190, 80),
    "grey": (128, 128, 128),
    "red": (200, 70, 60),
}


def image_folder(root: Path, per_class: int = 24) -> Path:
    """Noisy colour patches under train/<class>/ and val/<class>/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", per_class), ("val", per_class // 2)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-60, 60, (32, 32, 3))
                pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def with_a_broken_image(root: Path) -> DataSection:
    """The same 48 validation images but for one, which is none and is left out."""
    folder = image_folder(root)
    (folder / "val" / "green" / "3.png").write_bytes(b"no image")
    return DataSection(
        source=str(folder), resolution=32, crop_pct=1.0, workers=0, skip_bad_images=True
    )


def recipe_file(folder: Path, data: Path, workers: int = 0, **train: object) -> Path:
    """A recipe that trains care_nano on `data` at 32x32."""
    plan = {
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "warmup_epochs": 0.5,
        "ema_decay": 0.9,
        "checkpoint_steps": 2,
        "augment": {"scale": [0.5, 1.0]},
        **train,
    }
    recipe = {
        "claim": "a test",
        "model": {"arch": "care_nano"},
        "data": {"source": str(data), "resolution": 32, "crop_pct": 1.0, "workers": workers},
        "train": plan,
        "export": {"targets": []},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
