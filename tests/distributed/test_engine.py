"""The trainer's own promises on one rank: its memory, the entropy change it predicts, master
weights, offload, and both sources of polarity.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import average_cases
from tests.distributed.launch import run_tasks
from tests.distributed.test_updates import distance

MiB = 2**20
CHUNK_MIB = 8
SEQUENCES = 32  # of 64 tokens; a vocabulary of 32768 makes logits of 256 MiB in float32
OPTIMIZER = {"offload_optimizer": "cpu"}
BOTH = {**OPTIMIZER, "offload_param": "cpu"}
OFFLOADS = [(3, "bf16", OPTIMIZER), (3, "bf16", BOTH), (3, "fp32", BOTH), (2, "bf16", OPTIMIZER)]

FROZEN = [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")]


def memory_task(dtype: str, tied: bool, count: int, chunk_mib: int = CHUNK_MIB) -> tuple:
    options = {"dtype": dtype, "tied": tied, "count": count, "chunk_mib": chunk_mib}
    return "memory", options


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """Every task's result."""
    tasks: dict[str, Any] = {
        f"memory-{dtype}-{tied}": memory_task(dtype, tied, SEQUENCES)
        for dtype, tied in (("fp32", True), ("fp32", False), ("bf16", True))
    }
    tasks["memory-half"] = memory_task("fp32", True, SEQUENCES // 2)
    tasks["memory-whole"] = memory_task("fp32", True, SEQUENCES // 2, 1 << 10)
    tasks["whole-model"] = ("whole_model", {})
    tasks["probe"] = ("probe", {"steps": 16})
    tasks |= {f"masters-{stage}": ("masters", {"stage": stage}) for stage in (0, 1, 2, 3)}
    tasks["masters-3-offloaded"] = ("masters", {"stage": 3, **BOTH})
    tasks |= {f"frozen-{s}-{d}": ("frozen", {"stage": s, "dtype": d}) for s, d in FROZEN}
    for case, (stage, dtype, offload) in enumerate(OFFLOADS):
        tasks[f"resident-{stage}-{dtype}"] = ("offload", {"stage": stage, "dtype": dtype})
        tasks[f"offload-{case}"] = ("offload", {"stage": stage, "dtype": dtype, **offload})
    folder = str(tmp_path_factory.mktemp("tiny"))
    for on in (True, False):
        tasks[f"checkpointing-{on}"] = ("checkpointing", {"folder": folder, "on": on})
    for source in ("update", "rollout"):
        for conserve in (True, False):
            tasks[f"source-{source}-{conserve}"] = (
                "source",
                {"source": source, "conserve": conserve},
            )
    tasks |= {f"unreached-{stage}": ("unreached", {"stage": stage}) for stage in (2, 3)}
    tasks["unreached-3-offloaded"] = ("unreached", {"stage": 3, **BOTH})
    tasks |= {f"shared-{stage}": ("shared", {"stage": stage}) for stage in (1, 3)}
    tasks |= average_cases.asked(average_cases.ALONE)
    done = run_tasks(1, tasks, "tests.distributed.engine_tasks")
    return {key: ranks[0] for key, ranks in done.items()}


@pytest.mark.parametrize(("dtype", "tied"), [("fp32", True), ("fp32", False), ("bf16", True)])
def test_the_logits_of_a_step_never_exist_whole(results, dtype, tied) -> None:
    """A whole step (the entropy's gradient, old statistics, forward, backward, clipping, AdamW,
    probe) takes the head's workspace and a few copies of weight and hidden states; none of it grows
    with N times V.
    """
    used = results[f"memory-{dtype}-{tied}"]
    assert used["largest"] <= CHUNK_MIB * MiB
    # Widening tiles of a bfloat16 product take 8 MiB more.
    workspace = (CHUNK_MIB + (8 if dtype == "bf16" else 0)) * MiB
    assert used["peak"] <= workspace + 4 * used["weight"] < used["logits"] / 4


def test_more_tokens_take_no_more_logits(results) -> None:
    """Twice the tokens: 128 MiB more of logits, 4 MiB more of everything else."""
    many, few = results["memory-fp32-True"], results["memory-half"]
    assert many["logits"] - few["logits"] == 128 * MiB
    assert many["peak"] - few["peak"] <= 4 * MiB


def test_whole_logits_would_be_seen(results) -> None:
    """The same step with a workspace that holds them all is what the tests above would catch."""
    used = results["memory-whole"]
    assert used["largest"] >= used["logits"] and used["peak"] >= used["logits"]


def test_the_predicted_entropy_change_is_the_measured_ones_sign_and_size(results) -> None:
    """Sixteen updates of one policy, each by other advantages. The prediction knows nothing of
    how the tokens' gradients meet in the shared weights, so it is not exact.
    """
    pairs = torch.tensor(results["probe"], dtype=torch.float64)
    predicted, measured = pairs.T
    assert (predicted.min(), measured.min()) < (-1e-4, -1e-4)
    assert (predicted.max(), measured.max()) > (1e-4, 1e-4)
    assert (predicted.sign() == measured.sign()).double().mean() > 0.9
    assert torch.corrcoef(pairs.T)[0, 1] > 0.9


def test_sampling_gathers_nothing_per_token(results) -> None:
    """The model that samples has no hook of ZeRO's, and holds its weights no longer, nor twice."""
    got = results["whole-model"]
    assert got.pop("policy hooks") > 0
    assert got == {"hooks": 0, "shared": True, "tied": True, "kept": 0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "3-offloaded"])
def test_masters_keep_the_checkpoints_digits(results, stage) -> None:
    assert results[f"masters-{stage}"] == {
        "off the bfloat16 grid": True,
        "masters": True,
        "compute": True,
    }


@pytest.mark.parametrize("stage", [2, 3, "3-offloaded"])
def test_no_gradient_is_left_for_a_weight_that_the_next_loss_does_not_reach(results, stage) -> None:
    """Such as an expert's. ZeRO-3 keeps gradients in a buffer that it never clears."""
    moved = results[f"unreached-{stage}"]
    assert moved["unreached"] == 0.0 and moved["reached"] > 1e-5


@pytest.mark.parametrize(("stage", "dtype"), FROZEN)
def test_a_frozen_reference_runs_under_every_stage(results, stage, dtype) -> None:
    """`loss.kl_coef` > 0: an engine that has nothing to train."""
    assert results[f"frozen-{stage}-{dtype}"] == {"same": True, "trained": 0}


@pytest.mark.parametrize("case", range(len(OFFLOADS)))
def test_offload_changes_where_states_are_not_what_they_are(results, case: int) -> None:
    stage, dtype, _ = OFFLOADS[case]
    plain, moved = results[f"resident-{stage}-{dtype}"], results[f"offload-{case}"]
    assert plain["applied"] == moved["applied"] == [True] * 3
    assert plain["steps"] == moved["steps"] == 3
    assert distance(plain["weights"], moved["weights"]) <= (1e-6 if dtype == "fp32" else 4e-3)


def test_activation_checkpointing_computes_twice_and_changes_nothing(results) -> None:
    plain, recomputed = (results[f"checkpointing-{on}"] for on in (False, True))
    assert (plain["calls"], recomputed["calls"]) == (1, 2)
    assert plain["weights"] == recomputed["weights"] and plain["grad_norm"] > 0


@pytest.mark.parametrize("conserve", [True, False])
def test_polarity_of_rollout_and_update_agree_on_the_first_update(results, conserve: bool) -> None:
    update, rollout = (results[f"source-{s}-{conserve}"] for s in ("update", "rollout"))
    assert rollout["factors"] and not update["factors"]
    assert (update["scale"] != 1.0) == conserve and update["scale"] == rollout["scale"]
    assert distance(update["weights"], rollout["weights"]) < 1e-6
    assert update["grad_norm"] == pytest.approx(rollout["grad_norm"], rel=1e-6)
    assert update["branches"] == pytest.approx(rollout["branches"], rel=1e-6)
    assert update["sums"]["loss"] == pytest.approx(rollout["sums"]["loss"], rel=1e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_shared_polarity_adds_up_to_what_the_update_does(results, stage: int) -> None:
    """To the curvature along the way that the weights are moved, by 0.01 nats, and back."""
    got = results[f"shared-{stage}"]
    assert got["same"]
    assert got["first_order"] == pytest.approx(got["polarity"], abs=0.01 * got["sizes"])
    assert abs(got["polarity"]) > 0.05 * got["sizes"]


@pytest.mark.parametrize("case", range(len(average_cases.ALONE)))
def test_gradients_are_averaged_beside_the_updates(results, case: int) -> None:
    stage, dtype, _ = average_cases.ALONE[case]
    average_cases.check(results[f"average-{case}"], stage, dtype)
