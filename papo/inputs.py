"""A user's files, which may be missing, a folder, a pipe without a writer, or without an end."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def file_fault(path: str | Path) -> str | None:
    """Why `path` cannot be read as an ordinary file, in a few words; None if it can.

    Nothing is opened: opening a pipe would wait for its writer.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # NUL, half of a surrogate pair
        return str(error)
    if stat.S_ISDIR(mode):
        return "is a folder: expected a file"
    if not stat.S_ISREG(mode):
        return "is a pipe or a device: expected an ordinary file"
    return None if os.access(path, os.R_OK) else "permission denied"


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of an ordinary file of at most `most` bytes.

    Raises:
        ValueError: there is no such file, or it is something else; a few words say what.
    """
    fault = file_fault(path)
    if fault is not None:
        raise ValueError(fault)
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if len(content) > most:
        raise ValueError(f"expected at most {most >> 10} KiB")
    return content


def read_text(path: str | Path, most: int) -> str:
    """The text of an ordinary UTF-8 file of at most `most` bytes, without its byte-order mark.

    Raises:
        ValueError: as `read_bytes`, and where it is not UTF-8.
    """
    content = read_bytes(path, most)
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(
            f"byte 0x{byte:02x} at {error.start} is not UTF-8: convert the file"
        ) from error


def read_json_object(path: str | Path, most: int) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes.

    Raises:
        ValueError: as `read_text`, and where the file holds no JSON object.
    """
    text = read_text(path, most)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold `value`: no half of a surrogate pair is in it."""
    return value.isascii() or _HALF_PAIR.search(value) is None


def is_plain(value: str) -> bool:
    """Whether `value` is text that also paths and arguments can hold, which end at a NUL."""
    return "\0" not in value and is_text(value)
