"""The candidates of the sweeps, as values of the variables that force them.

They are proposals: what a device cannot run, papo_kernels refuses with a ValueError, and the sweep
writes that down.
"""

from __future__ import annotations

import importlib
import itertools
import math

import torch

from benchmarks.gpu_check import rehearsal

WORD = 16  # bytes
BLOCK_KIB, SM_KIB = 227, 228  # shared memory of a block at most, and of a Hopper multiprocessor
MESSAGES_KIB = 1  # of a block's shared memory that are not buffers, at least
MOST_BUFFERS = 8
STAGE_KIB = (16, 32)  # of a slice that is cut into buffers
STATS_TEAMS, STATS_RINGS, STATS_BLOCKS = (1, 2, 4, 8), (2, 3, 4, 5, 6, 8), (2, 1, 3)


def loss_tiles(columns: int, itemsize: int) -> list[str]:
    """PAPO_TILE: cluster, warps, stages, ring, blocks. The rings are those that hold the row under
    work and one buffer more, two rows, three, and all that fit; the narrowest first."""
    if rehearsal.active():
        return ["1,4,1,3,2", "2,4,1,3,2", "4,4,1,3,2"]
    found: dict[str, None] = {}
    for cluster, blocks in itertools.product((8, 4, 2, 16, 1), (2, 1, 3)):
        bytes_each = (min(BLOCK_KIB, SM_KIB // blocks - 1) - MESSAGES_KIB) * 1024
        row = math.ceil(columns / cluster) * itemsize
        for stages in sorted({1, *(math.ceil(row / (kib * 1024)) for kib in STAGE_KIB)}):
            buffer = math.ceil(row / stages / WORD) * WORD + WORD
            most = min(MOST_BUFFERS, bytes_each // buffer)
            rings = {stages + 1, 2 * stages + 1, 3 * stages, most}
            for ring, warps in itertools.product(sorted(rings), (4, 8)):
                if stages < ring <= most and warps * blocks <= 16:
                    found[f"{cluster},{warps},{stages},{ring},{blocks}"] = None
    return list(found)


def stats_tiles() -> list[str]:
    """PAPO_STATS_TILE: teams, ring, blocks; zeros for the loss's own kernel."""
    if rehearsal.active():
        return ["0,0,0", "1,4,2"]
    combinations = itertools.product(STATS_BLOCKS, STATS_TEAMS, STATS_RINGS)
    tiles = [f"{teams},{ring},{blocks}" for blocks, teams, ring in combinations if ring >= teams]
    return ["0,0,0", *tiles]


def triton_configs(dtype: torch.dtype, columns: int) -> list[str]:
    """PAPO_TRITON_CONFIG, as the Triton launcher itself proposes."""
    launch = importlib.import_module("papo_kernels.backends.triton.launch")
    found: list[str] = launch.candidates(dtype, columns)
    return found[:1] if rehearsal.active() else found
