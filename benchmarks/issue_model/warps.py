"""A warp: its registers, and which of its lanes are where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .operands import U32, Array

if TYPE_CHECKING:
    from .machine import Block

ALL_LANES = (1 << 32) - 1


class Step(NamedTuple):
    """One instruction as a warp executed it. `at`: its index in the listing.

    event: None, or ("load" | "store", bytes), ("copy" | "broadcast", barrier, bytes),
    ("message", barrier, bytes, rank of its receiver),
    ("arrive", barrier, arrivals, bytes), ("wait", barrier, phases), ("sync", name, warps),
    ("sync-arrive", name), ("sync-wait", name, arrivals of the block so far).
    """

    at: int
    taken: bool
    event: Any


@dataclass(eq=False)
class Group:
    """Lanes of a warp at one place. `blocked`: says whether they still wait."""

    pc: int
    mask: Array
    lanes: int  # the mask as bits
    blocked: Callable[[], bool] | None = None
    wait: Any = None  # ("bsync", barrier) or ("converge", pc)


def mask_of(lanes: int) -> Array:
    return (np.int64(lanes) >> np.arange(32) & 1).astype(bool)


def lanes_of(mask: Array) -> int:
    return int((mask.astype(np.int64) << np.arange(32)).sum())


class Warp:
    """32 lanes with their registers."""

    def __init__(self, block: Block, index: int, constants: Array) -> None:
        self.block, self.index, self.constants = block, index, constants
        self.r = np.zeros((256, 32), U32)
        self.p = np.zeros((8, 32), bool)
        self.u = np.zeros((64, 1), U32)
        self.up = np.zeros((8, 1), bool)
        self.p[7] = self.up[7] = True
        self.groups = [Group(0, np.ones(32, bool), ALL_LANES)]
        self.reconverge: dict[int, dict[int, int]] = {}
        self.exited = 0
        self.event: Any = None
        self.steps: list[Step] = []

    def special(self, name: str) -> Array:
        """A special register."""
        lane = np.arange(32, dtype=U32)
        block = self.block
        table = {
            "SR_TID.X": lane + U32(32 * self.index),
            "SR_CTAID.X": np.array([block.index], U32),
            "SR_CgaCtaId": np.array([block.rank], U32),
            "SR_LANEID": lane,
            "SRZ": np.zeros(1, U32),
            "SR_TID.Y": np.zeros(1, U32),
            "SR_TID.Z": np.zeros(1, U32),
        }
        return table[name]
