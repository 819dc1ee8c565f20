"""One thread per process: the tests' networks are so small that threads would only wait."""

import os

import pytest
import torch

from care_compress.libraries import keep_freed_memory

keep_freed_memory()
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes the tests start
torch.set_num_threads(1)

# They begin first: of files that go to a process as a whole, a long one at the end leaves the other
# process without work.
LONGEST = {
    "test_pipeline.py",
    "test_compare.py",
    "test_export_stage.py",
    "test_wheel.py",
    "test_sensitivity.py",
    "test_api.py",
    "test_nncf.py",
    "test_weight_range.py",
    "test_qat.py",
    "test_stage.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, all else in its order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
