"""Classify pictures with an exported OpenVINO file: python classify_openvino.py int8.xml IMAGE...

Needs openvino, numpy and Pillow; classes and preprocessing stand in the file. Copy it freely.
"""

import json
import re
import sys

import numpy as np
import openvino
from PIL import Image, ImageOps

model, *pictures = sys.argv[1:]
network = openvino.Core().read_model(model)
about = network.get_rt_info("care_compress").value
if "needs" in about and not re.search("vnni|amx_int8|asimddp", open("/proc/cpuinfo").read()):
    sys.exit(f"{model} needs {about['needs']}, which this processor does not have")
compiled = openvino.compile_model(network, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
classes, prepare = json.loads(about["classes"]), json.loads(about["preprocessing"])
mean, std, side = np.float32(prepare["mean"]), np.float32(prepare["std"]), prepare["resolution"]

for picture in pictures:
    image = Image.open(picture)
    image = (ImageOps.exif_transpose(image) if prepare["exif_rotate"] else image).convert("RGB")
    size = [int(prepare["resize"] * edge / min(image.size)) for edge in image.size]
    left, top = (round((edge - side) / 2) for edge in size)
    image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    images = np.asarray(image)[None]
    if network.input(0).element_type != openvino.Type.u8:  # which it normalizes itself
        images = ((np.float32(images) / 255 - mean) / std).transpose(0, 3, 1, 2)
    (logits,) = compiled(np.ascontiguousarray(images))["logits"]
    odds = np.exp(logits - logits.max())
    print(f"{picture}: {classes[odds.argmax()]} ({odds.max() / odds.sum():.1%})")
