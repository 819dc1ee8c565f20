"""Top-1 and top-5 of one artifact: a checkpoint, an .onnx, .xml or .engine file.

python eval/accuracy.py model.pth --data images.zip --res 96 --crop 1.0
"""

import sys

from checkout import use_checkout_environment

use_checkout_environment()

from care_compress.cli import main  # noqa: E402 (needs the environment)

if __name__ == "__main__":
    main(["accuracy", *sys.argv[1:]])
