"""Everything that runs on the device that executes an engine: build, verify, measure, classify.

A Jetson has Python 3.10, numpy and TensorRT, and neither torch nor pip. So these modules use
nothing else and nothing from the rest of care_compress; `care_compress.export.stitch` joins them
into the one file, `care_deploy.py`, that travels in a bundle. The product uses them in place.
"""
