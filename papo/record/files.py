"""Files of a run's folder that are replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from papo.errors import PapoError


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename it to `path`.

    Raises:
        OSError: it cannot be written; what was at `path` is still there.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def cannot_write(path: Path, error: OSError) -> PapoError:
    """The one line for a file of the run's folder that cannot be written."""
    return PapoError(
        f"cannot write {path}: {error.strerror}; free some space or choose another output_dir"
    )
