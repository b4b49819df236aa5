"""One token of the policy loss as Triton helpers: see ``csrc/include/papo/policy_loss.h``."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_state import POS_INF, tanh


class TokenOut(NamedTuple):
    """What the objective gives for one token; the derivatives have ``token_weight`` applied."""

    loss: tl.tensor
    polarity: tl.tensor
    weight: tl.tensor
    ratio: tl.tensor
    clipped: tl.tensor
    dlogp: tl.tensor
    dentropy: tl.tensor


@triton.jit
def k3(gap):
    """e^gap - gap - 1 and e^gap - 1, by series where the direct forms cancel."""
    series = tl.fma(gap, 1.0 / 5040.0, 1.0 / 720.0)
    series = tl.fma(gap, series, 1.0 / 120.0)
    series = tl.fma(gap, series, 1.0 / 24.0)
    series = tl.fma(gap, series, 1.0 / 6.0)
    series = gap * gap * tl.fma(gap, series, 0.5)
    small = tl.abs(gap) < 0.25
    growth = tl.where(small, gap + series, tl.exp(gap) - 1.0)
    value = tl.where(small, series, tl.where(growth == POS_INF, growth, growth - gap))
    return value, growth


@triton.jit
def polarity_weight(polarity, unit_polarity, token, objective):
    """s (1 + strength phase h(polarity)); exactly s where strength or phase is 0."""
    h = tl.where(polarity > 0.0, 1.0, tl.where(polarity < 0.0, -1.0, 0.0))
    # Deterministic tokens sit at the rounding noise of c; their sign means nothing.
    h = tl.where(tl.abs(unit_polarity) <= objective.dead_zone, 0.0, h)
    if objective.is_tanh > 0.0:
        h = tanh(polarity / token.sigma)
    swing = objective.strength * token.phase
    return tl.where(swing == 0.0, token.scale, token.scale * (1.0 + swing * h))


@triton.jit
def policy_token(r, token, objective):
    """The clipped objective of one token with its optional terms; see policy_loss.h."""
    bad = r.entropy != r.entropy
    ratio = tl.where(objective.has_old > 0.0, tl.exp(r.logp - token.old_logp), 1.0)
    ratio = tl.where(bad, float("nan"), ratio)  # and with it all that is made of it
    polarity = ratio * token.advantage * r.unit_polarity
    weight = tl.where(bad, float("nan"), 1.0)
    if objective.has_weighting > 0.0:
        weight *= polarity_weight(polarity, r.unit_polarity, token, objective)
    adv = weight * token.advantage

    low, high = 1.0 - objective.clip_low, 1.0 + objective.clip_high
    clamped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    plain = ratio * adv
    bounded = clamped * adv
    # min() takes the unclipped branch on a tie, where both have the same gradient.
    clipped = bounded < plain
    loss = -tl.where(clipped, bounded, plain)
    cap = -objective.dual_clip * adv
    above = (objective.dual_clip > 0.0) & (adv < 0.0) & (cap < loss)
    loss = tl.where(above, cap, loss)
    clipped = clipped | above
    dlogp = tl.where(clipped, 0.0, -plain)  # d(-r A')/dlogp = -r A', since dr/dlogp = r

    if objective.kl_coef != 0.0:
        divergence, growth = k3(token.ref_logp - r.logp)
        loss = tl.fma(objective.kl_coef, divergence, loss)
        dlogp = tl.fma(-objective.kl_coef, growth, dlogp)
    loss = tl.fma(-objective.entropy_coef, r.entropy, loss)
    return TokenOut(
        loss=token.token_weight * loss,
        polarity=polarity,
        weight=weight,
        ratio=ratio,
        clipped=clipped,
        dlogp=token.token_weight * dlogp,
        dentropy=-token.token_weight * objective.entropy_coef,
    )
