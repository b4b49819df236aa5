"""A compiled graph serves every value of a call's numbers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from papo_kernels import Compute, Head, Logits, LogProbs, Objective, PolarityWeighting, policy_loss

pytestmark = pytest.mark.plumbing
B, T, V, D = 2, 3, 7, 4


def loss_of(kind, level, x, tokens, k):
    """A loss every number of which depends on `k`."""
    targets, advantages, token_weight, old_logp, ref_logp, weight = tokens
    objective = Objective(
        0.1 + k,
        0.2 + k,
        2.0 + k,
        0.01 + k,
        0.02 + k,
        negative_clip=(0.1 + k / 2, 0.2 + k / 3),
        ratio_level=level,
        log_ratio_limit=5.0 + k,
        kl_limit=7.0 + k,
    )
    logits = {
        "logits": lambda: Logits(x, softcap=10.0 + k),
        "head": lambda: Head(weight, softcap=10.0 + k, logit_scale=1.0 + k)(x),
        "log-probs": lambda: LogProbs(x[..., 0], x[..., 1], x[..., 2]),
    }[kind]()
    return policy_loss(
        logits,
        targets,
        advantages,
        token_weight,
        old_logp=old_logp,
        ref_logp=ref_logp,
        objective=objective,
        weighting=PolarityWeighting(0.3 + k, 0.1 + k, "sign", 1.0 + k, 1.0 + k, 1e-6 + k / 100),
        temperature=1.0 if kind == "log-probs" else 0.7 + k,
        compute=Compute("reference"),
    ).loss


@pytest.mark.parametrize(
    ("kind", "level"), [("logits", "token"), ("head", "token"), ("log-probs", "sequence")]
)
def test_no_compilation_per_number(kind, level):
    """Twelve values of all of them, with eager's results and gradients; the second compilation is
    the last, where the first takes the values for constants."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager" if kind == "logits" else "eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    g = torch.Generator().manual_seed(0)
    draws = [torch.randn(B, T, generator=g) for _ in range(4)]
    tokens = [torch.randint(V, (B, T), generator=g), draws[0], draws[1].abs(), draws[2] - 2.0]
    tokens += [draws[3] - 2.0, torch.randn(V, D, generator=g)]
    values = torch.randn(B, T, D if kind == "head" else V, generator=g)
    counts, losses = [], set()
    for i in range(12):
        k, results = 0.001 + 0.013 * i, []
        for run in (loss_of, compiled):
            leaf = values.clone().requires_grad_()
            loss = run(kind, level, leaf, tokens, k)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
        losses.add(results[0][0].item())
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 11
    assert len(losses) == 12
