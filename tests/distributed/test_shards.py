"""The head with its vocabulary split across 2 and 4 gloo processes, against the whole head."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
import torch.distributed as dist

from papo_kernels import Head, token_stats
from tests.distributed.launch import finish, start

TASKS = (
    "collectives",
    "disagreement",
    "empty",
    "errors",
    "kept_and_capped",
    "masked_everywhere",
    "masked_shard",
    "nan",
    "no_grad",
    "padding",
    "same_bits",
    "scaled_and_kept",
    "several_ids",
    "subgroup",
    "tied",
    "uneven",
    "workspaces",
)


@cache
def results(world: int) -> list[dict[str, str]]:
    """Of every rank: each task's traceback, empty where it passed. Started once per world size."""
    ranks = finish(start(world, ["-m", "tests.distributed.shard_tasks"]))
    outputs = []
    for code, out, err in ranks:
        assert code == 0 and out.strip(), f"exit code {code}\n{out}\n{err}"
        outputs.append(json.loads(out.strip().splitlines()[-1]))
    return outputs


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("task", TASKS)
def test_split_vocabulary(task, world):
    """See `run_<task>` of shard_tasks."""
    for rank, outcome in enumerate(results(world)):
        trace = outcome.get(f"run_{task}", "not reached")
        assert not trace, f"rank {rank} of {world}: {trace}"


def test_no_task_is_left_out():
    from tests.distributed import shard_tasks

    names = {x.removeprefix("run_") for x in vars(shard_tasks) if x.startswith("run_")}
    assert names - {"rule"} == set(TASKS)


def test_without_a_process_group():
    """Of a head whose group is gone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    head = Head(torch.randn(9, 3), group=dist.group.WORLD)
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialized"):
        token_stats(head(torch.randn(4, 3)), torch.arange(4))
