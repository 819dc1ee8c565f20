"""A small network of every task with lifelike statistics, and data sets of a few images."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from care_compress.model.care import Care, build_model
from care_compress.tasks.known import TASKS

SIDE, CLASSES = 64, 7
PAINTS = ((200, 60, 60), (60, 160, 70))
NAMES = ("ball", "box")


def network_for(task: str, seed: int = 0) -> Care:
    """care_nano with random weights and norms, whose answers differ from place to place."""
    torch.manual_seed(seed)
    model = build_model("care_nano", CLASSES, kind=TASKS[task].kind)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.copy_(torch.exp(torch.randn(module.num_features)))
            module.weight.data.copy_(torch.exp(torch.randn(module.num_features) * 0.5))
            module.bias.data.normal_(0, 0.3)
    return model.eval()


def photos(count: int, seed: int = 1) -> Tensor:
    """Smooth noise, as the network takes it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=SIDE, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, SIDE, SIDE, generator=generator)


def painted(root: Path, task: str, train: int = 8, val: int = 6) -> Path:
    """A folder of images with one coloured rectangle each, wide ones and high ones."""
    rng, listed = np.random.default_rng(0), {"train": train, "val": val}
    for split, count in listed.items():
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        images, told = [], []
        for number in range(count):
            width, height = (96, 72) if number % 2 else (72, 96)
            pixels = rng.integers(90, 150, (height, width, 3)).astype(np.uint8)
            x, y, w, h = (int(one) for one in rng.integers((4, 4, 24, 24), (30, 30, 40, 40)))
            kind = number // 2 % 2
            pixels[y : y + h, x : x + w] = PAINTS[kind]
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
            mask = np.zeros((height, width), np.uint8)
            mask[y : y + h, x : x + w] = 1 + kind
            if task == "segmentation":
                Image.fromarray(mask).save(root / "annotations" / split / f"{number}.png")
            name = f"{number}.png"
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            box = {"image_id": number, "category_id": kind + 1, "bbox": [x, y, w, h]}
            told.append({**box, "iscrowd": 0, "id": number, "area": w * h})
        if task == "detection":
            categories = [{"id": place, "name": name} for place, name in enumerate(NAMES, 1)]
            content = {"images": images, "annotations": told, "categories": categories}
            path = root / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content))
            (root / "annotations" / split).rmdir()
    if task == "segmentation":
        (root / "classes.txt").write_text("\n".join(("ground", *NAMES)) + "\n")
    return root
