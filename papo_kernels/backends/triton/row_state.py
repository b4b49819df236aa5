"""The math of one row as Triton helpers: its state and its statistics.

The formulas of ``csrc/include/papo/row_state.h`` in the same notation, so the two can be read side
by side. With ``u = softcap(z) / temperature`` and ``d = u - row_max`` a row is

    Z = sum e^d      T = sum e^d d      Z2 = sum e^2d      T2 = sum e^2d d

from which log-probability, entropy and entropy polarity (arXiv 2605.11775) follow, and so do their
gradients. The arithmetic is float32: the largest logit's terms are kept out of Z and Z2, so that
what the others add keeps its digits. Only the stored state is float64, whose arithmetic runs at
half to a 64th of the speed. Inside a row the maximum is kept in softcapped logits, where it is
exact, and the sums in base 2: one multiplication then serves the exponent and T.

Wherever two kernels must agree to the last bit, every fused multiply-add is spelled out and the
kernels are compiled with contraction off.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))
# 2^-200 and e^-200 are 0 in float32. Distances are floored here so that a masked logit adds
# 0 * -200 = -0 to T and T2, where 0 * -inf would add NaN.
FLOOR = tl.constexpr(-200.0)
# The ends of float32. Distances from an empty state's -inf are taken from the lowest, to avoid
# inf - inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
HIGHEST = tl.constexpr(3.4028234663852886e38)


class Scaling(NamedTuple):
    """u = softcap(z) inv_temperature, a number of which ``inv_temperature_low`` is what rounding to
    float32 left over; ``log2_scale`` is log2(e) / temperature; ``elsewhere`` stands in for the
    logit of a token in another shard."""

    inv_temperature: tl.tensor
    inv_temperature_low: tl.tensor
    log2_scale: tl.tensor
    softcap: tl.tensor
    inv_softcap: tl.tensor
    elsewhere: tl.tensor


class LaneStates(NamedTuple):
    """The online states of a vector of lanes: ``z_max`` in softcapped logits, sums in base 2."""

    z_max: tl.tensor
    Z: tl.tensor
    T: tl.tensor
    Z2: tl.tensor
    T2: tl.tensor


class RowSums(NamedTuple):
    """A whole row, float32, its sums in base 2 about ``row_max``.

    The largest logit is 1 in Z and in Z2. What the others add is kept apart, so that it has all its
    digits where that logit is nearly certain.
    """

    row_max: tl.tensor  # u
    rest: tl.tensor  # Z - 1
    T: tl.tensor
    rest2: tl.tensor  # Z2 - 1
    T2: tl.tensor
    z_ref: tl.tensor  # a logit at row_max, or the nearest to it
    shift: tl.tensor  # (u of z_ref - row_max) log2(e)


class Sampled(NamedTuple):
    """The sampled token: its softcapped logit, and its u - row_max, which is ``d + d_low``."""

    z: tl.tensor
    d: tl.tensor
    d_low: tl.tensor


class RowStats(NamedTuple):
    """What a finished row reports, and what its gradient needs of it."""

    logp: tl.tensor
    entropy: tl.tensor
    unit_polarity: tl.tensor
    lse: tl.tensor
    inv_Z: tl.tensor
    mu: tl.tensor  # T / Z in base 2
    p_a: tl.tensor  # of the sampled token
    q: tl.tensor  # 1 - p_a
    s_a: tl.tensor  # log p_a + H
    Q_r: tl.tensor  # sum p^2 of all other tokens


# ---- logits ---------------------------------------------------------------------------------


@triton.jit
def floored(d):
    return tl.maximum(d, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def saturated(x, most):
    """x, at most ``most`` in size; NaN stays."""
    x = tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    # Both branches to about one ulp; 1 - 2 / (e^2x + 1) alone loses small x to cancellation.
    s = x * x
    poly = tl.fma(s, -5.70498872745e-3, 2.06390887954e-2)
    poly = tl.fma(poly, s, -5.37397155531e-2)
    poly = tl.fma(poly, s, 1.33314422036e-1)
    poly = tl.fma(poly, s, -3.33332819422e-1)
    small = tl.fma(poly * s, x, x)
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def of_tanh(z, t, softcap):
    """softcap(z) from ``t = tanh(z / softcap)``; -inf stays masked and +inf stays bad."""
    return tl.where(tl.abs(z) == POS_INF, z, softcap * t)


@triton.jit
def capped(z, s):
    return of_tanh(z, tanh(z * s.inv_softcap), s.softcap)


@triton.jit
def slope(t):
    """d softcap(z) / dz where ``t = tanh(z / softcap)``."""
    # (1 - t)(1 + t) keeps its digits where the cap saturates.
    return (1.0 - t) * (1.0 + t)


# ---- statistics -----------------------------------------------------------------------------


@triton.jit
def empty_states(LANES: tl.constexpr):
    zeros = tl.zeros([LANES], tl.float32)
    return LaneStates(tl.full([LANES], NEG_INF, tl.float32), zeros, zeros, zeros, zeros)


@triton.jit
def single_states(z, log2_scale):
    """Every lane's state after one softcapped logit."""
    y = floored((z - tl.maximum(z, LOWEST)) * log2_scale)
    e = tl.exp2(y)
    return LaneStates(z, e, e * y, e * e, e * (e * y))


