"""Whether barriers and fences, and not the luck of one run, order what the CUDA kernels do in
shared memory: the emulated machine with its check of orders on (tests/cpp/emulated_order.h).

tests/mutate_cuda.py shows that `test_every_access_is_ordered` misses none of them.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from papo_kernels.backends import tuning
from papo_kernels.backends.native import CUDA
from papo_kernels.types import RowParams
from tests.cases import make_loss_case
from tests.kernels.cuda_emulator import FLAGS, ROOT, emulated
from tests.kernels.test_cuda_emulated import EVERY_TERM, one_call

pytestmark = pytest.mark.needs("g++")


class Rows(NamedTuple):
    n: int
    v: int
    dtype: torch.dtype
    tile: tuple[int, ...] | None  # of PAPO_TILE; None: streamed
    stats: tuple[int, ...] | None = None  # of PAPO_STATS_TILE


BF16, F32 = torch.bfloat16, torch.float32
ROWS = {
    "streamed": Rows(9, 300, F32, None),
    "no_whole_word": Rows(3, 3, BF16, (1, 1, 1, 3, 1)),
    "one_block": Rows(9, 600, F32, (1, 4, 1, 3, 1)),
    "ahead": Rows(9, 1201, BF16, (4, 2, 1, 3, 1), (2, 3, 1)),
    "in_turn": Rows(9, 600, F32, (2, 1, 1, 2, 1), (1, 2, 1)),
    "stages": Rows(7, 1201, F32, (2, 2, 3, 4, 1), (0, 0, 0)),
    "empty_slices": Rows(9, 68, BF16, (8, 1, 1, 4, 1), (8, 8, 1)),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_access_is_ordered(name):
    """Loss in place and alone, statistics, and their gradient from a state: several rows per block,
    two orders of threads."""
    n, v, dtype, tile, stats = ROWS[name]
    case = make_loss_case("normal", n, v, dtype=dtype, objective=EVERY_TERM)
    row = RowParams(1.0, 0.0, v)
    asked = tuning.ForcedTile("streamed" if tile is None else None, tile, stats)
    for seed in range(2):
        with (
            mock.patch("papo_kernels.backends.tuning.forced", lambda: asked),
            emulated(resident=1 + seed, seed=seed) as native,
        ):
            native.lib.emulated_check_order(True)
            over = case.logits.clone()
            outputs = one_call(replace(case, logits=over), over)
            assert native.widest_cluster == (1 if tile is None else tile[0])
            for a, b in zip(outputs, one_call(case, None), strict=True):
                assert torch.equal(a, b)
            *_, state = CUDA.token_stats_fwd(case.logits, case.targets, row)
            CUDA.token_stats_bwd(case.logits, case.targets, state, (torch.ones(n),) * 4, row)


# A step left out of the small kernel of emulated_faults.cpp, and what is said to it.
FAULTS = {
    "expect of messages": "bytes reached a barrier that does not expect them yet",
    "barrier_init_fence": "cluster_sync before a barrier's barrier_init_fence",
    "wait for empty": "more arrivals at a barrier than it expects",
    "fence_before_bulk": "read: no fence_before_bulk in between",
    "expect of bytes": "bytes reached a barrier that does not expect them yet",
    "wait for full": "load from shared memory at 0 that a bulk copy writes: it was not waited for",
    "warp_sync": "read: nothing orders the two",
    "load and warp_sync": "still waits for the one before: nothing orders the two",
    "arrive at empty": "deadlock: block 0 warp 0 waits for full at 528, block 0 warp 1 waits for",
    "wait for a message": "a transfer outlived its block",
    "cluster scope": "load from shared memory at 512 that a message of another block writes: it "
    "was not waited for at the scope of the cluster",
    "cluster_sync": "barrier used before it was initialized",
    "block_sync": "store to shared memory at 0 that a bulk copy writes: it was not waited for",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    program = tmp_path_factory.mktemp("faults") / "faults"
    command = ["g++", *FLAGS, "tests/cpp/emulated_faults.cpp", "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program, *FAULTS], capture_output=True, text=True, timeout=60)
    return dict(line.split(" | ") for line in done.stdout.splitlines())


@pytest.mark.parametrize("step", FAULTS)
def test_a_step_left_out_is_an_error(step, said):
    assert FAULTS[step] in said[step]


def test_the_whole_kernel_is_none(said):
    assert said["nothing"] == ""
