"""What a launcher's environment variables say of this rank."""

from __future__ import annotations

import os
from typing import NamedTuple

from papo.errors import PapoError


class Place(NamedTuple):
    """This rank among the others, and where rank 0 is met; `port` is 0 where there is one rank."""

    rank: int
    local_rank: int
    world_size: int
    address: str
    port: int


def place() -> Place:
    """The launcher's variables; a single rank where there are none.

    Raises:
        PapoError: a variable is no number, beyond its bounds, or missing beside the others.
    """
    world_size = _number("WORLD_SIZE", "1", 1, 1 << 20)
    rank = _number("RANK", "0", 0, world_size - 1, f"WORLD_SIZE={world_size}")
    local_rank = _number("LOCAL_RANK", "0", 0, world_size - 1, f"WORLD_SIZE={world_size}")
    address = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    port = 0
    if world_size > 1:
        if "MASTER_PORT" not in os.environ:
            raise PapoError(
                f"MASTER_PORT is not set, but WORLD_SIZE={world_size}; expected the port at which "
                "all ranks meet rank 0"
            )
        port = _number("MASTER_PORT", "", 1, 65535)
    return Place(rank, local_rank, world_size, address, port)


def _number(name: str, default: str, low: int, high: int, why: str = "") -> int:
    text = os.environ.get(name, default)
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
    if not low <= number <= high:
        beside = f" beside {why}" if why else ""
        raise PapoError(f"{name}={text!r}{beside}: expected a whole number from {low} to {high}")
    return number
