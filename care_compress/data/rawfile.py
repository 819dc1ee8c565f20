"""Parts of large files, read by position."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# No image that Pillow would decode takes more; what claims to would fill the memory.
MOST_BYTES = 1 << 29


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor for one read: forked workers share no file, and none stay open."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def read_at(file: int, offset: int, size: int) -> bytes:
    """Exactly `size` bytes from `offset`; archives lie about both."""
    if offset < 0 or not 0 <= size <= MOST_BYTES:
        raise OSError(f"{size:,} bytes at {offset:,} cannot be read")
    content = os.pread(file, size, offset)
    if len(content) != size:
        raise OSError(f"the file ends before byte {offset + size}")
    return content
