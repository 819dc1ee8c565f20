"""Detect objects with an exported OpenVINO file: python detect_openvino.py int8.xml IMAGE...

Needs openvino, numpy and Pillow; classes and preprocessing stand in the file. Copy it freely.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import openvino
from PIL import Image, ImageDraw, ImageOps

model, *pictures = sys.argv[1:]
network = openvino.Core().read_model(model)
about = network.get_rt_info("care_compress").value
if "task" not in about or about["task"] != "detection":
    sys.exit(f"{model} is no detection network")
if "needs" in about and not re.search("vnni|amx_int8|asimddp", open("/proc/cpuinfo").read()):
    sys.exit(f"{model} needs {about['needs']}, which this processor does not have")
compiled = openvino.compile_model(network, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
classes, prepare = json.loads(about["classes"]), json.loads(about["preprocessing"])
takes_bytes = network.input(0).element_type == openvino.Type.u8
mean, std, side = np.float32(prepare["mean"]), np.float32(prepare["std"]), prepare["resolution"]

for picture in pictures:
    image = Image.open(picture)
    image = (ImageOps.exif_transpose(image) if prepare["exif_rotate"] else image).convert("RGB")
    # The longer side fills the square, the other one is centred between grey bars.
    width, height = (max(1, round(edge * side / max(image.size))) for edge in image.size)
    left, top = (side - width) // 2, (side - height) // 2
    square = Image.new("RGB", (side, side), (114, 114, 114))
    square.paste(image.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    images = np.asarray(square)[None]
    if not takes_bytes:  # else it normalizes them itself
        images = ((np.float32(images) / 255 - mean) / std).transpose(0, 3, 1, 2)
    (output,) = compiled(np.ascontiguousarray(images))["logits"]
    scores = 1 / (1 + np.exp(-output[4:]))  # of each class at each place
    shift, scale = (left, top) * 2, np.divide((width, height), image.size).tolist() * 2
    corners = ((output[:4].T * side - shift) / scale).clip(0, image.size * 2)
    found, draw = [], ImageDraw.Draw(image)
    kinds, places = np.nonzero(scores >= 0.25)
    for i in np.argsort(-scores[kinds, places]):  # the surest first, which removes its like
        kind, (x1, y1, x2, y2) = kinds[i], corners[places[i]]
        area, like = (x2 - x1) * (y2 - y1), [box for k, box in found if k == kind]
        shared = [
            max(0, min(x2, c) - max(x1, a)) * max(0, min(y2, d) - max(y1, b)) for a, b, c, d in like
        ]
        unions = [
            area + (c - a) * (d - b) - s for s, (a, b, c, d) in zip(shared, like, strict=True)
        ]
        if area == 0 or any(s > 0.6 * u for s, u in zip(shared, unions, strict=True)):
            continue
        found.append((kind, (x1, y1, x2, y2)))
        name = f"{classes[kind]} {scores[kind, places[i]]:.2f}"
        print(f"{picture}: {name} at {x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}")
        draw.rectangle((x1, y1, x2, y2), outline="orange", width=2)
        draw.text((x1 + 3, y1 + 1), name, fill="orange")
    image.save(f"{Path(picture).stem}-boxes.png")
