"""How the CUDA kernels cut the rows of a call: as the environment says, else as the table does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from . import tuning
from .extension import DTYPE_CODE

# As csrc/include/papo/params.h has them.
_KERNEL_CODE = {None: 0, "resident": 1, "streamed": 2}
_STATS_DERIVED, _STATS_GIVEN, _STATS_BY_CLUSTERS, _STATS_ALWAYS = range(4)


def _stats_code(stats: Sequence[int] | None, forced: tuning.ForcedTile) -> int:
    if stats is None:
        return _STATS_DERIVED
    if not any(stats):
        return _STATS_BY_CLUSTERS
    return _STATS_GIVEN if forced.stats is None else _STATS_ALWAYS


@lru_cache(maxsize=256)
def choose_tile(
    native: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    columns: int,
    forced: tuning.ForcedTile,
) -> Any:
    """The extension's ``TileChoice`` for rows of `columns` logits.

    Raises:
        ValueError: the device cannot do it; the message names the limit.
    """
    config = tuning.config("cuda", device, dtype, columns)
    tile = forced.tile or (config["tile"] if forced.kernel is None else None)
    stats = forced.stats or (config["stats"] if forced == tuning.NOT_FORCED else None)
    choice = native.TileChoice(
        _KERNEL_CODE[forced.kernel],
        *(tile or (0,) * 5),
        _stats_code(stats, forced),
        *(stats or (0,) * 3),
    )
    try:
        native.check_tile(columns, DTYPE_CODE[dtype], device.index or 0, choice)
    except ValueError as error:
        asked = forced if forced != tuning.NOT_FORCED else f"tuning.json: {config}"
        raise ValueError(f"{asked}: does not fit V = {columns} in {dtype}: {error}") from None
    return choice
