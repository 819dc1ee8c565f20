"""Files that somebody else wrote: read only if they are files, and only so much of them.

A pipe under a file's name would be waited on for ever, ``/dev/zero`` has no end, and a sparse file
of terabytes costs its author nothing.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

MOST_JSON = 1 << 28  # bytes; the evidence of the largest run is some thousandth of it


def read_whole(path: str | bytes | Path, most: int) -> bytes:
    """All bytes of a regular file; `OSError` where it is none or holds more than `most`."""
    # Without O_NONBLOCK a pipe is waited on before it can be asked what it is.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("it is no regular file")
        if state.st_size > most:
            raise OSError(f"it has {state.st_size:,} bytes, more than {most:,}")
        return file.read()


def read_text(path: Path, most: int) -> str:
    """All of a UTF-8 file; `OSError` or `ValueError` where it cannot be read."""
    return read_whole(path, most).decode("utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file; `OSError` or `ValueError` where there is none to be read."""
    try:
        return json.loads(read_text(path, MOST_JSON))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
