"""The head with its vocabulary split across 2 and 4 gloo processes, against the whole head."""

from __future__ import annotations

import json
from functools import cache

import pytest

from papo_kernels.head.shards import parallel_linear_token_stats
from tests.distributed.launch import finish, start
from tests.kernels.linear_cases import make_head_case

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
    "subgroup",
    "tied",
    "uneven",
    "workspaces",
)


@cache
def results(world: int) -> list[dict[str, str]]:
    """Of every rank: each task's traceback, empty where it passed. Started once per world size."""
    ranks = finish(start(world, ["-m", "tests.distributed.parallel_tasks"]))
    outputs = []
    for code, out, err in ranks:
        assert code == 0 and out.strip(), f"exit code {code}\n{out}\n{err}"
        outputs.append(json.loads(out.strip().splitlines()[-1]))
    return outputs


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("task", TASKS)
def test_split_vocabulary(task, world):
    """See `run_<task>` of parallel_tasks."""
    for rank, outcome in enumerate(results(world)):
        trace = outcome.get(f"run_{task}", "not reached")
        assert not trace, f"rank {rank} of {world}: {trace}"


def test_no_task_is_left_out():
    from tests.distributed import parallel_tasks

    names = {x.removeprefix("run_") for x in vars(parallel_tasks) if x.startswith("run_")}
    assert names - {"rule"} == set(TASKS)


def test_without_a_process_group():
    case = make_head_case(4, 3, 9)
    leaves = case.leaves()
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        parallel_linear_token_stats(leaves["hidden"], leaves["weight"], case.tokens.targets)
