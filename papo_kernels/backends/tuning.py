"""How the GPU kernels cut rows: one table, ``tuning.json``, keyed by device, dtype and columns.

Each backend has an ordered list; the first row that matches a call serves it. A row is

    device   a device's name, an architecture ("sm_90", "gfx942"), or "*"
    dtype    of the logits ("bfloat16"), or "*"
    columns  [first, last], both included
    config   the backend's own numbers; null stands for what the backend derives from the device
    source   {"modeled": document} or {"measured": file, "date": ..., "device": name}

A choice never depends on the number of rows: a row's results have the same bits in every batch.
The sweep of ``make gpu-check`` puts measured rows before the modeled ones.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from papo_kernels.checks import GPU_DTYPES

from .protocol import MOST_GPU_COLUMNS, dtype_names

PATH = Path(__file__).with_name("tuning.json")
ANY = "*"
_DTYPES = dtype_names(GPU_DTYPES)
_SOURCES = [{"modeled"}, {"measured", "date", "device"}]
_KERNELS = ("resident", "streamed")
_TILE = ("cluster", "warps", "stages", "ring", "blocks")
_STATS_TILE = ("teams", "ring", "blocks")
_MOST = 65_535  # beyond what any device allows


class Row(NamedTuple):
    """One row of the table."""

    device: str
    dtype: str
    columns: tuple[int, int]
    config: dict[str, Any]
    source: dict[str, str]

    def matches(self, devices: tuple[str, ...], dtype: str, columns: int) -> bool:
        first, last = self.columns
        return (
            self.device in (ANY, *devices)
            and self.dtype in (ANY, dtype)
            and first <= columns <= last
        )

    @property
    def measured(self) -> bool:
        return "measured" in self.source


def load(path: Path = PATH) -> dict[str, list[Row]]:
    """The table of every backend.

    Raises:
        ValueError: naming the file, the row and what was expected.
    """
    try:
        table = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(table, dict) or not all(isinstance(rows, list) for rows in table.values()):
        raise ValueError(f"{path}: expected an object with a list of rows for each backend")
    return {
        backend: [_row(backend, row, f"{path}: {backend}[{i}]") for i, row in enumerate(rows)]
        for backend, rows in table.items()
    }


def save(table: dict[str, list[Row]], path: Path = PATH) -> None:
    """Writes a table, one line per row. The file is replaced at once."""
    backends = []
    for backend, rows in table.items():
        lines = ",\n".join(f"  {json.dumps(row._asdict())}" for row in rows)
        backends.append(f' "{backend}": [\n{lines}\n ]')
    part = path.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(backends) + "\n}\n")
    part.replace(path)


def _row(backend: str, raw: Any, where: str) -> Row:
    def expect(ok: bool, what: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{where}: expected {what}, got {got!r}")

    keys = set(raw) if isinstance(raw, dict) else raw
    expect(keys == set(Row._fields), f"the keys {', '.join(Row._fields)}", keys)
    row = Row(**raw)
    expect(isinstance(row.device, str), "device to be a name", row.device)
    expect(row.dtype in (ANY, *_DTYPES), f"dtype to be one of {(ANY, *_DTYPES)}", row.dtype)
    columns = row.columns
    ordered = _are_numbers(columns, 2, 1, MOST_GPU_COLUMNS) and columns[0] <= columns[1]
    expect(ordered, f"columns to be [first, last] within [1, {MOST_GPU_COLUMNS}]", columns)
    source = isinstance(row.source, dict) and set(row.source)
    expect(source in _SOURCES, f"source to have the keys of one of {_SOURCES}", row.source)
    expect(isinstance(row.config, dict), "config to be an object", row.config)
    if backend == "cuda":
        keys = set(row.config)
        expect(keys == {"tile", "stats"}, "config to have the keys tile and stats", keys)
        for name, fields, least in (("tile", _TILE, 1), ("stats", _STATS_TILE, 0)):
            value = row.config[name]
            fits = value is None or _are_numbers(value, len(fields), least, _MOST)
            expect(fits, f"{name} to be null or [{', '.join(fields)}]", value)
    return row._replace(columns=(columns[0], columns[1]))


def _are_numbers(value: Any, count: int, least: int, most: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == count
        and all(type(x) is int and least <= x <= most for x in value)
    )


def insert(rows: list[Row], new: Row) -> list[Row]:
    """`rows` with `new` in front, in place of a row with the same key."""
    return [new, *(r for r in rows if r[:3] != new[:3])]


@cache
def _table() -> dict[str, list[Row]]:
    return load()


def device_names(device: torch.device) -> tuple[str, ...]:
    """What a row's `device` may call `device`: its name and its architecture."""
    if device.type != "cuda":
        return (device.type,)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.name, str(properties.gcnArchName).split(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


@cache
def config(backend: str, device: torch.device, dtype: torch.dtype, columns: int) -> dict[str, Any]:
    """The configuration of the first row that matches.

    Raises:
        LookupError: no row does.
    """
    names, (type_name,) = device_names(device), dtype_names([dtype])
    for row in _table()[backend]:
        if row.matches(names, type_name, columns):
            return row.config
    raise LookupError(f"tuning.json: no row of {backend} for {names}, {type_name}, V = {columns}")


# ---- the environment ----------------------------------------------------------------------------


class ForcedTile(NamedTuple):
    """What the environment asks of the CUDA kernels; None where it asks nothing.

    Attributes:
        kernel: ``PAPO_KERNEL``: "resident", rows on chip, or "streamed", rows from global memory.
        tile: ``PAPO_TILE``: blocks that share a row, warps of a block that sum, buffers that a
            block's part of a row fills, buffers per block, blocks per multiprocessor.
        stats: ``PAPO_STATS_TILE``, for statistics, where a block takes whole rows: teams of `warps`
            warps, buffers, blocks per multiprocessor. 0,0,0: clusters take them, as `tile` says.
    """

    kernel: str | None
    tile: tuple[int, ...] | None
    stats: tuple[int, ...] | None

    def __str__(self) -> str:
        values = {
            "PAPO_KERNEL": self.kernel,
            "PAPO_TILE": self.tile and ",".join(map(str, self.tile)),
            "PAPO_STATS_TILE": self.stats and ",".join(map(str, self.stats)),
        }
        return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)


