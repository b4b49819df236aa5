"""One update is one update: whatever the ranks, the accumulation steps, the ZeRO stage and the
sharing of prompts.
"""

import math

import pytest
import torch

from tests.distributed.launch import run_tasks


def distance(a: dict, b: dict) -> float:
    """Largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(
        (torch.tensor(a[k], dtype=torch.float64) - torch.tensor(b[k], dtype=torch.float64))
        .abs()
        .max()
        .item()
        for k in a
    )


CASES = [
    # ranks' shares, micro-batch, stage, tied, aggregation
    ([8], 1, 3, True, "token"),  # eight accumulation steps
    ([4, 4], 4, 3, True, "token"),  # two ranks
    ([4, 4], 4, 3, False, "token"),  # untied head
    ([3, 5], 2, 3, True, "token"),  # requirement 6: unequal numbers of micro-batches
    ([8, 0], 4, 3, True, "token"),  # requirement 7: a rank that filtered everything away
    ([4, 4], 1, 2, True, "sequence"),
    ([2, 6], 3, 1, True, "constant"),
    ([4, 4], 4, 0, True, "token"),
]


BASELINES = [(True, "token"), (False, "token"), (True, "sequence"), (True, "constant")]


def of_world(world: int) -> dict:
    """Every task of this file for one number of ranks, by test."""
    tasks = {
        f"update-{i}": (
            "update",
            {
                "split": split,
                "micro": micro,
                "stage": stage,
                "tied": tied,
                "aggregation": aggregation,
            },
        )
        for i, (split, micro, stage, tied, aggregation) in enumerate(CASES)
        if len(split) == world
    }
    tasks |= {
        f"bad-{where}": ("bad_update", {"stage": 3, "where": where})
        for where in ("gradient", "loss")
    }
    if world == 1:
        tasks |= {
            f"baseline-{tied}-{agg}": (
                "update",
                {"split": [8], "micro": 8, "stage": 0, "tied": tied, "aggregation": agg},
            )
            for tied, agg in BASELINES
        }
        tasks |= {f"ratio-{dtype}": ("first_ratio", {"dtype": dtype}) for dtype in ("fp32", "bf16")}
        tasks |= {f"stats-{t}": ("stats", {"temperature": t}) for t in (0.5, 1.5)}
    return tasks


@pytest.fixture(scope="module")
def results() -> dict:
    """Results per number of ranks; the baseline is one rank, ZeRO-0, all eight sequences in one
    forward pass.
    """
    return {world: run_tasks(world, of_world(world)) for world in (1, 2)}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_requirement_1_2_6_7_15_27_same_update(results, case: int) -> None:
    split, _, _, tied, aggregation = CASES[case]
    (expected,) = results[1][f"baseline-{tied}-{aggregation}"]
    for got in results[len(split)][f"update-{case}"]:
        assert got["applied"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        # An update moves a weight by up to 1e-2, and with eps 1e-3 linearly in small gradients.
        assert distance(got["weights"], expected["weights"]) < 1e-5
        assert got["sums"] == pytest.approx(expected["sums"], rel=1e-5, abs=1e-6)
        assert got["branches"] == pytest.approx(expected["branches"], rel=1e-5, abs=1e-6)


def test_requirement_27_tied_embedding_receives_the_heads_gradient(results) -> None:
    """The embedding rows of tokens that are never fed move only through the head."""
    got = results[1]["update-0"][0]["weights"]
    from tests.distributed.tasks import model, sequences

    start = model(True).get_input_embeddings().weight.detach().double()
    fed = {t for s in sequences(8) for t in (*s.prompt_ids, *s.response_ids[:-1])}
    never_fed = [i for i in range(start.shape[0]) if i not in fed]
    assert never_fed
    moved = (
        torch.tensor(got["model.embed_tokens.weight"], dtype=torch.float64).view_as(start) - start
    )
    assert (moved[never_fed].abs().max(dim=1).values > 1e-5).all()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_bad_step_is_skipped_on_every_rank_and_training_goes_on(
    results, world: int, where: str
) -> None:
    for result in results[world][f"bad-{where}"]:
        assert not result["bad_applied"] and result["reason"]
        assert result["unchanged"] and result["steps"] == 1
        assert result["good_applied"] and result["moved"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_requirement_26_first_ratio_is_exactly_one(results, dtype: str) -> None:
    ratios = results[1][f"ratio-{dtype}"][0]
    assert len(ratios) > 8 and all(r == 1.0 for r in ratios)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_requirement_16_17_entropy_and_logp_at_the_sampling_temperature(
    results, temperature: float
) -> None:
    got = results[1][f"stats-{temperature}"][0]
    assert got["entropy"] == pytest.approx(got["true_entropy"], abs=1e-5)
    assert got["logp"] == pytest.approx(got["true_logp"], abs=1e-5)
    assert min(got["entropy"]) >= 0 and not any(math.isnan(h) for h in got["entropy"])
