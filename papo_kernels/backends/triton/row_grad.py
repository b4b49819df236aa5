"""The gradient of one row as Triton helpers: see ``csrc/include/papo/row_grad.h``."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_state import HIGHEST, LN2, NEG_INF, floored, of_tanh, saturated, slope, tanh


class Upstream(NamedTuple):
    """The gradient's weights: of logp, entropy, unit polarity and lse."""

    logp: tl.tensor
    entropy: tl.tensor
    unit_polarity: tl.tensor
    lse: tl.tensor


class RowGrad(NamedTuple):
    """``dz_j = e_j (a0 + a1 s_j + e_j (b0 + b1 s_j))`` before the soft cap's slope, with ``e_j =
    2^y_j``, ``y_j = (z_j - z_ref) log2(e) / temperature`` and ``s_j = y_j - center``, near whose
    zero an element's gradient changes its sign. ``target`` is the sampled token's, complete."""

    z_ref: tl.tensor
    center: tl.tensor
    a0: tl.tensor
    a1: tl.tensor
    b0: tl.tensor
    b1: tl.tensor
    target: tl.tensor


# What all coefficients but a0 may be of float32, and the upstream gradients from which they come.
SHARE = tl.constexpr(3.4028234663852886e38 / 1024.0)


@triton.jit
def bounded(g, alive, most):
    """``g``, finite and at most ``most``: an infinite one would turn zeros of the row's gradient
    into NaN."""
    return tl.where(alive, saturated(g, most), 0.0)


@triton.jit
def row_grad(sums, r, g, token, s, HAS_SOFTCAP: tl.constexpr):
    """The gradient of g.logp logp + g.entropy H + g.unit_polarity c + g.lse lse.

    The derivation is in row_grad.h. With its ``Q = Q_r + p_a^2`` and ``c = S - p_a s_a`` the
    coefficients about ``d = mu`` are these.
    """
    # Where the sampled token has probability 0, no token of the row has a gradient.
    alive = r.logp != NEG_INF
    # A sum of several terms has to stay in float32.
    is_flat = (g.entropy == 0.0) & (g.unit_polarity == 0.0)
    most = tl.where(is_flat, HIGHEST, 0.75 * HIGHEST)
    g_logp = bounded(g.logp, alive, most)
    g_lse = bounded(g.lse, alive, tl.where(is_flat, HIGHEST, SHARE))
    g_entropy, gc = bounded(g.entropy, alive, SHARE), bounded(g.unit_polarity, alive, SHARE)
    c = r.unit_polarity
    spread = r.p_a * r.q - r.Q_r  # p_a - Q
    a0 = gc * (spread - 2.0 * c - r.p_a * r.s_a) - g_logp + g_lse
    a1 = gc * spread - g_entropy
    dc = -r.p_a * ((r.q * r.q + r.Q_r) * (1.0 + r.s_a) + 2.0 * c)
    target = g_logp * r.q - g_entropy * r.p_a * r.s_a + gc * dc + g_lse * r.p_a
    scale = tl.exp2(sums.shift) * r.inv_Z
    first = scale * s.inv_temperature
    second = scale * first * gc
    if HAS_SOFTCAP:
        # Of a saturated cap exactly 0.
        target *= slope(saturated(tl.div_rn(token.z, s.softcap), 1.0))
    return RowGrad(
        z_ref=sums.z_ref,
        center=r.mu - sums.shift,
        a0=saturated(first * a0, most),
        a1=saturated(first * a1 * LN2, SHARE),
        b0=saturated(second, SHARE),
        b1=saturated(second * (2.0 * LN2), SHARE),
        target=s.inv_temperature * target,
    )


@triton.jit
def gradient(z, grad, s, HAS_SOFTCAP: tl.constexpr, HAS_SQUARES: tl.constexpr):
    """dlogits of a block of float32 logits, except for the sampled token."""
    x = z
    if HAS_SOFTCAP:
        t = tanh(z * s.inv_softcap)
        x = of_tanh(z, t, s.softcap)
    y = floored((x - grad.z_ref) * s.log2_scale)
    e = tl.exp2(y)
    y -= grad.center
    factor = tl.fma(grad.a1, y, grad.a0)
    if HAS_SQUARES:
        factor = tl.fma(e, tl.fma(grad.b1, y, grad.b0), factor)
    dz = e * factor
    if HAS_SOFTCAP:
        dz *= slope(t)
    return dz