@triton.jit
def added(state, Z, T, Z2, T2, z_max, log2_scale):
    """``state`` moved to the larger maximum ``z_max``, plus sums that are about that maximum."""
    shift = floored((state.z_max - tl.maximum(z_max, LOWEST)) * log2_scale)
    alpha = tl.exp2(shift)
    beta = alpha * alpha
    return LaneStates(
        z_max,
        tl.fma(alpha, state.Z, Z),
        tl.fma(alpha, tl.fma(shift, state.Z, state.T), T),
        tl.fma(beta, state.Z2, Z2),
        tl.fma(beta, tl.fma(shift, state.Z2, state.T2), T2),
    )


@triton.jit
def updated(state, tile, log2_scale):
    """The lanes' states with a tile added: blocks ``[LANES, WIDTH]`` of softcapped logits.

    A lane is one thread, so nothing here crosses threads.
    """
    top = tile[0]
    for i in tl.static_range(1, len(tile)):
        top = tl.maximum(top, tile[i])
    z_max = tl.maximum(state.z_max, tl.max(top, 1))
    reference = tl.maximum(z_max, LOWEST)[:, None]
    y = floored((tile[0] - reference) * log2_scale)
    Z = tl.exp2(y)
    T = Z * y
    Z2 = Z * Z
    T2 = Z * T
    for i in tl.static_range(1, len(tile)):
        y = floored((tile[i] - reference) * log2_scale)
        e = tl.exp2(y)
        ey = e * y
        Z += e
        T += ey
        Z2 = tl.fma(e, e, Z2)
        T2 = tl.fma(e, ey, T2)
    sums = (tl.sum(Z, 1), tl.sum(T, 1), tl.sum(Z2, 1), tl.sum(T2, 1))
    return added(state, sums[0], sums[1], sums[2], sums[3], z_max, log2_scale)


@triton.jit
def combined(a, b, log2_scale):
    """Lane by lane the state of both parts. An empty or all -inf part is the identity."""
    z_max = tl.maximum(a.z_max, b.z_max)
    zeros = tl.zeros_like(z_max)
    moved = added(b, zeros, zeros, zeros, zeros, z_max, log2_scale)
    return added(a, moved.Z, moved.T, moved.Z2, moved.T2, z_max, log2_scale)


@triton.jit
def ordered(bits):
    """The bits of float32 numbers as integers in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def merged(lanes, s):
    """The lanes of a row as the row's sums."""
    # A warp finds the maximum of integers, and their sum, in one instruction.
    z_max = tl.max(ordered(lanes.z_max.to(tl.int32, bitcast=True)), 0)
    z_max = ordered(z_max).to(tl.float32, bitcast=True)
    zeros = tl.zeros_like(lanes.Z)
    parts = added(lanes, zeros, zeros, zeros, zeros, z_max, s.log2_scale)
    # A lane with the largest logit has exactly 1 of it in Z and Z2: subtracted without rounding.
    top = tl.where(lanes.z_max == z_max, 1.0, 0.0)
    n_top = tl.sum(top.to(tl.int32), 0).to(tl.float32)
    # Four sums travel together: one exchange between warps instead of four.
    sums = tl.join(tl.join(parts.Z - top, parts.Z2 - top), tl.join(parts.T, parts.T2))
    of_Z, of_T = tl.split(tl.sum(sums, 0))
    rest, rest2 = tl.split(of_Z)
    T, T2 = tl.split(of_T)
    more = n_top - 1.0
    shift = tl.full([], 0.0, tl.float32)
    return RowSums(z_max * s.inv_temperature, rest + more, T, rest2 + more, T2, z_max, shift)


@triton.jit
def left_over(a, b, total):
    """What rounding a + b to ``total`` left over."""
    of_b = total - a
    return (a - (total - of_b)) + (b - of_b)


