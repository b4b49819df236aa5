"""One token of the policy loss in closed form, on dense float64 tensors ``[N]``: its value, and its
derivatives by logp, by the log of the ratio, and by the entropy.

`Objective` has the formulas, ``docs/method.md`` where they come from. ``csrc/include/papo/
policy_loss.h`` and ``backends/triton/policy_loss.py`` are the same for one token at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objective import Objective
from .types import (
    CLIPPED_DUAL,
    CLIPPED_HIGH,
    CLIPPED_LOW,
    IGNORE_INDEX,
    INSIDE,
    TokenInputs,
    WeightingInputs,
)

_DPPO_EPS = 1e-8  # keeps the logarithms of the binary KL finite, as in verl


class TokenLoss(NamedTuple):
    """Of every token, ``[N]`` float64, its weights applied to the loss and the derivatives.

    `dlogp` is the derivative at a constant ratio, `dlog_ratio` that by the log of the ratio. A
    token's own ratio moves with its logp, so its whole derivative is their sum.
    """

    loss: Tensor
    polarity: Tensor
    weight: Tensor
    ratio: Tensor
    clip_side: Tensor  # uint8
    dlogp: Tensor
    dlog_ratio: Tensor
    dentropy: Tensor


class _Term(NamedTuple):
    """A term's value and derivatives, `[N]`."""

    value: Tensor
    dlogp: Tensor
    dlog_ratio: Tensor


class _Ratio(NamedTuple):
    """The ratio of the policies, `[N]`: `log` is clamped, and `moves` where it is not."""

    log: Tensor
    value: Tensor
    moves: Tensor
    old_logp: Tensor


