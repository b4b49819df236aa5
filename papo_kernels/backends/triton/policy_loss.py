"""One token of the policy loss as Triton helpers: see ``csrc/include/papo/policy_loss.h``.

``o`` is the objective, the numbers of `fused_loss.LossNumbers`. What it is besides its numbers is a
kernel's variant: a kernel holds one surrogate and one estimator of KL.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from papo_kernels import types

from .row_state import HIGHEST, NEG_INF, POS_INF, saturated, tanh

INSIDE = tl.constexpr(types.INSIDE)
CLIPPED_LOW = tl.constexpr(types.CLIPPED_LOW)
CLIPPED_HIGH = tl.constexpr(types.CLIPPED_HIGH)
CLIPPED_DUAL = tl.constexpr(types.CLIPPED_DUAL)


class TokenOut(NamedTuple):
    """What the objective gives for one token, its weights applied."""

    loss: tl.tensor
    polarity: tl.tensor
    weight: tl.tensor
    ratio: tl.tensor
    clip_side: tl.tensor
    dlogp: tl.tensor
    dentropy: tl.tensor


class Exponential(NamedTuple):
    """e^x, kept as a square where it leaves float32: a product with a small number may not."""

    root: tl.tensor
    square: tl.tensor  # root or 1


class Ratio(NamedTuple):
    """The ratio of a token. Its log is clamped, and does not move where the clamp acts."""

    log: tl.tensor
    exp: Exponential
    value: tl.tensor
    old_logp: tl.tensor
    moves: tl.tensor


class Advantage(NamedTuple):
    """A' of a token, and the clip of its sign."""

    positive: tl.tensor
    negative: tl.tensor
    weighted: tl.tensor  # A' times the token's weight
    clip_low: tl.tensor
    clip_high: tl.tensor


class Term(NamedTuple):
    """A term of the loss and its derivative by logp."""

    value: tl.tensor
    dlogp: tl.tensor


# ---- products of what may overflow ----------------------------------------------------------


@triton.jit
def product(x, y):
    """x y, and 0 where either is, however large the other."""
    is_zero = ((x == 0.0) & (y == y)) | ((y == 0.0) & (x == x))
    return tl.where(is_zero, 0.0, x * y)


@triton.jit
def exponential(x):
    is_far = x > 88.0
    root = tl.exp(tl.where(is_far, 0.5 * x, x))
    return Exponential(root, tl.where(is_far, root, 1.0))


@triton.jit
def times(e, x):
    """x times an `Exponential`, like `product`."""
    is_zero = ((x == 0.0) & (e.root == e.root)) | ((e.root == 0.0) & (x == x))
    return tl.where(is_zero, 0.0, x * e.root * e.square)


@triton.jit
def expm1_pair(x):
    """e^x - 1 - x and e^x - 1, by series where the direct forms cancel."""
    series = tl.fma(x, 1.0 / 5040.0, 1.0 / 720.0)
    series = tl.fma(x, series, 1.0 / 120.0)
    series = tl.fma(x, series, 1.0 / 24.0)
    series = tl.fma(x, series, 1.0 / 6.0)
    series = x * x * tl.fma(x, series, 0.5)
    small = tl.abs(x) < 0.25
    growth = tl.where(small, x + series, tl.exp(x) - 1.0)
    return tl.where(small, series, tl.where(growth == POS_INF, growth, growth - x)), growth


# ---- the weight and the ratio ---------------------------------------------------------------


@triton.jit
def polarity_weight(polarity, unit_polarity, token, o):
    """s (1 + strength phase h(polarity)); exactly s where strength or phase is 0."""
    h = tl.where(polarity > 0.0, 1.0, tl.where(polarity < 0.0, -1.0, 0.0))
    # Deterministic tokens sit at the rounding noise of c; their sign means nothing.
    h = tl.where(tl.abs(unit_polarity) <= o.dead_zone, 0.0, h)
    if o.is_tanh > 0.0:
        h = tanh(polarity / token.sigma)
    swing = o.strength * token.phase
    return tl.where(swing == 0.0, token.scale, token.scale * (1.0 + swing * h))


