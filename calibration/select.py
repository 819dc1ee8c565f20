"""Choose calibration images and write them down as name and sha256.

python calibration/select.py int8_ptq mine.json --method diverse --data /data/imagenet --res 224
"""

import sys
from pathlib import Path

# This folder must leave the path: in it, `import select` of the standard library finds this file.
sys.path[0] = str(Path(__file__).resolve().parent.parent / "eval")

from checkout import use_checkout_environment  # noqa: E402

use_checkout_environment()

from care_compress.cli import main  # noqa: E402 (needs the environment)

if __name__ == "__main__":
    main(["select", *sys.argv[1:]])
