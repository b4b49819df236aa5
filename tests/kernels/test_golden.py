"""Golden cases: statistics, loss and gradients computed elsewhere with 60 digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from papo_kernels import Objective, PolarityWeighting
from tests.cases import Case
from tests.oracle import acc_dtype, golden_cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {case["name"]: case for case in golden_cases()}


def logits_of(golden: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[-torch.inf if z is None else z for z in golden["logits"]]], dtype=dtype)


def is_exact(golden: dict[str, Any], dtype: torch.dtype) -> bool:
    return logits_of(golden, dtype).double().equal(logits_of(golden, torch.float64))


def build(golden: dict[str, Any], dtype: torch.dtype, device: str) -> Case:
    """The golden case as one row."""
    acc = acc_dtype(dtype)

    def token(value: float | None) -> torch.Tensor | None:
        return None if value is None else torch.tensor([value], dtype=acc, device=device)

    logits = logits_of(golden, dtype).to(device)
    weights = ("phase", "shape", "sigma", "scale")
    return Case(
        logits,
        torch.tensor([golden["target"]], device=device),
        temperature=golden["temperature"],
        softcap=golden["softcap"],
        advantages=token(golden["advantage"]),
        token_weight=token(1.0),
        old_logp=token(golden["old_logp"]),
        ref_logp=token(golden["ref_logp"]),
        objective=Objective(
            clip_low=golden["clip_low"],
            clip_high=golden["clip_high"],
            dual_clip=golden["dual_clip"],
            kl_coef=golden["beta"],
            entropy_coef=golden["alpha"],
        ),
        weighting=PolarityWeighting(golden["lam"], **{name: golden[name] for name in weights}),
    )


def assert_golden(name: str, actual: torch.Tensor, expected: Any) -> None:
    """The tolerance of golden/README.md, and half a unit in the last place of a narrow gradient."""
    exact = torch.tensor(expected, dtype=torch.float64)
    value = actual.detach().double().cpu().reshape(exact.shape)
    relative, absolute = (1e-10, 1e-10) if actual.dtype == torch.float64 else (1e-4, 2e-6)
    allowed = torch.clamp(relative * exact.abs(), min=absolute)
    if actual.dtype in (torch.bfloat16, torch.float16):
        allowed = allowed + 0.5 * torch.finfo(actual.dtype).eps * exact.abs()
    wrong = ~((value - exact).abs() <= allowed)
    assert not wrong.any(), f"{name}: got {value[wrong][0]}, expected {exact[wrong][0]}"


def test_logits_are_exact_in_bfloat16():
    assert all(is_exact(golden, torch.bfloat16) for golden in CASES.values())


@pytest.mark.parametrize("name", CASES)
def test_golden(name, backend, device, dtypes, sizes):
    third = DTYPES[list(CASES).index(name) % 3]
    for dtype in sizes(dtypes, {torch.float32, third}):
        if is_exact(CASES[name], dtype):  # a few are not in float16
            check(CASES[name], build(CASES[name], dtype, device), backend)


def check(golden: dict[str, Any], case: Case, backend: str) -> None:
    expected, upstream = golden["expected"], golden["upstream"]

    logits = case.logits.requires_grad_()
    stats = case.token_stats(logits, backend)
    for field in ("logp", "entropy", "unit_polarity"):
        assert_golden(field, getattr(stats, field), [expected[field]])
    c = expected["unit_polarity"]
    if abs(c) > 1e-5:
        assert torch.sign(stats.unit_polarity).item() == (1 if c > 0 else -1)
    total = sum(upstream[field] * getattr(stats, field).sum() for field in upstream)
    assert_golden("grad_stats", torch.autograd.grad(total, logits)[0], [expected["grad_stats"]])

    for inplace in (False, True):
        leaf = case.logits.detach().clone().requires_grad_()
        out = case.policy_loss(leaf.mul(1.0) if inplace else leaf, backend, inplace=inplace)
        for field in ("ratio", "polarity", "weight"):
            assert_golden(field, getattr(out, field), [expected[field]])
        assert_golden("loss", out.loss, expected["loss"])
        assert out.clipped.item() is expected["clipped"]
        assert_golden("grad_loss", torch.autograd.grad(out.loss, leaf)[0], [expected["grad_loss"]])
