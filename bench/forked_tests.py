"""Runs of pytest from one process that has loaded the libraries (for ``mutants.py``).

torch and what belongs to it take longer to load than most tests to run. This process loads them
once. For each line of JSON, arguments of pytest and a limit in seconds, it forks a child, which
reads our code as it is then; the answer is a line, too: the exit status, None if it took longer,
and what was printed.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

# Whatever takes a tenth of a second or more and starts no threads.
LIBRARIES = (
    "torch.onnx",
    "torchao.quantization.pt2e.quantize_pt2e",
    "onnxscript.optimizer",
    "onnxruntime",
    "openvino",
    "scipy.optimize",
    "jsonschema",
    "hypothesis",
    "PIL.Image",
)


def run(arguments: Sequence[str], said: IO[bytes]) -> None:
    """Be the child: a session of its own, so that all it starts ends with it."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    sys.exit(pytest.main([*arguments]))


def main() -> None:
    """Answer every line until there are no more."""
    # What libraries print while they load is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.path.remove(str(Path(__file__).parent))  # a test finds what pytest's settings name
    for line in sys.stdin:
        arguments, limit = json.loads(line)
        with tempfile.TemporaryFile() as said, tempfile.TemporaryDirectory() as folder:
            whole = [*arguments, f"--basetemp={folder}/pytest"]
            child = multiprocessing.get_context("fork").Process(target=run, args=(whole, said))
            child.start()
            child.join(limit)
            status = child.exitcode
            if status is None:
                assert child.pid is not None
                os.killpg(child.pid, signal.SIGKILL)
                child.join()
            said.seek(0)
            text = said.read().decode(errors="replace")
        print(json.dumps([status, text]), file=answers, flush=True)


if __name__ == "__main__":
    main()
