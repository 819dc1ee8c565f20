"""Accuracy and latency of models side by side, on every target that can run here, and a verdict.

python eval/compare.py fp32 int8
"""

import sys
from pathlib import Path

from checkout import use_checkout_environment

use_checkout_environment()

from care_compress.cli import main  # noqa: E402 (needs the environment)

if __name__ == "__main__":
    given = sys.argv[1:]
    if "--runs" not in given:  # works from any directory
        given += ["--runs", str(Path(__file__).resolve().parent.parent / "runs")]
    main(["compare", *given])
