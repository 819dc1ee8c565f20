"""OpenVINO leaves the process fit to live: a signal that is handled does not end it."""

import subprocess
import sys

import pytest

pytest.importorskip("openvino", reason="needs the openvino extra")

MODELS_THAT_GO = """
import gc, signal, subprocess
import numpy as np
from care_compress.libraries import load_openvino, openvino_core, signal_stack_kept

openvino = load_openvino()
from openvino import opset13

def compiled(core):
    images = opset13.parameter([1, 3], np.float32)
    model = openvino.Model([opset13.relu(images)], [images])
    return core.compile_model(model, "CPU")

def gone_in_the_order_they_came(core):
    first = compiled(core())
    second = compiled(core())
    del first
    gc.collect()
    del second
    gc.collect()

{use}
signal.signal(signal.SIGCHLD, lambda *about: None)  # as torch's DataLoader does
for _ in range(3):
    subprocess.run(["true"], check=True)
print("alive")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there it gives handlers a stack")
@pytest.mark.parametrize(
    "use",
    [
        "gone_in_the_order_they_came(openvino_core)",
        "with signal_stack_kept():\n    gone_in_the_order_they_came(openvino.Core)",
    ],
    ids=["one core", "cores of others"],
)
def test_a_child_that_ends_does_not_end_us(use: str) -> None:
    script = MODELS_THAT_GO.replace("{use}", use)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "alive", (done.returncode, done.stderr)
