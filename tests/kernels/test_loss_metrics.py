"""`PolicyLossOutput.metrics`: means over the tokens that count, by hand."""

from __future__ import annotations

import re

import pytest
import torch

from papo_kernels import Objective, PolicyLossOutput, policy_loss, token_stats
from papo_kernels.types import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW, INSIDE

# The last token does not count, whatever it holds.
SIDES = [INSIDE, CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_HIGH, CLIPPED_DUAL, CLIPPED_LOW]
MASK = torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0, 0.0])


def output(logp: torch.Tensor, device: str = "cpu") -> PolicyLossOutput:
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, torch.nan])
    ratio = torch.tensor([1.0, 0.5, 1.5, 2.0, 4.0, torch.inf])
    side = torch.tensor(SIDES, dtype=torch.uint8)
    zero = torch.zeros(6)
    parts = (zero[0], logp, entropy, zero, zero, zero + 1, ratio, side)
    return PolicyLossOutput(*(part.to(device) for part in parts))


def test_means_are_over_the_tokens_that_count():
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, torch.nan])
    old_logp = logp - torch.tensor([0.5, -0.5, 0.0, 0.0, 1.0, 0.0])
    found = output(logp).metrics(MASK, old_logp)
    x = torch.tensor([0.5, -0.5, 0.0, 0.0, 1.0], dtype=torch.float64)
    expected = {
        "tokens": 5.0,
        "entropy": 3.0,
        "ratio": 9.0 / 5.0,
        "clipfrac": 0.8,
        "clipfrac_low": 0.2,
        "clipfrac_high": 0.4,
        "clipfrac_dual": 0.2,
        "ppo_kl": -0.2,
        "ppo_kl_k3": (x.exp() - 1.0 - x).mean().item(),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    assert all(v.dim() == 0 and v.dtype == torch.float64 for v in found.values())
    without = output(logp).metrics(MASK.bool())
    assert without == {name: found[name] for name in without}
    assert set(found) - set(without) == {"ppo_kl", "ppo_kl_k3"}


def test_k3_of_tiny_log_ratios():
    """x^2 / 2, of which exp(x) - 1 - x keeps nothing in float32."""
    x = 2.0**-20  # steps that float32 has at -0.5
    logp = torch.full((6,), -0.5)
    found = output(logp).metrics(MASK, logp - x)
    assert found["ppo_kl_k3"].item() == pytest.approx(x * x / 2, rel=1e-5)
    assert found["ppo_kl"].item() == -x


def test_a_mask_of_zeros_gives_zeros():
    logp = torch.full((6,), torch.nan)
    found = output(logp).metrics(torch.zeros(6), logp)
    assert {value.item() for value in found.values()} == {0.0}


def test_nothing_waits_for_the_device():
    """A tensor of the meta device has no value to wait for."""
    logp = torch.zeros(6, device="meta")
    found = output(logp, "meta").metrics(MASK.to("meta"), logp)
    assert {value.device.type for value in found.values()} == {"meta"}


def test_a_loss_and_its_metrics():
    """Every bound acts: ratios 2, 2, 0.5, 4 and 1 of advantages 1, -1, -1, -1 and 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 20, generator=generator).requires_grad_()
    ids = torch.arange(5)
    gap = torch.tensor([2.0, 2.0, 0.5, 4.0, 1.0]).log()
    old_logp = token_stats(logits.detach(), ids).logp - gap
    advantages, mask = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0]), torch.ones(5)
    out = policy_loss(
        logits, ids, advantages, mask, old_logp=old_logp, objective=Objective(dual_clip=3.0)
    )
    found = out.metrics(mask, old_logp)
    shares = ("clipfrac", "clipfrac_high", "clipfrac_low", "clipfrac_dual")
    assert [found[name].item() for name in shares] == pytest.approx([0.6, 0.2, 0.2, 0.2])
    assert found["ppo_kl"].item() == pytest.approx(-gap.mean().item(), rel=1e-6)
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("name", ["mask", "old_logp"])
def test_a_tensor_of_another_shape_is_named(name):
    logp = torch.zeros(6)
    given = {"mask": MASK, "old_logp": logp, name: torch.zeros(6, 1)}
    message = f"{name}: expected shape (6,) like targets, got (6, 1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        output(logp).metrics(**given)
