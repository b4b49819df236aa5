"""The screen, which may go away while a run goes on: a closed terminal, a pipe without a reader."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def showing() -> Iterator[None]:
    """A block that writes to standard output; once that has gone away, nothing is shown."""
    try:
        yield
    except OSError:
        # Python itself would fail on what is left to flush at its end.
        null = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(null, sys.stdout.fileno())
        os.close(null)
