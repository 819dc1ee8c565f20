"""Classify pictures with an exported ONNX file: python classify_onnxruntime.py int8.onnx IMAGE...

Needs onnxruntime, numpy and Pillow; classes and preprocessing stand in the file. Copy it freely.
"""

import json
import re
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, *pictures = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
needs = about.get("care_compress.needs")
if needs and not re.search("vnni|amx_int8|asimddp", open("/proc/cpuinfo").read()):
    sys.exit(f"{model} needs {needs}, which this processor does not have")
classes, prepare = (json.loads(about[f"care_compress.{k}"]) for k in ("classes", "preprocessing"))
mean, std, side = np.float32(prepare["mean"]), np.float32(prepare["std"]), prepare["resolution"]

for picture in pictures:
    image = Image.open(picture)
    image = (ImageOps.exif_transpose(image) if prepare["exif_rotate"] else image).convert("RGB")
    size = [int(prepare["resize"] * edge / min(image.size)) for edge in image.size]
    left, top = (round((edge - side) / 2) for edge in size)
    image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    images = np.asarray(image)[None]
    if session.get_inputs()[0].type != "tensor(uint8)":  # which it normalizes itself
        images = ((np.float32(images) / 255 - mean) / std).transpose(0, 3, 1, 2)
    (logits,) = session.run(None, {"images": images})[0]
    odds = np.exp(logits - logits.max())
    print(f"{picture}: {classes[odds.argmax()]} ({odds.max() / odds.sum():.1%})")
