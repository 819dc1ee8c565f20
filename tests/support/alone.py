"""A bundle's script where nothing of ours can be imported."""

import subprocess
import sys
from pathlib import Path

# Nor what this environment has besides.
ALONE = """
import runpy, sys
for name in ("torch", "onnx", "pydantic"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    ours = [one.__file__ for name, one in sys.modules.items() if name.startswith("care_compress")]
    assert ours and all(path.startswith("care_deploy.py") for path in ours), ours
"""


def alone(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, started in the bundle's folder."""
    command = [sys.executable, "-I", "-c", ALONE, "care_deploy.py", *arguments]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True)
