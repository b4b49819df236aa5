"""Golden cases: statistics, losses and gradients computed with 60 digits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from papo_kernels import Objective, PolarityWeighting
from papo_kernels.types import Sequences
from tests.cases import Case
from tests.oracle import acc_dtype, golden_cases, golden_objectives

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {case["name"]: case for case in golden_cases()}
OBJECTIVES = golden_objectives()
LOSSES = {case["name"]: case for case in OBJECTIVES["losses"]}


# ---- a row: every option of a row's statistics -------------------------------------------------


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


# ---- a batch: every objective ------------------------------------------------------------------


def build_batch(golden: dict[str, Any], dtype: torch.dtype, device: str) -> Case:
    """The batch as this golden case uses it."""
    batch, acc = OBJECTIVES["batch"], acc_dtype(dtype)
    tokens = {
        name: torch.tensor(values, dtype=acc, device=device)
        for name, values in batch.items()
        if name not in ("logits", "targets", "sequences", "upstream_stats")
    }
    logits = [[-torch.inf if z is None else z for z in row] for row in batch["logits"]]
    of_rows = golden.get("temperature") == "rows"
    return Case(
        torch.tensor(logits, dtype=dtype, device=device),
        torch.tensor(batch["targets"], device=device),
        temperature=tokens["temperatures"] if of_rows else OBJECTIVES["temperature"],
        softcap=golden.get("softcap"),
        advantages=tokens["advantages"],
        token_weight=tokens["policy_weight"],
        old_logp=tokens["old_logp"],
        ref_logp=tokens["ref_logp"],
    )


def with_objective(case: Case, golden: dict[str, Any]) -> Case:
    batch, device, acc = OBJECTIVES["batch"], case.logits.device, case.advantages.dtype
    own = {}
    if "weights" in golden:
        for name in ("kl_weight", "entropy_weight"):
            own[name] = torch.tensor(batch[name], dtype=acc, device=device)
    ratio = golden.get("ratio")
    if ratio == "none":
        own["old_logp"] = None
    elif ratio == "given":
        own["log_ratio"] = torch.tensor(batch["log_ratio"], dtype=acc, device=device)
    elif ratio == "sequences":
        ids = torch.tensor(batch["sequences"], device=device)
        own["old_logp"] = Sequences(case.old_logp, ids)
    if "shape" in golden:
        own["weighting"] = PolarityWeighting(shape=golden["shape"], **OBJECTIVES["weighting"])
    pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in golden["objective"].items()}
    return replace(case, objective=Objective(**pairs), **own)


@pytest.mark.parametrize("name", LOSSES)
def test_golden_objectives(name, backend, device, dtypes, sizes):
    golden = LOSSES[name]
    expected, reduces = golden["expected"], golden["objective"].get("reduce", True)
    upstream = None if reduces else OBJECTIVES["batch"]["upstream"]
    for dtype in sizes(dtypes, (torch.float32,)):
        case = with_objective(build_batch(golden, dtype, device), golden)
        leaf = case.logits.requires_grad_()
        out = case.policy_loss(leaf, backend)
        for field in ("ratio", "polarity", "weight"):
            assert_golden(field, getattr(out, field), expected[field])
        assert out.clip_side.tolist() == expected["clip_side"]
        loss = expected["loss"]
        assert_golden("loss", out.loss, sum(loss) if reduces else loss)
        given = None if reduces else torch.tensor(upstream).to(out.loss)
        assert_golden("grad", torch.autograd.grad(out.loss, leaf, given)[0], expected["grad"])


def test_golden_gradients_of_statistics(backend, device, dtypes, sizes):
    """lse among them."""
    upstream = torch.tensor(OBJECTIVES["batch"]["upstream_stats"], dtype=torch.float64)
    for golden in OBJECTIVES["statistics"]:
        for dtype in sizes(dtypes, (torch.float32,)):
            case = build_batch(golden, dtype, device)
            leaf = case.logits.requires_grad_()
            stats = case.token_stats(leaf, backend)
            for field, value in stats._asdict().items():
                assert_golden(field, value, golden["expected"][field])
            grad = torch.autograd.grad(stats, leaf, list(upstream.to(stats.logp)))[0]
            assert_golden("grad", grad, golden["expected"]["grad"])
