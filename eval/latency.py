"""Latency, throughput, load time, memory and size of one artifact, and the state of the machine.

python eval/latency.py runs/int8_qat/exports/openvino-cpu/int8.xml
"""

import sys

from checkout import use_checkout_environment

use_checkout_environment()

from care_compress.cli import main  # noqa: E402 (needs the environment)

if __name__ == "__main__":
    main(["latency", *sys.argv[1:]])
