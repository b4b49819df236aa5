"""Token weights of the usual aggregations, and what a mask leaves nothing of."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papo_kernels import normalized_mask, policy_loss, sequence_weights
from papo_kernels.aggregation import AGGREGATIONS

NORM = "seq-mean-token-sum-norm"


def options(aggregation: str) -> dict:
    return {"aggregation": aggregation, "constant_length": 10 if aggregation == NORM else None}


def count(lengths: torch.Tensor, aggregation: str) -> torch.Tensor:
    """What `total` is the sum of over ranks and micro-batches."""
    return lengths.sum() if aggregation == "token-mean" else (lengths > 0).sum()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_weighted_sum_is_the_named_mean(aggregation, dtype):
    """A sequence that is masked whole is none."""
    torch.manual_seed(0)
    losses = torch.randn(4, 7, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([3, 1, 0, 7])[:, None]
    mask[3, 2] = False
    kept = [x[m] for x, m in zip(losses, mask, strict=True) if m.any()]
    expected = {
        "token-mean": torch.cat(kept).mean(),
        "seq-mean-token-mean": torch.stack([x.mean() for x in kept]).mean(),
        "seq-mean-token-sum": torch.stack([x.sum() for x in kept]).mean(),
        NORM: torch.stack([x.sum() / 10 for x in kept]).mean(),
    }[aggregation]
    weight = normalized_mask(mask.to(dtype), **options(aggregation))
    double = dtype == torch.float64
    assert weight.shape == mask.shape
    assert weight.dtype == (torch.float64 if double else torch.float32)
    total = (weight * losses).sum()
    torch.testing.assert_close(total, expected, rtol=1e-12 if double else 1e-6, atol=0)
    packed = sequence_weights(mask.sum(1), **options(aggregation)).repeat_interleave(mask.sum(1))
    torch.testing.assert_close(packed.to(weight.dtype), weight[mask], rtol=0, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=12), st.data())
def test_weights_do_not_depend_on_how_the_batch_is_cut(aggregation, rows, data):
    """Any split into ranks or accumulation steps gives the same weights."""
    lengths = torch.tensor(rows)
    whole = sequence_weights(lengths, **options(aggregation))
    cut = data.draw(st.integers(1, len(rows) - 1))
    parts = (lengths[:cut], lengths[cut:])
    total = sum(count(part, aggregation) for part in parts)
    pieces = [sequence_weights(part, **options(aggregation), total=total) for part in parts]
    assert torch.equal(whole, torch.cat(pieces))
    pieces = [sequence_weights(part, **options(aggregation), total=float(total)) for part in parts]
    assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fully_masked_batch_weighs_zero(aggregation):
    """0, not 0/0, with a total of its own and with that of a step."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for total in (None, 0.0, torch.tensor(0), 5):
        weight = normalized_mask(mask, **options(aggregation), total=total)
        assert weight.tolist() == [[0.0] * 3] * 2
    logits = torch.randn(2, 3, 8, requires_grad=True)
    ids, weight = torch.zeros(2, 3, dtype=torch.int64), normalized_mask(mask)
    loss = policy_loss(logits, ids, torch.ones(2, 3), weight).loss
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_no_sequences_at_all(shape):
    assert normalized_mask(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize(
    ("aggregation", "constant_length", "message"),
    [
        ("mean", None, "aggregation: expected one of"),
        (NORM, None, "constant_length: expected an int, got None"),
        (NORM, True, "constant_length: expected an int, got True"),
        (NORM, 0, "constant_length: expected at least 1, got 0"),
        ("token-mean", 3, "constant_length: expected None for aggregation 'token-mean', got 3"),
    ],
)
def test_bad_aggregation_is_named(aggregation, constant_length, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        normalized_mask(torch.ones(1, 2), aggregation, constant_length=constant_length)


def test_a_mask_is_a_tensor_with_a_dimension():
    with pytest.raises(TypeError, match="mask: expected Tensor"):
        normalized_mask([1.0])
    with pytest.raises(ValueError, match="mask: expected shape"):
        normalized_mask(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("total", "error", "message"),
    [
        (-3.0, ValueError, r"total: expected a finite number >= 0, got -3\.0"),
        (float("inf"), ValueError, "total: expected a finite number >= 0, got inf"),
        (float("nan"), ValueError, "total: expected a finite number >= 0, got nan"),
        (True, TypeError, "total: expected a number, got bool True"),
        ("2", TypeError, "total: expected a number, got str '2'"),
        (
            torch.ones(3),
            ValueError,
            r"total: expected a number or a 0-dim tensor, got shape \(3,\)",
        ),
    ],
)
def test_bad_total_is_named(total, error, message):
    with pytest.raises(error, match=message):
        normalized_mask(torch.ones(2, 3), total=total)


def test_a_total_that_is_nan_is_seen():
    """Nothing reads the tensor's value, and zeros would train on nothing without a word."""
    assert normalized_mask(torch.ones(2, 3), total=torch.tensor(torch.nan)).isnan().all()
