"""Quantization: plan, calibrate, tune, reconstruct, train; pure maths apart from modules."""

from care_compress.libraries import quiet

with quiet():  # torchao lists the GPU kernels it could not load, also where there is no GPU
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401