@triton.jit
def sampled(z, z_max, s):
    """The token of softcapped logit ``z``. Halves: a difference may leave float32."""
    a, b = 0.5 * z, -0.5 * z_max
    half = a + b
    d = half * s.inv_temperature
    low = tl.fma(half, s.inv_temperature, -d) + half * s.inv_temperature_low
    low += left_over(a, b, half) * s.inv_temperature
    d *= 2.0
    return Sampled(z, d, tl.where(tl.abs(d) < POS_INF, low * 2.0, 0.0))


@triton.jit
def finished(sums, token):
    """Statistics of a whole row."""
    # Bad rows: Z is 0 where every logit is -inf and NaN where one is NaN or +inf; the token's d is
    # NaN where the target is not a column.
    good = (sums.rest > -1.0) & (token.d == token.d)
    Z = tl.where(good, 1.0 + sums.rest, float("nan"))
    inv_Z = 1.0 / Z
    log_Z = tl.log(Z)
    mu = sums.T * inv_Z
    masked = token.d == NEG_INF
    d = tl.where(masked, 0.0, token.d)
    e = tl.where(masked, 0.0, tl.exp2(d * LOG2E))
    ee = e * e
    # Of all tokens but the sampled one, whose own terms are 1, 0, 1, 0 where it is the largest.
    q = ((1.0 - e) + sums.rest) * inv_Z
    inv_Z2 = inv_Z * inv_Z
    Q_r = ((1.0 - ee) + sums.rest2) * inv_Z2
    # KL estimators grow as e^-logp, so its last digit counts.
    logp = token.d - log_Z
    low = left_over(token.d, -log_Z, logp) + token.d_low
    logp = tl.where(masked, logp, logp + low)
    S_r = ((sums.T2 * LN2 - ee * d) * inv_Z2) - (mu * LN2) * Q_r
    p_a = e * inv_Z
    s_a = tl.where(masked, 0.0, d - mu * LN2)
    return RowStats(
        logp=logp,
        entropy=log_Z - mu * LN2,
        unit_polarity=S_r - p_a * q * s_a,
        lse=sums.row_max + log_Z,
        inv_Z=inv_Z,
        mu=mu,
        p_a=p_a,
        q=q,
        s_a=s_a,
        Q_r=Q_r,
    )


# ---- the row's state, float64 in nats -------------------------------------------------------


@triton.jit
def logit_at(u, s):
    """The float32 logit z with ``u = z inv_temperature``, exactly where there is one."""
    temperature = (1.0 / s.inv_temperature).to(tl.float64)
    z = u * temperature
    z = tl.minimum(tl.maximum(z, LOWEST), HIGHEST)  # a rounding may lift it out of float32
    z = z.to(tl.float32).to(tl.float64)
    return (z + (u - z * s.inv_temperature) * temperature).to(tl.float32)


@triton.jit
def loaded_state(at, s):
    """The row and the sampled token of a state; its maximum may be that of another shard."""
    row_max = tl.load(at)
    target_u = tl.load(at + 5)
    z_ref = logit_at(row_max, s)
    shift = z_ref.to(tl.float64) * s.inv_temperature - row_max
    rest = (tl.load(at + 1) - 1.0).to(tl.float32)
    sums = RowSums(
        row_max.to(tl.float32),
        tl.where(s.inv_temperature == s.inv_temperature, rest, float("nan")),
        (tl.load(at + 2) * LOG2E).to(tl.float32),
        (tl.load(at + 3) - 1.0).to(tl.float32),
        (tl.load(at + 4) * LOG2E).to(tl.float32),
        z_ref,
        shift.to(tl.float32) * LOG2E,
    )
    d = target_u - row_max
    high = d.to(tl.float32)
    low = tl.where(tl.abs(high) < POS_INF, (d - high).to(tl.float32), 0.0)
    return sums, Sampled(logit_at(target_u, s), high, low)


@triton.jit
def store_state(at, sums, token, s, active):
    """A row's state as one vector: each lane converts one number."""
    k = tl.arange(0, 8)
    value = tl.where(k == 0, sums.z_ref, token.z)
    value = tl.where(k == 1, sums.rest, value)
    value = tl.where(k == 2, sums.T, value)
    value = tl.where(k == 3, sums.rest2, value)
    value = tl.where(k == 4, sums.T2, value)
    is_sum = (k == 1) | (k == 3)
    in_base_2 = (k == 2) | (k == 4)
    one = tl.full([], 1.0, tl.float64)
    unit = tl.where(in_base_2, one * LN2, tl.where(is_sum, one, s.inv_temperature.to(tl.float64)))
    state = value.to(tl.float64) * unit + tl.where(is_sum, one, 0.0)
    tl.store(at + k, tl.where(active, state, 0.0), mask=k < 6)
