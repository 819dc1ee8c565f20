"""Silence for libraries that report on themselves."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporting and copying graphs warns about internals that no user can change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """`quiet`, for libraries that also draw progress bars of their own on standard output."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        yield
