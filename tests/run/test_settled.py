"""How every run sets the libraries below torch."""

import os
import platform
import subprocess
import sys

import pytest

BATCHES = """
import os, resource
import numpy as np
from care_compress.libraries import settle_libraries

settle_libraries()

def taken_anew():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batch = [np.ones(4 << 20, np.float32) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

taken_anew()
print(taken_anew(), os.environ["GOMP_SPINCOUNT"])
"""


def said_by(**settings: str) -> tuple[int, str]:
    """The pages that a second batch of 128 MB takes from the system, and what OpenMP is told."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", BATCHES], env=kept | settings, capture_output=True, check=True
    )
    pages, spins = done.stdout.decode().split()
    return int(pages), spins


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have no such settings")
def test_memory_of_a_batch_is_used_again_and_threads_do_not_spin() -> None:
    pages, spins = said_by()
    assert pages < 100, "anew they are thousands, however large the system makes them"
    assert spins == "3000"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have no such settings")
def test_what_the_user_set_stays() -> None:
    pages, spins = said_by(MALLOC_TRIM_THRESHOLD_="65536", GOMP_SPINCOUNT="7")
    assert pages > 1000 and spins == "7"
