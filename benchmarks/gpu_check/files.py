"""What is written: notes that are whole at any moment, and all logs in one archive."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, save_json

SYSTEM = ("/usr", "/usr/local")  # the same on every machine
MOST_LOG = 2 * 2**20
MOST_ARCHIVE = 14 * 2**20  # before compression; files of up to 16 MiB can be mailed anywhere


class Notes:
    """What a stage has found, in a JSON file that is rewritten whenever something is added: a stage
    that dies leaves what it had, and one that is begun anew finds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = read(path)

    def put(self, **parts: Any) -> None:
        self.data.update(parts)
        save_json(self.path, self.data)


def read(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none, or no whole one."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def portable(text: str) -> str:
    """`text` without this machine's paths: "." for the checkout, "python" for the interpreter,
    "PREFIX" for where its packages are, "BASE" for what its virtual environment was made from."""
    places = {
        sys.base_prefix: "BASE",
        sys.prefix: "PREFIX",
        sys.executable: "python",
        str(ROOT): ".",
    }
    # Longer ones first, as one may lie in another.
    for path in sorted(places, key=len, reverse=True):
        if path not in SYSTEM:
            text = re.sub(re.escape(path) + r"(?![\w-]|\.\w)", places[path], text)
    return text


def clipped(data: bytes, most: int) -> bytes:
    """`data` in at most `most` bytes: its beginning and, three times as long, its end."""
    if len(data) <= most:
        return data
    mark = f"\n... {len(data) - most} bytes or more are left out here ...\n".encode()
    head = max(0, most - len(mark)) // 4
    tail = max(0, most - len(mark) - head)
    return (data[:head] + mark + data[len(data) - tail :])[:most]


def shares(sizes: Iterable[int], most: int, each: int) -> list[int]:
    """What each of several files may take of `most` bytes: short ones all they need, long ones
    equal parts of what these leave, and none more than `each`."""
    wanted = [min(size, each) for size in sizes]
    given, left = [0] * len(wanted), most
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for rank, i in enumerate(order):
        given[i] = min(wanted[i], left // (len(order) - rank))
        left -= given[i]
    return given


def pack(folder: Path, archive: Path, most: int = MOST_ARCHIVE, each: int = MOST_LOG) -> None:
    """Writes the files of `folder` as a .tar.gz, clipped so that it stays below `most` bytes."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    limits = shares((path.stat().st_size for path in paths), most, each)
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz", compresslevel=3) as tar:
        for path, limit in zip(paths, limits, strict=True):
            text = path.read_bytes().decode(errors="surrogateescape")
            data = clipped(portable(text).encode(errors="surrogateescape"), limit)
            info = tarfile.TarInfo(f"{folder.name}/{path.name}")
            info.size, info.mtime = len(data), int(path.stat().st_mtime)
            tar.addfile(info, io.BytesIO(data))
    os.replace(part, archive)
