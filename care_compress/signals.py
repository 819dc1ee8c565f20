"""How a verb ends when it is told to stop, or when the disk takes no more: in one line, in order.

Ctrl-C and SIGTERM (what `kill`, a container and a batch system send) become an exception, so every
`finally` on the way out ends its workers and removes its temporary files. A second one kills.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

from care_compress.errors import RunError, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_MORE_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def stops_in_order(console: Console) -> Iterator[None]:
    """Make signals raise `Stopped` within the block; the verb ends in one line and 128 + signal."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    owner = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # A decoding process just forked. Ctrl-C reaches it too, but its parent ends it.
            if signum != signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(signum)

    # What is ignored, as under nohup, stays ignored.
    wanted = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, stop) for one in wanted}
    try:
        yield
    except Stopped as stopped:
        hint = f"; {stopped.hint}" if stopped.hint else ""
        console.print(f"stopped by {signal.Signals(stopped.signum).name}{hint}", highlight=False)
        sys.exit(128 + stopped.signum)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextlib.contextmanager
def full_disks_named() -> Iterator[None]:
    """A disk without room is the user's to mend, whichever library met it."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_MORE_ROOM:
            raise
        where = f" {error.filename}" if error.filename else ""
        raise RunError(
            f"cannot write{where}: {error.strerror}.",
            "make room on the disk of the run and of the temporary folder ($TMPDIR)",
        ) from error
