"""Everything that runs on a device: build, verify, measure, answer.

A Jetson has Python 3.10, numpy and TensorRT, and neither torch nor pip; any other box has numpy and
ONNX Runtime or OpenVINO. So these modules use nothing else and nothing from the rest of
care_compress; `care_compress.export.bundle` zips them into the one file, `care_deploy.py`, that
travels in a bundle: those that `app` needs for TensorRT, those that `cpu_app` needs for a CPU. The
product uses them in place.
"""
