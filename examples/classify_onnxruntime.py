"""Classify pictures with an exported ONNX file: python classify_onnxruntime.py int8.onnx IMAGE...

Needs onnxruntime, numpy and Pillow; classes and preprocessing stand in the file. Copy it freely.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, *pictures = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
classes = json.loads(about["care_compress.classes"])
prepare = json.loads(about["care_compress.preprocessing"])
mean, std = np.float32(prepare["mean"]), np.float32(prepare["std"])
resize, side = prepare["resize"], prepare["resolution"]

for picture in pictures:
    image = Image.open(picture)
    image = (ImageOps.exif_transpose(image) if prepare["exif_rotate"] else image).convert("RGB")
    size = [int(resize * edge / min(image.size)) for edge in image.size]
    left, top = (round((edge - side) / 2) for edge in size)
    image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels_HWC = (np.asarray(image, np.float32) / 255 - mean) / std
    (logits,) = session.run(None, {"images": pixels_HWC.transpose(2, 0, 1)[None]})[0]
    odds = np.exp(logits - logits.max())
    best = int(odds.argmax())
    print(f"{picture}: {classes[best]} ({odds[best] / odds.sum():.1%})")
