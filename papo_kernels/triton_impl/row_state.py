"""The maths of one row as Triton helpers: its statistics and the coefficients of its gradient.

The formulas of ``csrc/include/papo/{row_state,row_grad}.h`` in the same notation, so the two can be
read side by side. With ``u = softcap(z) / temperature`` and ``d = u - row_max`` a row is

    Z = sum e^d      T = sum e^d d      Z2 = sum e^2d      T2 = sum e^2d d

from which log-probability, entropy and entropy polarity (arXiv 2605.11775) follow, and so do their
gradients. A lane sums in float32; Z and Z2 are float64 from there on. Until a row is complete its
maximum is kept in softcapped logits, where it is exact, and the sums in base 2: one multiplication
then serves the exponent and T.

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
# -max of float32: distances from an empty state's -inf are taken from here, not to get inf - inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Scaling(NamedTuple):
    """u = softcap(z) inv_temperature; ``log2_scale`` is log2(e) / temperature; ``elsewhere`` stands
    in for the logit of a token in another shard."""

    inv_temperature: tl.tensor
    log2_scale: tl.tensor
    softcap: tl.tensor
    elsewhere: tl.tensor


class Upstream(NamedTuple):
    """The gradient's weights: of logp, entropy and unit polarity."""

    logp: tl.tensor
    entropy: tl.tensor
    unit_polarity: tl.tensor


class LaneStates(NamedTuple):
    """The online states of a vector of lanes: ``z_max`` in softcapped logits, sums in base 2."""

    z_max: tl.tensor
    Z: tl.tensor
    T: tl.tensor
    Z2: tl.tensor
    T2: tl.tensor


class RowState(NamedTuple):
    """The state of a whole row, in nats and float64."""

    row_max: tl.tensor
    Z: tl.tensor
    T: tl.tensor
    Z2: tl.tensor
    T2: tl.tensor


class RowStats(NamedTuple):
    """What a finished row reports, float32, and what its gradient needs of it, float64."""

    logp: tl.tensor
    entropy: tl.tensor
    unit_polarity: tl.tensor
    lse: tl.tensor
    inv_Z: tl.tensor
    mu: tl.tensor  # T / Z
    Q: tl.tensor  # sum p^2
    S: tl.tensor  # sum p^2 (log p + H)
    p_a: tl.tensor  # of the sampled token
    s_a: tl.tensor  # log p_a + H
    one_minus_p_a: tl.tensor


class RowGrad(NamedTuple):
    """``dz_j = e_j (a0 + a1 s_j + e_j (b0 + b1 s_j))`` before the soft cap's slope, with ``e_j =
    2^y_j``, ``y_j = (z_j - z_ref) log2(e) / temperature`` and ``s_j = y_j - centre``, near whose
    zero an element's gradient changes its sign; ``target`` is all of the sampled token's."""

    z_ref: tl.tensor
    centre: tl.tensor
    a0: tl.tensor
    a1: tl.tensor
    b0: tl.tensor
    b1: tl.tensor
    target: tl.tensor


# ---- logits ---------------------------------------------------------------------------------


@triton.jit
def floored(d):
    return tl.maximum(d, FLOOR, propagate_nan=tl.PropagateNan.ALL)


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
def capped(z, softcap):
    """softcap * tanh(z / softcap); infinities pass: -inf stays masked and +inf stays bad."""
    return tl.where(tl.abs(z) == POS_INF, z, softcap * tanh(z * (1.0 / softcap)))


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
def merged(lanes, inv_temperature, log2_scale):
    """The lanes of a row as the row's state.

    Z and Z2 are added up in float64: a nearly certain token is 1 in both, and what the others add
    to it must keep its digits.
    """
    z_max = tl.max(lanes.z_max, 0)
    zeros = tl.zeros_like(lanes.Z)
    parts = added(lanes, zeros, zeros, zeros, zeros, z_max, log2_scale)
    # Two sums travel together: one exchange between warps instead of two.
    Z, Z2 = tl.split(tl.sum(tl.join(parts.Z, parts.Z2).to(tl.float64), 0))
    T, T2 = tl.split(tl.sum(tl.join(parts.T, parts.T2), 0))
    return RowState(
        z_max.to(tl.float64) * inv_temperature,  # exact: the product of two float32 numbers
        Z,
        T.to(tl.float64) * LN2,
        Z2,
        T2.to(tl.float64) * LN2,
    )


@triton.jit
def reciprocal(x):
    """1 / x of a float64 in the range of float32, to 1e-13; a division would call a subroutine."""
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    return y * (2.0 - x * y)


@triton.jit
def logit_at(u, s):
    """The float32 logit z with ``u = z inv_temperature``, exactly where there is one."""
    temperature = (1.0 / s.inv_temperature).to(tl.float64)
    z = u * temperature
    z = tl.minimum(tl.maximum(z, LOWEST), -LOWEST)  # a rounding may lift it out of float32
    z = z.to(tl.float32).to(tl.float64)
    return (z + (u - z * s.inv_temperature) * temperature).to(tl.float32)


