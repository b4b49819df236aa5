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

from papo_kernels import Objective, PolicyLossOutput, TokenStats

if TYPE_CHECKING:
    from tests.cases import Case

# Eight units in the last place of float32; and what the float64 formulas may be off by themselves.
FLOOR = {torch.float32: 8 * 2.0**-23, torch.float64: 1e-11}
GOLDEN = Path(__file__).parent / "golden"


def golden_cases() -> list[dict[str, Any]]:
    """The rows of ``golden/``; see the README there."""
    cases: list[dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())["cases"]
    return cases


def golden_objectives() -> dict[str, Any]:
    """The batch of ``golden/``, and its losses by objective."""
    objectives: dict[str, Any] = json.loads((GOLDEN / "objectives.json").read_text())
    return objectives


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
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits)[:, None]
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
    values = (logp, entropy, c, torch.logsumexp(u, 1))
    shown = (torch.where(ignored, 0.0, torch.where(bad, torch.nan, x)) for x in values)
    return _Dense(p, log_p, TokenStats(*shown))


def plain_token_stats(
    logits: Tensor, targets: Tensor, *, dtype: torch.dtype = torch.float64, **row: Any
) -> TokenStats:
    """Section 1 of the specification in `dtype`, differentiable by autograd."""
    row = {"temperature": 1.0, "softcap": None, "vocab_size": None, **row}
    return _dense(logits.to(dtype), targets, row).stats


class _Ratio(NamedTuple):
    """log r and r, differentiable, and the old policy's log-probs, `[N]`."""

    log: Tensor
    value: Tensor
    old_logp: Tensor


def _ratio(case: Case, logp: Tensor) -> _Ratio:
    own = torch.where(logp.isneginf(), 0.0, logp)
    if case.log_ratio is not None:
        log = case.log_ratio.to(logp) + own - own.detach()
    elif case.old_logp is not None:
        log = logp - case.old_logp.to(logp)
    else:
        log = own - own.detach()
    old_logp = (logp - log).detach() if case.old_logp is None else case.old_logp.to(logp)
    if case.objective.log_ratio_limit is not None:
        log = log.clamp(-case.objective.log_ratio_limit, case.objective.log_ratio_limit)
    return _Ratio(log, log.exp(), old_logp)


def divergence(surrogate: str, logp: Tensor, old_logp: Tensor) -> Tensor:
    """Of dppo, as verl has it: of two distributions over the sampled token and all others."""
    p, old = logp.exp(), old_logp.exp()
    if surrogate == "dppo_tv":
        return (p - old).abs()
    return old * (old_logp - logp) + (1 - old) * torch.log((1 - old + 1e-8) / (1 - p + 1e-8))


def _surrogate(o: Objective, adv: Tensor, logp: Tensor, ratio: _Ratio) -> tuple[Tensor, Tensor]:
    """The policy term of every token, and the bound that acted on it: low 1, high 2, dual 3."""
    r, positive, zero = ratio.value, adv > 0, torch.zeros_like(adv)
    negative_low, negative_high = o.negative_clip or (o.clip_low, o.clip_high)
    clip_low = torch.where(positive, zero + o.clip_low, zero + negative_low)
    clip_high = torch.where(positive, zero + o.clip_high, zero + negative_high)
    lo, hi = 1.0 - clip_low, 1.0 + clip_high
    side = torch.zeros_like(adv, dtype=torch.uint8)
    if o.surrogate == "sapo":
        tau = torch.where(positive, zero + o.sapo_temperature[0], zero + o.sapo_temperature[1])
        return -torch.sigmoid(tau * (r - 1.0)) * 4.0 / tau * adv, side
    if o.surrogate.startswith("dppo"):
        far = divergence(o.surrogate, logp, ratio.old_logp).detach()
        side[~positive & (far > clip_low) & (logp < ratio.old_logp)] = 1
        side[positive & (far > clip_high) & (logp > ratio.old_logp)] = 2
        kept = r.clamp(max=torch.inf if o.ratio_cap is None else o.ratio_cap).detach()
        return -kept * adv * logp * (side == 0), side
    if o.surrogate == "cispo":
        side[r < lo], side[r > hi] = 1, 2
        return -r.clamp(lo, hi).detach() * adv * logp, side
    side[(r < lo) & (adv < 0)], side[(r > hi) & positive] = 1, 2
    if o.surrogate == "ce_gppo":
        kept = torch.where(side == 1, o.gppo_scale[0] * lo, o.gppo_scale[1] * hi) / r.detach()
        return -torch.where(side == 0, 1.0, kept) * r * adv, side
    loss = torch.maximum(-adv * r, -adv * r.clamp(lo, hi))
    if o.dual_clip is not None:
        side[(r > o.dual_clip) & (adv < 0)] = 3
        loss = torch.where(adv < 0, torch.minimum(loss, -adv * o.dual_clip), loss)
    return loss, side


