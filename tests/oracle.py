"""What a kernel's result is held against, and how closely.

The formulas below restate the specification in the plainest torch and leave the derivatives to
autograd; they share no code with papo_kernels, whose reference backend is tested like any other.

The one tolerance rule: the error against these formulas in float64 is at most twice that of the
same formulas in float32 (float64 logits: zero) plus ``FLOOR``. Errors are measured in units of the
quantity's *scale*, the size of the terms that are added up to form it, element by element; so 1e-9
in a gradient of 1e-6 is as visible as 1e-3 in one of 1. Rounding to the dtype of the logits'
gradient is allowed on top.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from papo_kernels import PolicyLossOutput, TokenStats

if TYPE_CHECKING:
    from tests.cases import Case

# Eight units in the last place of float32; and what the float64 formulas may be off by themselves.
FLOOR = {torch.float32: 8 * 2.0**-23, torch.float64: 1e-11}
GOLDEN = Path(__file__).parent / "golden" / "cases.json"


def golden_cases() -> list[dict[str, Any]]:
    """The cases of ``golden/``; see the README there."""
    cases: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]
    return cases


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the outputs for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the specification in plain torch -----------------------------------------------------------


class _Dense(NamedTuple):
    """p and log p (0 where masked), `[N, vocab_size]`, and the statistics of the rows."""

    p: Tensor
    log_p: Tensor
    stats: TokenStats


def _dense(logits: Tensor, targets: Tensor, row: dict[str, Any]) -> _Dense:
    temperature, softcap = row["temperature"], row["softcap"]
    z = logits[:, : row["vocab_size"]]
    ignored = targets == -100
    z = torch.where(ignored[:, None], 0.0, z)
    at = torch.where(ignored, 0, targets)[:, None]
    bad = (z.isnan() | z.isposinf()).any(1) | z.isneginf().all(1)
    masked = z.isneginf()
    z = z * torch.where(bad, torch.nan, 1.0).to(z)[:, None]  # all of a bad row's gradient is NaN
    u = torch.where(masked, 0.0, z)
    u = softcap * torch.tanh(u / softcap) if softcap else u
    u = torch.where(masked, -torch.inf, u / temperature)
    masked_a = masked.gather(1, at)
    u = torch.where(masked_a, u.detach(), u)  # a sampled token of probability 0: no gradient
    log_p = torch.log_softmax(u, dim=1)
    logp = torch.where(masked_a, -torch.inf, log_p.gather(1, at))[:, 0]
    log_p = torch.where(masked, 0.0, log_p)
    p = torch.where(masked, 0.0, log_p.exp())
    entropy = -(p * log_p).sum(1)
    p_a, log_p_a = p.gather(1, at)[:, 0], log_p.gather(1, at)[:, 0]
    c = (p * p * (log_p + entropy[:, None])).sum(1) - p_a * (log_p_a + entropy)
    values = (logp, entropy, c, torch.logsumexp(u, 1).detach())
    shown = (torch.where(ignored, 0.0, torch.where(bad, torch.nan, x)) for x in values)
    return _Dense(p, log_p, TokenStats(*shown))


def plain_token_stats(
    logits: Tensor, targets: Tensor, *, dtype: torch.dtype = torch.float64, **row: Any
) -> TokenStats:
    """Section 1 of the specification in `dtype`, differentiable by autograd."""
    row = {"temperature": 1.0, "softcap": None, "vocab_size": None, **row}
    return _dense(logits.to(dtype), targets, row).stats


def plain_policy_loss(
    case: Case, dtype: torch.dtype = torch.float64, logits: Tensor | None = None
) -> PolicyLossOutput:
    """Sections 2 and 3 of the specification in `dtype`, `loss` differentiable in `logits`."""
    logits = case.logits if logits is None else logits
    token_weight = case.token_weight.to(dtype)
    ignored = (case.targets == -100) | (token_weight == 0)
    targets = torch.where(ignored, -100, case.targets)
    stats = plain_token_stats(logits, targets, dtype=dtype, **case.row)
    logp, entropy, c, A = stats.logp, stats.entropy, stats.unit_polarity, case.advantages.to(dtype)
    old = logp.detach() if case.old_logp is None else case.old_logp.to(dtype)
    ratio = torch.where(logp.isneginf() & (case.old_logp is None), 1.0, torch.exp(logp - old))
    polarity = (ratio * A * c).detach()
    weight, w = torch.ones_like(A), case.weighting
    if w is not None:
        h = torch.tanh(polarity / w.sigma)
        if w.shape == "sign":
            h = torch.where(c.abs() <= w.dead_zone, 0.0, polarity.sign())
        weight = w.scale * (1.0 + w.strength * w.phase * h)
    weight = torch.where(entropy.isnan(), torch.nan, weight)
    adv, p = weight.detach() * A, case.objective
    plain, bounded = ratio * adv, ratio.clamp(1.0 - p.clip_low, 1.0 + p.clip_high) * adv
    loss, clipped = -torch.minimum(plain, bounded), bounded < plain
    if p.dual_clip is not None:
        cap = (adv < 0) & (-p.dual_clip * adv < loss)
        loss, clipped = torch.where(cap, -p.dual_clip * adv, loss), clipped | cap
    if p.kl_coef:
        gap = case.ref_logp.to(dtype) - logp
        loss = loss + p.kl_coef * (gap.exp() - gap - 1.0)
    loss = loss - p.entropy_coef * entropy
    loss = torch.where(ignored, 0.0, token_weight * loss).sum()
    per_token = (logp, entropy, c, polarity, weight, ratio)
    shown = (torch.where(ignored, 0.0, x.detach()) for x in per_token)
    return PolicyLossOutput(loss, *shown, clipped & ~ignored)


# ---- the rule -----------------------------------------------------------------------------------


def assert_close(
    name: str,
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    scale: Tensor | float | None = None,
    *,
    floor: float | None = None,
    roundings: int = 1,
) -> None:
    """The tolerance rule of this module.

    Args:
        actual: the result under test; its dtype may be narrower than the accumulation's.
        exact: float64.
        plain: the same formulas in the accumulation dtype, which selects the floor.
        scale: broadcastable to `exact`, see above; by default the largest ``|exact|``.
        floor: another one than ``FLOOR``, where a test states why.
        roundings: how often `actual` was rounded to a narrow dtype of its own.
    """
    actual, exact = actual.detach(), exact.detach().double()
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}"
    acc = torch.float64 if plain.dtype == torch.float64 else torch.float32
    floor = FLOOR[acc] if floor is None else floor
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(actual) != kind(exact)
        assert not wrong.any(), f"{name}: {kind.__name__} differs at {_where(wrong)}"
    finite = exact.isfinite()
    scale = exact[finite].abs().amax() if scale is None and finite.any() else scale
    scale = torch.as_tensor(0.0 if scale is None else scale).to(exact).expand(exact.shape)
    # Below 2^-116 (float32) a flushed zero is as good as the value.
    scale = scale.nan_to_num(0.0) + 2.0**10 * torch.finfo(acc).tiny / floor
    info = torch.finfo(actual.dtype)
    rounding = roundings * (0.5 * info.eps * exact.abs() + info.smallest_normal * info.eps)
    rounding = torch.zeros_like(exact) if actual.dtype == acc else rounding
    error = torch.where(finite, ((actual.double() - exact).abs() - rounding) / scale, 0.0)
    of_plain = torch.where(finite, (plain.detach().double() - exact).abs() / scale, 0.0)
    allowed = 2.0 * (float(of_plain.nan_to_num(0.0).max()) if exact.numel() else 0.0) + floor
    wrong = error > allowed
    assert not wrong.any(), (
        f"{name}: error {float(error.max()):.3g} of the scale, allowed {allowed:.3g}; at "
        f"{_where(wrong)} got {float(actual[wrong][0])!r}, expected {float(exact[wrong][0])!r}"
    )


def _where(wrong: Tensor) -> str:
    return f"{tuple(wrong.nonzero()[0].tolist())} and {int(wrong.sum()) - 1} more"


# ---- whole calls --------------------------------------------------------------------------------


class _Scales(NamedTuple):
    """The sizes of what is summed up: per token, and (`row`) per element of the gradient."""

    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    lse: Tensor
    row: Tensor


def _scales(case: Case) -> _Scales:
    p, log_p, stats = _dense(case.logits.double(), case.targets, case.row)
    H, at = stats.entropy, case.targets.clamp(min=0)[:, None]
    p_a, log_p_a = p.gather(1, at)[:, 0], log_p.gather(1, at)[:, 0]
    row = p * (1.0 + log_p.abs() + H[:, None])
    if case.softcap:
        # The sampled token's 1 - p_a times 1 - tanh^2, which a rounding of tanh moves.
        row = row.scatter_add(1, at, 1.0 - p.gather(1, at))
    row = row / case.temperature
    padding = case.logits.shape[1] - row.shape[1]
    return _Scales(
        logp=1.0 + log_p_a.abs(),
        entropy=1.0 + H,
        unit_polarity=(p * p).sum(1) * (1.0 + H) + p_a * (1.0 + log_p_a.abs() + H),
        lse=1.0 + stats.lse.abs(),
        row=torch.nn.functional.pad(row, (0, padding)),
    )


def _leaf(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.detach().to(dtype).requires_grad_()


def check_token_stats(case: Case, backend: str | None, seed: int = 0) -> Tensor:
    """Every output of `token_stats` and the gradient for random upstream ones, which it returns."""
    acc, scales = acc_dtype(case.logits.dtype), _scales(case)
    g = torch.Generator().manual_seed(seed)
    upstream = torch.randn(3, len(case.targets), generator=g).to(case.logits.device, acc)

    logits = case.logits.detach().requires_grad_()
    actual = case.token_stats(logits, backend)
    results = []
    for dtype in (torch.float64, acc):
        leaf = _leaf(case.logits, dtype)
        stats = plain_token_stats(leaf, case.targets, dtype=dtype, **case.row)
        torch.autograd.backward(stats[:3], list(upstream.to(dtype)))
        results.append((stats, leaf.grad))
    (exact, exact_grad), (plain, plain_grad) = results
    for name, *values, scale in zip(
        TokenStats._fields, actual, exact, plain, scales[:4], strict=True
    ):
        assert values[0].dtype == acc, f"{name}: {values[0].dtype}"
        assert_close(name, *values, scale)
    (dlogits,) = torch.autograd.grad(actual[:3], logits, list(upstream))
    assert dlogits.dtype == logits.dtype
    scale = upstream.double().abs().amax(0)[:, None] * scales.row + exact_grad.abs()
    assert_close("dlogits", dlogits, exact_grad, plain_grad, scale)
    return dlogits


def check_policy_loss(case: Case, backend: str | None, factor: float = 1.0, **more: Any) -> Tensor:
    """Every output of `policy_loss` and the gradient of `factor * loss`, which it returns."""
    acc, s, p = acc_dtype(case.logits.dtype), _scales(case), case.objective
    logits = case.logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    # Not a leaf, so that inplace=True may have it.
    actual = case.policy_loss(logits.mul(1.0) if more.get("inplace") else logits, backend, **more)
    results = []
    for dtype in (torch.float64, acc):
        leaf = _leaf(case.logits, dtype)
        out = plain_policy_loss(case, dtype, leaf)
        (factor * out.loss).backward()
        results.append((out, leaf.grad))
    (exact, exact_grad), (plain, plain_grad) = results

    A, weight, ratio = (x.double().abs() for x in (case.advantages, exact.weight, exact.ratio))
    r = ratio * s.logp
    polarity = A * (r * exact.unit_polarity.abs() + ratio * s.unit_polarity)
    swing = weight if case.weighting is None else weight + polarity / float(case.weighting.sigma)
    dlogp = swing * A * r
    if p.kl_coef:
        dlogp = dlogp + p.kl_coef * (1.0 + (case.ref_logp.double() - exact.logp).exp()) * s.logp
    token_weight = case.token_weight.double().abs()
    dloss = token_weight * (dlogp + abs(p.entropy_coef) * s.entropy)
    scales = PolicyLossOutput(
        dloss.nan_to_num(0.0).sum(), *s[:3], polarity, weight=swing, ratio=r, clipped=s.logp
    )
    for name in PolicyLossOutput._fields[:-1]:
        values = [getattr(x, name) for x in (actual, exact, plain, scales)]
        assert values[0].dtype == acc, f"{name}: {values[0].dtype}"
        assert_close(name, *values)
    assert torch.equal(actual.clipped, exact.clipped)
    (dlogits,) = torch.autograd.grad(factor * actual.loss, logits)
    assert dlogits.dtype == logits.dtype
    scale = abs(factor) * dloss[:, None] * s.row + exact_grad.abs() * s.logp[:, None]
    # The gradient is stored by the forward pass and scaled by the backward pass.
    roundings = 1 if factor == 1.0 else 2
    assert_close("dlogits", dlogits, exact_grad, plain_grad, scale, roundings=roundings)
    return dlogits