NOT_FORCED = ForcedTile(None, None, None)


@cache
def forced() -> ForcedTile:
    """What the environment asks for. Read once; ``forced.cache_clear()`` makes the next call read
    it again.

    Raises:
        ValueError: naming the variable, its value and what was expected.
    """
    kernel = os.environ.get("PAPO_KERNEL") or None
    if kernel not in (None, *_KERNELS):
        raise ValueError(f"PAPO_KERNEL: expected one of {_KERNELS}, got {kernel!r}")
    tile, stats = _numbers("PAPO_TILE", _TILE, 1), _numbers("PAPO_STATS_TILE", _STATS_TILE, 0)
    if kernel == "streamed" and (tile or stats):
        name = "PAPO_TILE" if tile else "PAPO_STATS_TILE"
        raise ValueError(f"{name}: expected none with PAPO_KERNEL=streamed, got {tile or stats}")
    return ForcedTile(kernel, tile, stats)


def _numbers(variable: str, names: tuple[str, ...], least: int) -> tuple[int, ...] | None:
    value = os.environ.get(variable)
    if not value:
        return None
    parts = [part.strip() for part in value.split(",")]
    counted = len(parts) == len(names) and all(
        p.isascii() and p.isdecimal() and len(p) <= len(str(_MOST)) for p in parts
    )
    if not counted or not all(least <= int(part) <= _MOST for part in parts):
        expected = f"{','.join(names)} as integers from {least} to {_MOST}"
        raise ValueError(f"{variable}: expected {expected}, got {value!r}")
    return tuple(map(int, parts))