@triton.jit
def ratio_of(logp, token, o, bad):
    has_old = o.has_old > 0.0
    log = tl.where(o.has_log_ratio > 0.0, token.old, tl.where(has_old, logp - token.old, 0.0))
    log = tl.where(bad, float("nan"), log)  # and with it all that is made of it
    limit = o.log_ratio_limit
    clamped = tl.where(log > limit, limit, tl.where(log < -limit, -limit, log))
    exp = exponential(clamped)
    return Ratio(
        log=clamped,
        exp=exp,
        value=exp.root * exp.square,
        old_logp=tl.where(has_old, token.old, logp - log),
        moves=(tl.abs(log) > limit) == 0,
    )


# ---- the surrogates -------------------------------------------------------------------------


@triton.jit
def side_of(low, high):
    return tl.where(low, CLIPPED_LOW, tl.where(high, CLIPPED_HIGH, INSIDE))


@triton.jit
def clip_term(o, a, r):
    low, high = 1.0 - a.clip_low, 1.0 + a.clip_high
    side = side_of(a.negative & (r.value < low), a.positive & (r.value > high))
    side = tl.where(a.negative & (r.value > o.dual_clip), CLIPPED_DUAL, side)
    bound = tl.where(side == CLIPPED_HIGH, high, o.dual_clip)
    bound = tl.where(side == CLIPPED_LOW, low, bound)
    plain = times(r.exp, a.weighted)
    is_inside = side == INSIDE
    value = tl.where(is_inside, plain, bound * a.weighted)
    # d(-r A')/dlogp = -r A', since dr/dlogp = r.
    return Term(-value, tl.where(is_inside & r.moves, -plain, 0.0)), side


@triton.jit
def cispo_term(a, r, logp):
    low, high = 1.0 - a.clip_low, 1.0 + a.clip_high
    side = side_of(r.value < low, r.value > high)
    beyond = tl.where(side == CLIPPED_LOW, low, high) * a.weighted
    kept = tl.where(side == INSIDE, times(r.exp, a.weighted), beyond)
    return Term(-product(kept, logp), -kept), side


@triton.jit
def sapo_term(o, a, r):
    t = tl.where(a.positive, o.sapo_positive, o.sapo_other)
    x = t * (r.value - 1.0)
    gate, rest = 1.0 / (1.0 + tl.exp(-x)), 1.0 / (1.0 + tl.exp(x))
    slope = times(r.exp, 4.0 * gate * rest * a.weighted)
    return Term(-4.0 * gate * a.weighted / t, tl.where(r.moves, -slope, 0.0)), INSIDE


@triton.jit
def dppo_divergence(logp, old_logp, SURROGATE: tl.constexpr):
    """Negative where the token has become less likely."""
    p, old = tl.exp(logp), tl.exp(old_logp)
    if SURROGATE == "dppo_tv":
        return p - old
    else:
        EPS: tl.constexpr = 1e-8  # keeps the logarithms finite, as in verl
        rest = tl.maximum(-expm1_pair(logp)[1], 0.0)
        old_rest = tl.maximum(-expm1_pair(old_logp)[1], 0.0)
        odds = (old_rest + EPS) / (rest + EPS)
        kl = product(old, old_logp - logp) + old_rest * tl.log(odds)
        return tl.where(p > old, kl, tl.where(p < old, -kl, 0.0))


@triton.jit
def dppo_term(o, a, r, logp, SURROGATE: tl.constexpr):
    divergence = dppo_divergence(logp, r.old_logp, SURROGATE)
    low, high = divergence < -a.clip_low, divergence > a.clip_high
    side = side_of((a.positive == 0) & low, a.positive & high)
    capped = tl.where(r.value > o.ratio_cap, a.weighted * o.ratio_cap, times(r.exp, a.weighted))
    kept = tl.where(side == INSIDE, capped, 0.0)
    return Term(-product(kept, logp), -kept), side


@triton.jit
def ce_gppo_term(o, a, r):
    low, high = 1.0 - a.clip_low, 1.0 + a.clip_high
    side = side_of(a.negative & (r.value < low), a.positive & (r.value > high))
    beyond = tl.where(side == CLIPPED_LOW, o.gppo_low * low, o.gppo_high * high) * a.weighted
    kept = tl.where(side == INSIDE, times(r.exp, a.weighted), beyond)
    return Term(-kept, tl.where(r.moves, -kept, 0.0)), side


