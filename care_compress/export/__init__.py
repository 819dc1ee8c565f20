"""From a quantized model to what a runtime loads: ONNX, engines, and the bundle for a board."""