def kl_estimate(o: Objective, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Of every token, without coefficient, weight and ratio."""
    x = logp - ref_logp
    of_name = {"k1": x, "k2": x.square() / 2, "k3": (-x).exp() + x - 1.0, "abs": x.abs()}
    kl = of_name[o.kl_estimator.rstrip("+")]
    if o.kl_limit is not None:
        kl = kl.clamp(-o.kl_limit, o.kl_limit)
    k2 = of_name["k2"]
    return k2 - k2.detach() + kl.detach() if o.kl_estimator.endswith("+") else kl


def plain_policy_loss(
    case: Case, dtype: torch.dtype = torch.float64, logits: Tensor | None = None
) -> PolicyLossOutput:
    """The loss of docs/method.md in `dtype`, differentiable in `logits`."""
    logits = case.logits if logits is None else logits
    policy_weight, kl_weight, entropy_weight = (w.to(dtype) for w in case.weights)
    ignored = (policy_weight == 0) & (kl_weight == 0) & (entropy_weight == 0)
    ignored |= case.targets == -100
    targets = torch.where(ignored, -100, case.targets)
    stats = plain_token_stats(logits, targets, dtype=dtype, **case.row)
    logp, entropy, c, A = stats.logp, stats.entropy, stats.unit_polarity, case.advantages.to(dtype)
    ratio = _ratio(case, logp)
    polarity = (ratio.value * A * c).detach()
    weight, w = torch.ones_like(A), case.weighting
    if w is not None:
        h = torch.tanh(polarity / w.sigma)
        if w.shape == "sign":
            h = torch.where(c.abs() <= w.dead_zone, 0.0, polarity.sign())
        weight = w.scale * (1.0 + w.strength * w.phase * h)
    weight = torch.where(entropy.isnan(), torch.nan, weight)
    o = case.objective
    policy, side = _surrogate(o, weight.detach() * A, logp, ratio)
    loss = policy_weight * policy - entropy_weight * o.entropy_coef * entropy
    if o.kl_coef:
        kl = kl_estimate(o, logp, case.ref_logp.to(dtype))
        kl = kl * ratio.value if o.kl_ratio else kl
        loss = loss + kl_weight * o.kl_coef * kl
    loss = torch.where(ignored, 0.0, loss).sum()
    per_token = (logp, entropy, c, polarity, weight, ratio.value)
    shown = (torch.where(ignored, 0.0, x.detach()) for x in per_token)
    return PolicyLossOutput(loss, *shown, torch.where(ignored | entropy.isnan(), 0, side))


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
    temperature = case.temperature
    row = row / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
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
    upstream = torch.randn(4, len(case.targets), generator=g).to(case.logits.device, acc)

    logits = case.logits.detach().requires_grad_()
    actual = case.token_stats(logits, backend)
    results = []
    for dtype in (torch.float64, acc):
        leaf = _leaf(case.logits, dtype)
        stats = plain_token_stats(leaf, case.targets, dtype=dtype, **case.row)
        torch.autograd.backward(stats, list(upstream.to(dtype)))
        results.append((stats, leaf.grad))
    (exact, exact_grad), (plain, plain_grad) = results
    for name, *values, scale in zip(
        TokenStats._fields, actual, exact, plain, scales[:4], strict=True
    ):
        assert values[0].dtype == acc, f"{name}: {values[0].dtype}"
        assert_close(name, *values, scale)
    (dlogits,) = torch.autograd.grad(actual, logits, list(upstream))
    assert dlogits.dtype == logits.dtype
    scale = upstream.double().abs().amax(0)[:, None] * scales.row + exact_grad.abs()
    assert_close("dlogits", dlogits, exact_grad, plain_grad, scale)
    return dlogits


class _LossScales(NamedTuple):
    """The sizes of a token's terms: of its polarity and weight, of its loss, and of the derivative
    by its logp and entropy."""

    polarity: Tensor
    weight: Tensor
    value: Tensor
    slope: Tensor


def _loss_scales(case: Case, exact: PolicyLossOutput, s: _Scales) -> _LossScales:
    o, r, weights = case.objective, exact.ratio, [w.double().abs() for w in case.weights]
    A, weight, logp = case.advantages.double().abs(), exact.weight.abs(), s.logp
    polarity = A * r * (logp * exact.unit_polarity.abs() + s.unit_polarity)
    if case.weighting is not None:
        weight = weight + polarity / float(case.weighting.sigma)
    adv = weight * A
    # What a token that is clipped below keeps is larger than its ratio, and at most 1.
    kept = torch.where(exact.clip_side == 1, r.clamp(min=1.0), r) * logp
    value = slope = adv * kept
    if o.surrogate == "sapo":
        t = torch.tensor(o.sapo_temperature, dtype=r.dtype, device=r.device)
        value = adv * 4.0 / t.min() * logp
        slope = adv * (r + t.max() * r * r) * logp
    elif o.surrogate == "cispo" or o.surrogate.startswith("dppo"):
        value = value * logp
    elif o.surrogate == "ce_gppo":
        value = slope = slope * max(1.0, *o.gppo_scale)
    value, slope = weights[0] * value, weights[0] * slope
    if o.kl_coef:
        x = exact.logp - case.ref_logp.double()
        kl = 1.0 + x * x + ((-x).exp() if o.kl_estimator.startswith("k3") else 0.0)
        kl = weights[1] * o.kl_coef * kl * logp * (r * logp if o.kl_ratio else 1.0)
        value, slope = value + kl, slope + kl
    bonus = weights[2] * abs(o.entropy_coef) * s.entropy
    return _LossScales(polarity, weight, value + bonus, slope + bonus)


def slope_scale(case: Case, exact: PolicyLossOutput, magnitude: Tensor) -> Tensor:
    """`[N]`: the size of the terms that add up to a token's derivative by logp, where its logits
    are sums of terms of this magnitude."""
    s = _scales(case)
    s = s._replace(logp=magnitude * s.logp, unit_polarity=magnitude * s.unit_polarity)
    return _loss_scales(case, exact, s).slope


def sampled_token_scale(case: Case, exact: PolicyLossOutput, slope: Tensor) -> Tensor:
    """`[N]`: the size of the terms that add up to the gradient at the sampled token. It is 1 - p_a
    times a sum of slopes, those of the surrogate and of the KL term, which may cancel."""
    alive = exact.logp.isfinite()
    return torch.where(alive, slope * -torch.expm1(exact.logp), 0.0) / case.temperature


def check_policy_loss(case: Case, backend: str | None, factor: float = 1.0, **more: Any) -> Tensor:
    """Every output of `policy_loss` and the gradient of `factor * loss`, which it returns."""
    acc, s = acc_dtype(case.logits.dtype), _scales(case)
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

    loss = _loss_scales(case, exact, s)
    value, ratio = loss.value.nan_to_num(0.0).sum(), exact.ratio * s.logp
    scales = PolicyLossOutput(value, *s[:3], loss.polarity, loss.weight, ratio, s.logp)
    for name in PolicyLossOutput._fields[:-1]:
        values = [getattr(x, name) for x in (actual, exact, plain, scales)]
        assert values[0].dtype == acc, f"{name}: {values[0].dtype}"
        assert_close(name, *values)
    assert torch.equal(actual.clip_side, exact.clip_side)
    (dlogits,) = torch.autograd.grad(factor * actual.loss, logits)
    assert dlogits.dtype == logits.dtype
    at, sampled = case.targets.clamp(min=0)[:, None], sampled_token_scale(case, exact, loss.slope)
    scale = (loss.slope[:, None] * s.row).scatter_add(1, at, sampled[:, None])
    scale = abs(factor) * scale + exact_grad.abs() * s.logp[:, None]
    # The gradient is stored by the forward pass and scaled by the backward pass.
    roundings = 1 if factor == 1.0 else 2
    assert_close("dlogits", dlogits, exact_grad, plain_grad, scale, roundings=roundings)
    return dlogits