# ---- products of what may overflow ---------------------------------------------------------------


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y, and 0 where either is, however large the other."""
    zero = ((x == 0) & ~y.isnan()) | ((y == 0) & ~x.isnan())
    return torch.where(zero, 0.0, x * y)


def _times_exp(x: Tensor, exponent: Tensor) -> Tensor:
    """The same for y = e^exponent, which may itself leave float64."""
    root = (0.5 * exponent).exp()
    far = _product(_product(x, root), root)
    return torch.where(exponent > 709, far, _product(x, exponent.exp()))


def saturated(slope: Tensor, acc: torch.dtype = torch.float64) -> Tensor:
    """`slope` in float64, at most as large as sums in `acc` hold. Infinite ones would turn a 0, or
    the sum of two of opposite signs, into NaN."""
    # In float64, in which the sums are formed, with room for a sum of such numbers.
    most = torch.finfo(acc).max / (1024.0 if acc == torch.float64 else 1.0)
    return slope.double().clamp(-most, most)


# ---- the weight ----------------------------------------------------------------------------------


def polarity_shape(
    polarity: Tensor,
    unit_polarity: Tensor,
    shape: str,
    sigma: float | Tensor,
    dead_zone: float | Tensor,
) -> Tensor:
    """h of `PolarityWeighting`, in the shape and dtype of `polarity`.

    Args:
        polarity, unit_polarity: float, of one shape.
        shape: "sign" or "tanh".
        sigma, dead_zone: numbers or 0-dim tensors.
    """
    if shape == "tanh":
        return torch.tanh(polarity / sigma)
    return torch.where(unit_polarity.abs() <= dead_zone, 0.0, polarity.sign())


def polarity_weight(
    h: Tensor, strength: float, phase: float | Tensor, scale: float | Tensor
) -> Tensor:
    """w of `PolarityWeighting`, in the shape and dtype of `h`; `phase` and `scale` are numbers or
    0-dim tensors. At a strength or phase of 0 it is exactly `scale`, whatever h is."""
    swing = strength * phase
    return scale * (1.0 + torch.where(torch.zeros_like(h) + swing == 0, 0.0, swing * h))


def _weight(w: WeightingInputs | None, polarity: Tensor, unit_polarity: Tensor) -> Tensor:
    if w is None:
        return torch.ones_like(polarity)
    h = polarity_shape(polarity, unit_polarity, w.shape, w.sigma.double(), w.dead_zone)
    return polarity_weight(h, w.strength, w.phase.double(), w.scale.double())


# ---- the surrogates ------------------------------------------------------------------------------


def _side(low: Tensor, high: Tensor, dual: Tensor | None = None) -> Tensor:
    side = torch.where(low, CLIPPED_LOW, torch.where(high, CLIPPED_HIGH, INSIDE))
    if dual is not None:
        side = torch.where(dual, CLIPPED_DUAL, side)
    return side.to(torch.uint8)


def _divergence(objective: Objective, logp: Tensor, old_logp: Tensor) -> Tensor:
    """Of DPPO, > 0 where the token has become more likely."""
    p, p_old = logp.exp(), old_logp.exp()
    if objective.surrogate == "dppo_tv":
        return p - p_old
    rest, old_rest = (-torch.expm1(x).clamp(max=0.0) for x in (logp, old_logp))
    odds = (old_rest + _DPPO_EPS) / (rest + _DPPO_EPS)
    kl = _product(p_old, old_logp - logp) + old_rest * odds.log()
    return torch.where(p > p_old, kl, torch.where(p < p_old, -kl, 0.0))


def _surrogate(
    objective: Objective, advantage: Tensor, token_weight: Tensor, ratio: _Ratio, logp: Tensor
) -> tuple[_Term, Tensor]:
    """The policy term of every token and the bound that acted on it; `advantage` is A'."""
    positive, negative, name = advantage > 0, advantage < 0, objective.surrogate
    other = objective.negative_clip or (objective.clip_low, objective.clip_high)
    r, scaled, none = ratio.value, _product(token_weight, advantage), torch.zeros_like(advantage)
    # Sums, as a choice of two numbers would be float32.
    clip_low = torch.where(positive, none + objective.clip_low, none + other[0])
    clip_high = torch.where(positive, none + objective.clip_high, none + other[1])
    if name.startswith("dppo"):
        divergence = _divergence(objective, logp, ratio.old_logp)
        low, high = ~positive & (divergence < -clip_low), positive & (divergence > clip_high)
        cap = torch.inf if objective.ratio_cap is None else objective.ratio_cap
        kept = torch.where(r > cap, scaled * cap, _times_exp(scaled, ratio.log))
        kept = torch.where(low | high, 0.0, kept)
        return _Term(-_product(kept, logp), -kept, none), _side(low, high)
    if name == "sapo":
        positive_t, other_t = objective.sapo_temperature
        t = torch.where(positive, none + positive_t, none + other_t)
        gate, rest = torch.sigmoid(t * (r - 1.0)), torch.sigmoid(-t * (r - 1.0))
        slope = _times_exp(4.0 * gate * rest * scaled, ratio.log)
        return _Term(-4.0 * gate * scaled / t, none, -slope), _side(none > 0, none > 0)

    lo, hi = 1.0 - clip_low, 1.0 + clip_high
    low, high = r < lo, r > hi
    plain = _times_exp(scaled, ratio.log)
    if name == "cispo":
        kept = torch.where(low, lo * scaled, torch.where(high, hi * scaled, plain))
        return _Term(-_product(kept, logp), -kept, none), _side(low, high)
    low, high = low & negative, high & positive
    if name == "ce_gppo":
        low_scale, high_scale = objective.gppo_scale
        beyond = torch.where(low, low_scale * lo, high_scale * hi) * scaled
        kept = torch.where(low | high, beyond, plain)
        return _Term(-kept, none, -kept), _side(low, high)
    dual = torch.zeros_like(low)
    bounded = torch.where(low, lo, hi)
    if objective.dual_clip is not None:
        dual = negative & (r > objective.dual_clip)
        bounded = torch.where(dual, objective.dual_clip, bounded)
    side = _side(low, high, dual)
    clipped = side != INSIDE
    value = torch.where(clipped, bounded * scaled, plain)
    return _Term(-value, none, torch.where(clipped, 0.0, -plain)), side


# ---- the KL term ---------------------------------------------------------------------------------