@triton.jit
def finished(state, target_u):
    """Statistics of a whole row; ``target_u``, float64, is the sampled token's scaled logit.

    A handful of operations a row: in float64, so that the differences below keep their digits.
    """
    # Bad rows: Z is 0 where every logit is -inf and NaN where one is NaN or +inf; target_u is NaN
    # where the target is no column.
    Z = tl.where((state.Z > 0.0) & (target_u == target_u), state.Z, float("nan"))
    inv_Z = reciprocal(Z)
    log_Z = tl.log(Z.to(tl.float32)).to(tl.float64)
    mu = state.T * inv_Z
    Q = state.Z2 * inv_Z * inv_Z
    S = state.T2 * inv_Z * inv_Z - mu * Q
    d = target_u - state.row_max
    masked = d == NEG_INF
    e = tl.where(masked, 0.0, tl.exp(d.to(tl.float32))).to(tl.float64)
    p_a = e * inv_Z
    s_a = tl.where(masked, 0.0, d - mu)
    return RowStats(
        logp=(d - log_Z).to(tl.float32),
        entropy=(log_Z - mu).to(tl.float32),
        unit_polarity=(S - p_a * s_a).to(tl.float32),
        lse=(state.row_max + log_Z).to(tl.float32),
        inv_Z=inv_Z,
        mu=mu,
        Q=Q,
        S=S,
        p_a=p_a,
        s_a=s_a,
        one_minus_p_a=(Z - e) * inv_Z,
    )


# ---- gradients ------------------------------------------------------------------------------


@triton.jit
def row_grad(state, r, g, target_u, s, HAS_SOFTCAP: tl.constexpr):
    """The gradient of g.logp logp + g.entropy H + g.unit_polarity c; derivation in row_grad.h."""
    gc = g.unit_polarity
    a1 = gc * (r.p_a - r.Q) - g.entropy
    a0 = gc * (r.p_a - r.Q + r.p_a * r.s_a - 2.0 * r.S) - g.logp - a1 * r.mu
    b1 = 2.0 * gc
    b0 = gc * (1.0 - 2.0 * r.mu)
    q = r.one_minus_p_a
    Q_r = r.Q - r.p_a * r.p_a
    S_r = r.S - r.p_a * r.p_a * r.s_a
    dc = r.p_a * (2.0 * r.p_a * q * r.s_a - (q * q + Q_r) * (1.0 + r.s_a) - 2.0 * S_r)
    target = g.logp * q - g.entropy * r.p_a * r.s_a + gc * dc

    # From d = u - row_max and e^d to s and 2^y about a float32 logit: d = y ln(2) + shift. That
    # shift is 0 where row_max comes from these kernels, at most a rounding of it elsewhere.
    z_ref = logit_at(state.row_max, s)
    shift = z_ref.to(tl.float64) * s.inv_temperature - state.row_max
    scale = tl.exp(shift.to(tl.float32)) * r.inv_Z
    centre = (r.mu * LOG2E).to(tl.float32)
    shift += centre.to(tl.float64) * LN2
    # A sampled token of probability 0 has no gradient, nor have the others of its row.
    factor = tl.where(r.logp == NEG_INF, 0.0, s.inv_temperature.to(tl.float64))
    first = scale * factor
    second = scale * first
    if HAS_SOFTCAP:
        target *= slope(logit_at(target_u, s), s.softcap)
    return RowGrad(
        z_ref=z_ref,
        centre=centre,
        a0=(first * (a0 + a1 * shift)).to(tl.float32),
        a1=(first * a1 * LN2).to(tl.float32),
        b0=(second * (b0 + b1 * shift)).to(tl.float32),
        b1=(second * b1 * LN2).to(tl.float32),
        target=(factor * target).to(tl.float32),
    )


@triton.jit
def gradient(z, grad, s, HAS_SOFTCAP: tl.constexpr, HAS_SQUARES: tl.constexpr):
    """dlogits of a block of float32 logits, the sampled token's aside."""
    x = z
    if HAS_SOFTCAP:
        x = capped(z, s.softcap)
    y = floored((x - grad.z_ref) * s.log2_scale)
    e = tl.exp2(y)
    y -= grad.centre
    factor = tl.fma(grad.a1, y, grad.a0)
    if HAS_SQUARES:
        factor = tl.fma(e, tl.fma(grad.b1, y, grad.b0), factor)
    dz = e * factor
    if HAS_SOFTCAP:
        dz *= slope(x, s.softcap)
    return dz


@triton.jit
def slope(x, softcap):
    """d softcap(z) / dz at ``x = softcap(z)``; finite for a masked x, whose gradient is 0."""
    t = tl.maximum(x, -softcap) * (1.0 / softcap)
    # (1 - t)(1 + t) keeps its digits where the cap saturates.
    return (1.0 - t) * (1.0 + t)
