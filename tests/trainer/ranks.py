"""Ranks as threads of one process, for what needs no process group but for what the ranks say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

from papo.dist import collectives

T = TypeVar("T")


def on_ranks(world: int, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each of `world` ranks, between which the collectives are real."""
    here, places = threading.local(), [None] * world
    meeting = threading.Barrier(world, timeout=60)

    def gather(value: Any) -> list[Any]:
        places[here.rank] = value
        meeting.wait()
        gathered = list(places)
        meeting.wait()  # before a place is filled again
        return gathered

    def total(sums: Mapping[str, Any]) -> dict[str, float]:
        parts = gather({name: float(value) for name, value in sums.items()})
        return {name: sum(part[name] for part in parts) for name in sums}

    def run(rank: int) -> T:
        here.rank = rank
        try:
            return work()
        except BaseException:
            meeting.abort()
            raise

    with (
        mock.patch.multiple(
            collectives,
            rank=lambda: here.rank,
            world_size=lambda: world,
            gather_objects=gather,
            exchange=lambda parcels: [x for row in gather(parcels) for x in row[here.rank]],
            sum_named=total,
            all_max=lambda value: max(gather(value)),
        ),
        ThreadPoolExecutor(world) as pool,
    ):
        return list(pool.map(run, range(world)))