@triton.jit
def surrogate_term(o, adv, token_weight, r, logp, SURROGATE: tl.constexpr):
    """The policy term, and the side of the bound that acted on it; ``adv`` is A'."""
    positive = adv > 0.0
    a = Advantage(
        positive=positive,
        negative=adv < 0.0,
        weighted=product(token_weight, adv),
        clip_low=tl.where(positive, o.clip_low, o.negative_low),
        clip_high=tl.where(positive, o.clip_high, o.negative_high),
    )
    if SURROGATE == "clip":
        return clip_term(o, a, r)
    elif SURROGATE == "cispo":
        return cispo_term(a, r, logp)
    elif SURROGATE == "sapo":
        return sapo_term(o, a, r)
    elif SURROGATE == "ce_gppo":
        return ce_gppo_term(o, a, r)
    else:
        return dppo_term(o, a, r, logp, SURROGATE)


# ---- the KL term ----------------------------------------------------------------------------


@triton.jit
def weighed(x, scale, r, how):
    if how.KL_RATIO:
        return times(r.exp, product(scale, x))
    else:
        return product(scale, x)


@triton.jit
def far_k3_term(x, scale, r, how):
    """Where e^-x, or its product with the weight, may leave float32. The weight, or the ratio,
    which is infinitely small for a masked token, may bring it back."""
    exponent = -x
    if how.KL_RATIO:
        exponent = tl.where(r.log == NEG_INF, NEG_INF, exponent + r.log)
    value = times(exponential(exponent), scale)
    dlogp = -value
    if how.KL_SLOPE_OF_K2:
        dlogp = weighed(x, scale, r, how)
    if how.KL_RATIO:
        dlogp = saturated(dlogp, HIGHEST) + saturated(tl.where(r.moves, value, 0.0), HIGHEST)
    return Term(value, dlogp)


@triton.jit
def kl_term(o, logp, ref_logp, scale, r, how):
    """``scale`` is the coefficient times the token's weight."""
    x = logp - ref_logp
    value, slope = x, tl.full([], 1.0, tl.float32)
    if how.KL_ESTIMATOR == "k2":
        value, slope = 0.5 * x * x, x
    elif how.KL_ESTIMATOR == "abs":
        value, slope = tl.abs(x), tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
    elif how.KL_ESTIMATOR == "k3":
        value, growth = expm1_pair(-x)
        slope = -growth
    beyond = tl.abs(value) > o.kl_limit
    value = tl.where(beyond, tl.where(value > 0.0, o.kl_limit, -o.kl_limit), value)
    slope = tl.where(beyond, 0.0, slope)
    if how.KL_SLOPE_OF_K2:
        slope = x
    if how.KL_RATIO:
        slope += tl.where(r.moves, value, 0.0)  # before the ratio can make both infinite
    term = Term(weighed(value, scale, r, how), weighed(slope, scale, r, how))
    if how.KL_ESTIMATOR == "k3":
        far = far_k3_term(x, scale, r, how)
        is_far = growth == POS_INF
        if how.KL_RATIO:
            is_far = -x > 40.0  # from here on nothing of k3 but e^-x counts
        is_far = is_far & (beyond == 0)
        return Term(
            tl.where(is_far, far.value, term.value), tl.where(is_far, far.dlogp, term.dlogp)
        )
    else:
        return term


# ---- the token ------------------------------------------------------------------------------


@triton.jit
def policy_token(row, token, o, how):
    """The loss of one token; ``row`` has its statistics."""
    bad = row.entropy != row.entropy
    r = ratio_of(row.logp, token, o, bad)
    polarity = times(r.exp, product(token.advantage, row.unit_polarity))
    weight = tl.where(bad, float("nan"), 1.0)
    if o.has_weighting > 0.0:
        weight *= polarity_weight(polarity, row.unit_polarity, token, o)
    adv = weight * token.advantage
    policy, side = surrogate_term(o, adv, token.token_weight, r, row.logp, how.SURROGATE)
    loss, dlogp = policy.value, policy.dlogp
    if o.kl_coef != 0.0:
        scale = product(o.kl_coef, tl.load(token.kl_weight_at))
        kl = kl_term(o, row.logp, tl.load(token.ref_logp_at), scale, r, how)
        loss += kl.value
        dlogp = saturated(dlogp, HIGHEST) + saturated(kl.dlogp, HIGHEST)
    dentropy = product(-o.entropy_coef, token.entropy_weight)
    return TokenOut(
        loss=loss + product(dentropy, row.entropy),
        polarity=polarity,
        weight=weight,
        ratio=r.value,
        clip_side=side,
        dlogp=dlogp,
        dentropy=dentropy,
    )
