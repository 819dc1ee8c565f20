"""Segment pictures with an exported OpenVINO file: python segment_openvino.py int8.xml IMAGE...

Needs openvino, numpy and Pillow; classes and preprocessing stand in the file. Copy it freely.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import openvino
from PIL import Image, ImageOps

model, *pictures = sys.argv[1:]
network = openvino.Core().read_model(model)
about = network.get_rt_info("care_compress").value
if "task" not in about or about["task"] != "segmentation":
    sys.exit(f"{model} is no segmentation network")
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
    (logits,) = compiled(np.ascontiguousarray(images))["logits"]
    window = (left, top, left + width, top + height)
    whole = []
    for one in logits:  # a class at a time: enlarged to the square, cut, brought to the image
        part = Image.fromarray(one).resize((side, side), Image.Resampling.BILINEAR).crop(window)
        whole.append(np.asarray(part.resize(image.size, Image.Resampling.BILINEAR)))
    mask = np.argmax(whole, axis=0)
    hues = np.random.default_rng(1).integers(40, 256, (len(classes), 3))
    drawn = Image.blend(image, Image.fromarray(np.uint8(hues[mask])), 0.5)
    drawn.save(f"{Path(picture).stem}-mask.png")
    for k in np.argsort(-np.bincount(mask.ravel(), minlength=len(classes))):
        if (mask == k).any():
            print(f"{picture}: {classes[k]} ({(mask == k).mean():.1%})")