def _kl(objective: Objective, logp: Tensor, ref_logp: Tensor, scale: Tensor, r: _Ratio) -> _Term:
    """`scale` is the coefficient times the token's weight."""
    x, name = logp - ref_logp, objective.kl_value
    growth = torch.expm1(-x) if name == "k3" else torch.zeros_like(x)
    if name == "k1":
        value, slope = x, torch.ones_like(x)
    elif name == "k2":
        value, slope = 0.5 * x * x, x
    elif name == "abs":
        value, slope = x.abs(), x.sign()
    else:
        value, slope = torch.where(growth.isposinf(), growth, growth + x), -growth
    if objective.kl_limit is not None:
        beyond = value.abs() > objective.kl_limit
        value = value.clamp(-objective.kl_limit, objective.kl_limit)
        slope, growth = torch.where(beyond, 0.0, slope), torch.where(beyond, 0.0, growth)
    if objective.kl_slope_of_k2:
        slope = x
    exponent = r.log if objective.kl_ratio else torch.zeros_like(x)
    # Where e^-x leaves float64, its weight or the ratio may bring it back.
    far, vanishes = growth.isposinf(), exponent.isneginf()
    far_value = _times_exp(scale, torch.where(vanishes, exponent, exponent - x))
    value = torch.where(far, far_value, _times_exp(_product(scale, value), exponent))
    if objective.kl_estimator == "k3":
        slope = torch.where(far, -far_value, _times_exp(_product(scale, slope), exponent))
    else:
        slope = _times_exp(_product(scale, slope), exponent)
    return _Term(value, slope, value if objective.kl_ratio else torch.zeros_like(value))


# ---- the token -----------------------------------------------------------------------------------


def weightless(tokens: TokenInputs) -> Tensor:
    """Which tokens contribute nothing, `[N]` bool: no term has a weight."""
    weights = (tokens.token_weight, tokens.kl_weight, tokens.entropy_weight)
    zero = [w == 0 for w in weights if w is not None]
    return torch.stack(zero).all(dim=0) if len(zero) > 1 else zero[0]


def left_out(targets: Tensor, tokens: TokenInputs) -> Tensor:
    """Which tokens contribute nothing, `[N]` bool: they are ignored, or no term has a weight."""
    return (targets == IGNORE_INDEX) | weightless(tokens)


def _ratio(objective: Objective, logp: Tensor, tokens: TokenInputs) -> _Ratio:
    if tokens.log_ratio is not None:
        log = tokens.log_ratio.double()
        old_logp = logp - log
    elif tokens.old_logp is not None:
        old_logp = tokens.old_logp.double()
        log = logp - old_logp
    else:
        old_logp, log = logp, torch.zeros_like(logp)
    limit, moves = objective.log_ratio_limit, torch.ones_like(log, dtype=torch.bool)
    if limit is not None:
        moves, log = ~(log.abs() > limit), log.clamp(-limit, limit)
    return _Ratio(log, log.exp(), moves, old_logp)


def token_loss(
    logp: Tensor,
    entropy: Tensor,
    unit_polarity: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    weighting: WeightingInputs | None,
) -> TokenLoss:
    """The loss of every token, from statistics ``[N]`` float64."""
    ratio = _ratio(objective, logp, tokens)
    advantages, token_weight = tokens.advantages.double(), tokens.token_weight.double()
    polarity = _times_exp(_product(advantages, unit_polarity), ratio.log)
    weight = _weight(weighting, polarity, unit_polarity)
    policy, side = _surrogate(objective, weight * advantages, token_weight, ratio, logp)
    loss, dlogp, dlog_ratio = policy
    if tokens.ref_logp is not None and objective.kl_coef != 0:
        kl_weight = token_weight if tokens.kl_weight is None else tokens.kl_weight.double()
        scale = objective.kl_coef * kl_weight
        kl = _kl(objective, logp, tokens.ref_logp.double(), scale, ratio)
        loss, dlogp = loss + kl.value, saturated(dlogp) + saturated(kl.dlogp)
        dlog_ratio = saturated(dlog_ratio) + saturated(kl.dlog_ratio)
    given = tokens.entropy_weight
    entropy_weight = token_weight if given is None else given.double()
    coef = torch.zeros_like(entropy_weight) - objective.entropy_coef
    dentropy = _product(coef, entropy_weight)
    loss = loss + _product(dentropy, entropy)
    dlogp, dlog_ratio = saturated(dlogp), saturated(torch.where(ratio.moves, dlog_ratio, 0.0))
    return TokenLoss(loss, polarity, weight, ratio.value, side, dlogp, dlog_ratio, dentropy)
