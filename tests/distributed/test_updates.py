"""One update is one update: whatever the ranks, the accumulation steps, the ZeRO stage and the
sharing of prompts.
"""

import math
import statistics

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
    # ranks' shares, micro-batch, stage, tied, aggregation, frozen head
    ([8], 1, 3, True, "token", False),  # eight accumulation steps
    ([4, 4], 4, 3, True, "token", False),  # two ranks
    ([4, 4], 4, 3, False, "token", False),  # untied head
    ([3, 5], 2, 3, True, "token", False),  # unequal numbers of micro-batches
    ([8, 0], 4, 3, True, "token", False),  # a rank that filtered everything away
    ([4, 4], 1, 2, True, "sequence", False),
    ([2, 6], 3, 1, True, "constant", False),
    ([4, 4], 4, 0, True, "token", False),
    ([8], 4, 3, False, "token", True),
    ([4, 4], 2, 3, False, "token", True),  # frozen head
    ([4, 4], 4, 3, True, "token", True),  # frozen, tied: the embedding is frozen with it
]


MODEL = ("tied", "aggregation", "frozen")
STAGES = {0: "fp32", 1: "bf16", 3: "bf16"}


def unfused(case: tuple) -> str:
    """The task that computes the update of a case with whole logits and torch's autograd."""
    return "unfused-{}-{}-{}".format(*case[3:])


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
                "frozen": frozen,
            },
        )
        for i, (split, micro, stage, tied, aggregation, frozen) in enumerate(CASES)
        if len(split) == world
    }
    tasks |= {
        f"bad-{where}": ("bad_update", {"stage": 3, "where": where})
        for where in ("gradient", "loss")
    }
    tasks["nothing"] = ("nothing", {"stage": 3})
    tasks["outside"] = ("head_outside_a_gather", {})
    tasks |= {
        f"still-{dtype}-{tokens}": (
            "still",
            {"split": [8] if world == 1 else [3, 5], "micro": 2, "dtype": dtype, "tokens": tokens},
        )
        for dtype in ("fp32", "bf16")
        for tokens in (0, 9)
    }
    if world == 2:
        tasks["exchange"] = ("exchange", {})
        tasks |= {f"fails-{rank}": ("fail_together", {"failing": rank}) for rank in (0, 1)}
        tasks |= {
            f"finite-{stage}": ("finite", {"stage": stage, "dtype": dtype})
            for stage, dtype in STAGES.items()
        }
    if world == 1:
        tasks |= {
            unfused(case): ("unfused", dict(zip(MODEL, case[3:], strict=True))) for case in CASES
        }
        tasks |= {
            f"one-pass-{tied}": ("update", {"split": [8], "micro": 8, "stage": 0, "tied": tied})
            for tied in (True, False)
        }
        tasks |= {f"ratio-{dtype}": ("first_ratio", {"dtype": dtype}) for dtype in ("fp32", "bf16")}
        tasks |= {f"stats-{t}": ("stats", {"temperature": t}) for t in (0.5, 1.5)}
    return tasks


@pytest.fixture(scope="module")
def results() -> dict:
    """Results per number of ranks."""
    return {world: run_tasks(world, of_world(world)) for world in (1, 2)}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_update_is_that_of_whole_logits(results, case: int) -> None:
    """The fused head under DeepSpeed, however the sequences are cut, against whole logits and
    torch's autograd over the model alone; whatever the cut, one pass over all
    sequences.
    """
    (expected,) = results[1][unfused(CASES[case])]
    for got in results[len(CASES[case][0])][f"update-{case}"]:
        assert got["applied"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert got["sums"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["sums"]["predicted"] == pytest.approx(expected["predicted"], rel=1e-4)
        assert got["measured"] == pytest.approx(expected["measured"], rel=1e-3)
        assert got["trained"] == expected["trained"]
        # An update moves a weight by up to 1e-2, and with eps 1e-3 linearly in small gradients.
        assert distance(got["weights"], expected["weights"]) < 1e-5


@pytest.mark.parametrize("case", range(len(CASES)))
def test_sums_do_not_depend_on_the_cut(results, case: int) -> None:
    """What the metrics, sigma and the conserving scale are made of."""
    (expected,) = results[1][f"one-pass-{CASES[case][3]}"]
    expected = {**expected["sums"], **expected["branches"]}
    del expected["loss"], expected["predicted"]  # depend on the aggregation, see above
    for got in results[len(CASES[case][0])][f"update-{case}"]:
        sums = {**got["sums"], **got["branches"]}
        assert {k: sums[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [0, 9])
def test_weights_that_do_not_move_change_the_entropy_by_nothing(
    results, world: int, dtype: str, tokens: int
) -> None:
    """Not by a rounding: the loss's pass and the one that measures see the same rows, of the same
    shapes; of all tokens or a sample, also where a rank has fewer micro-batches.
    """
    assert results[world][f"still-{dtype}-{tokens}"] == [0.0] * world


@pytest.mark.parametrize("case", [i for i, case in enumerate(CASES) if case[-1]])
def test_a_frozen_head_stays_and_the_backbone_learns(results, case: int) -> None:
    from tests.distributed.tasks import model

    tied = CASES[case][3]
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    start = {k: p.double().flatten().tolist() for k, p in model(tied).named_parameters()}
    for got in results[len(CASES[case][0])][f"update-{case}"]:
        moved = {k for k, v in got["weights"].items() if v != start[k]}
        assert moved == set(start) - {head}


def test_head_outside_a_gather_is_a_clear_error(results) -> None:
    for world in (1, 2):
        for got in results[world]["outside"]:
            assert got["elements"] == 0
            assert "zero elements" in got["message"] and "ZeRO-3" in got["message"]
            assert "gather" in got["message"]


def test_nothing_to_train_on_is_a_loss_of_zero(results) -> None:
    for world in (1, 2):
        for got in results[world]["nothing"]:
            assert got["unchanged"] and not got["applied"]
            assert got["grad_norm"] == 0.0 and not any(got["sums"].values())


def test_each_rank_receives_what_the_others_have_for_it(results) -> None:
    assert results[2]["exchange"] == [["1 to 0"], ["1 to 1"]]


def test_what_fails_on_one_rank_fails_on_all_with_its_text(results) -> None:
    for rank in (0, 1):
        assert results[2][f"fails-{rank}"] == [f"rank {rank} has no disk"] * 2


def test_tied_embedding_receives_the_heads_gradient(results) -> None:
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
def test_first_ratio_is_exactly_one(results, dtype: str) -> None:
    ratios = results[1][f"ratio-{dtype}"][0]
    assert len(ratios) > 8 and all(r == 1.0 for r in ratios)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_entropy_logp_and_polarity_at_the_sampling_temperature(results, temperature: float) -> None:
    got = results[1][f"stats-{temperature}"][0]
    assert got["entropy"] == pytest.approx(got["true_entropy"], abs=1e-5)
    assert got["logp"] == pytest.approx(got["true_logp"], abs=1e-5)
    assert got["unit_polarity"] == pytest.approx(got["true_unit_polarity"], abs=1e-6)
    assert max(map(abs, got["true_unit_polarity"])) > 1e-4
    assert min(got["entropy"]) >= 0 and not any(math.isnan(h) for h in got["entropy"])
    of_the_loss = got["true_entropy"][: sum(got["lengths"][:4])]
    assert got["mean_entropy"] == pytest.approx(statistics.fmean(of_the_loss), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_sees_what_is_not_finite_in_its_part(results, stage: int) -> None:
    assert results[2][f"finite-{stage}"] == [[True, True, False], [True, True, True]]
