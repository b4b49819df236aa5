"""How a program reads a row, as ``tuning.json`` or ``PAPO_TRITON_CONFIG`` have it.

The variable holds ``key=value`` pairs separated by commas, for example ``lanes=128,vectors=2``; the
keys are the fields of `Config`, and those left out keep the table's values.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import product
from typing import NamedTuple

import torch

from papo_kernels.backends import tuning

from .tile import WORD_BYTES

VARIABLE = "PAPO_TRITON_CONFIG"
REGISTERS = 65_536  # of a multiprocessor, which a program's threads share


class Config(NamedTuple):
    """How rows of one dtype and length are read on one device.

    A row's bits depend on the first three; the last two are a matter of speed alone.
    """

    lanes: int  # threads of a program
    vectors: int  # 16-byte words of a thread in a tile
    segment: int  # tiles of a segment
    programs: int  # of one row each, for a multiprocessor, below which rows are split
    maxnreg: int  # registers of a thread, of kernels that would not keep to them by themselves


# The smallest and the largest value of a field, and what it must be besides.
_LIMITS = {
    "lanes": (64, 1024, "a power of two"),
    "vectors": (1, 8, "a power of two"),
    "segment": (1, 64, "a power of two"),
    "programs": (0, 64, "an integer"),
    "maxnreg": (32, 248, "a multiple of 8"),
}


def _number(key: str, text: str, source: str) -> int:
    low, high, kind = _LIMITS[key]
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else -1
    fits = {"a power of two": value & (value - 1) == 0, "a multiple of 8": value % 8 == 0}
    if not (low <= value <= high and fits.get(kind, True)):
        raise ValueError(f"{source}: expected {key} to be {kind} in [{low}, {high}], got {text!r}")
    return value


def parse(text: str, source: str = VARIABLE) -> dict[str, int]:
    """The pairs of `text`.

    Raises:
        ValueError: naming `source`, the value and what was expected.
    """
    given: dict[str, int] = {}
    for pair in text.split(","):
        key, _, value = (part.strip() for part in pair.partition("="))
        if key not in _LIMITS:
            raise ValueError(
                f"{source}: expected key=value pairs of {', '.join(_LIMITS)}, got {pair.strip()!r}"
            )
        if key in given:
            raise ValueError(f"{source}: expected {key} once, got {text!r}")
        given[key] = _number(key, value, source)
    return given


def check(config: Config, source: str) -> Config:
    """`config`, where its threads can have their registers."""
    if config.lanes * config.maxnreg > REGISTERS:
        raise ValueError(
            f"{source}: expected lanes * maxnreg <= {REGISTERS}, the registers of a "
            f"multiprocessor, got {config.lanes} * {config.maxnreg}"
        )
    return config


@cache
def _forced() -> dict[str, int]:
    text = os.environ.get(VARIABLE, "")
    return parse(text) if text else {}


@cache
def config(device: torch.device, dtype: torch.dtype, columns: int) -> Config:
    """The configuration for rows of the first `columns` of logits, and of nothing else, or the bits
    of a row's results would depend on more."""
    row = tuning.config("triton", device, dtype, columns)
    if set(row) != set(Config._fields):
        keys = ", ".join(Config._fields)
        raise ValueError(f"tuning.json: expected a config with the keys {keys}, got {row}")
    table = {key: _number(key, str(value), f"tuning.json: {row}") for key, value in row.items()}
    forced = _forced()
    return check(Config(**{**table, **forced}), VARIABLE if forced else "tuning.json")


def clear() -> None:
    """Forgets what was read, so that the next call reads the variable anew."""
    _forced.cache_clear()
    config.cache_clear()


def candidates(dtype: torch.dtype, columns: int) -> list[str]:
    """Configurations worth timing for rows of `columns` logits of `dtype`, each as a value of the
    variable."""
    n_words = columns * dtype.itemsize // WORD_BYTES
    found = []
    for lanes, vectors in product((64, 128, 256, 512, 1024), (1, 2, 4, 8)):
        tile = lanes * vectors
        # Neither threads without a word nor hundreds of tiles; single words in short rows alone.
        if tile > max(n_words, 128) or 64 * tile < n_words or (vectors == 1 and n_words > 1024):
            continue
        # Eight words spill in fewer registers. With 64, ptxas has none to spare, but more programs
        # share a multiprocessor.
        for maxnreg in (64, 80) if vectors < 8 else (128,):
            if lanes * maxnreg <= REGISTERS:
                found.append(f"lanes={lanes},vectors={vectors},maxnreg={maxnreg}")
    return found
