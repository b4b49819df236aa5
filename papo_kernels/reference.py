"""The eager oracle: the definitions, and their derivatives, on dense float64 tensors.

Every other backend is tested against this one. It works on any device, computes in float64 whatever
the dtype of the logits, holds several ``[N, V]`` float64 temporaries, and is never optimized. The
formulas come first. The four functions after them are those of the backend protocol
(``backends/protocol.py``), which documents their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import Objective
from .token_loss import left_out, saturated, token_loss
from .types import (
    ELSEWHERE,
    IGNORE_INDEX,
    INSIDE,
    RowParams,
    TokenInputs,
    WeightingInputs,
    acc_dtype,
)


class _Rows(NamedTuple):
    """The rows of logits without the values that must not be read, and which rows are left out."""

    logits: Tensor  # [N, vocab_size] float64, ignored rows 0
    targets: Tensor  # [N], 0 where ignored or out of range, ELSEWHERE
    ignored: Tensor  # [N] bool
    spoiled: Tensor  # [N] bool: NaN or +inf, a target or a temperature out of range
    bad: Tensor  # [N] bool: spoiled, or nothing but -inf


def _rows(
    logits: Tensor, targets: Tensor, ignored: Tensor, row: RowParams, state: Tensor | None
) -> _Rows:
    z = torch.where(ignored[:, None], 0.0, logits[:, : row.vocab_size].double())
    known = ignored | ((targets >= 0) & (targets < row.vocab_size))
    if row.sharded:
        known |= targets == ELSEWHERE
    if row.temperatures is not None:
        known &= ignored | ((row.temperatures > 0) & (row.temperatures < torch.inf))
    if state is None:
        spoiled = (z.isnan() | z.isposinf()).any(dim=1) | ~known
        bad = spoiled | z.isneginf().all(dim=1)
    else:
        spoiled = state[:, 1].isnan() | ~known
        bad = spoiled | (state[:, 1] == 0)
    return _Rows(z, torch.where(ignored | ~known, 0, targets), ignored, spoiled, bad)


def _scaled(logits: Tensor, row: RowParams) -> Tensor:
    """u = softcap(z) / temperature; a masked (-inf) logit stays masked and gets no gradient."""
    masked = logits.isneginf()
    z = torch.where(masked, 0.0, logits)
    if row.softcap:
        z = row.softcap * torch.tanh(z / row.softcap)
    return torch.where(masked, -torch.inf, z / row.temperature_of_rows())


class _Statistics(NamedTuple):
    """[N], but for p and log_p [N, vocab_size]. Where p is 0, so is log_p: 0 * -inf is NaN."""

    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    lse: Tensor
    Q: Tensor  # sum p^2
    R: Tensor  # sum p^2 log p
    p: Tensor
    log_p: Tensor


def _statistics(rows: _Rows, row: RowParams) -> _Statistics:
    """The statistics of good rows by their definitions."""
    u = _scaled(rows.logits, row)
    row_max = u.amax(dim=1)
    # Relative to the maximum: beside a large common offset log V would be lost.
    d = u - row_max[:, None]
    log_Z = torch.logsumexp(d, dim=1)
    masked = d.isneginf()
    log_p = torch.where(masked, 0.0, d - log_Z[:, None])
    p = torch.where(masked, 0.0, log_p.exp())
    entropy = -(p * log_p).sum(dim=1)
    logp = _target_logit(d, rows.targets) - log_Z
    Q, R = (p * p).sum(dim=1), (p * p * log_p).sum(dim=1)
    state_term = (p * p * (log_p + entropy[:, None])).sum(dim=1)
    c = state_term + _sampled_term(logp, entropy)
    return _Statistics(logp, entropy, c, row_max + log_Z, Q, R, p, log_p)


def _statistics_from(state: Tensor, rows: _Rows, row: RowParams) -> _Statistics:
    """The same from the sums of whole rows, of which `rows` may hold a shard."""
    row_max, Z, T, Z2, T2, target_u = state.double().unbind(dim=1)
    log_Z, mu, Q = Z.log(), T / Z, Z2 / Z**2
    entropy, logp = log_Z - mu, target_u - row_max - log_Z
    c = T2 / Z**2 - mu * Q + _sampled_term(logp, entropy)
    d = _scaled(rows.logits, row) - row_max[:, None]
    log_p = torch.where(d.isneginf(), 0.0, d - log_Z[:, None])
    p = torch.where(d.isneginf(), 0.0, log_p.exp())
    return _Statistics(logp, entropy, c, row_max + log_Z, Q, T2 / Z**2 - log_Z * Q, p, log_p)


def _state(rows: _Rows, row: RowParams) -> Tensor:
    """[N, 6]: see `Backend.token_stats_fwd`."""
    u = _scaled(rows.logits, row)
    row_max = u.amax(dim=1)
    masked = u.isneginf()
    d = torch.where(masked, 0.0, u - row_max[:, None])
    e = torch.where(masked, 0.0, d.exp())
    d = torch.where(e == 0, 0.0, d)  # -inf where float64 overflows
    sums = [row_max, e.sum(1), (e * d).sum(1), (e * e).sum(1), (e * e * d).sum(1)]
    sums = [torch.where(rows.spoiled, torch.nan, s) for s in sums]
    state = torch.stack([*sums, _target_logit(u, rows.targets)], dim=1)
    return torch.where(rows.ignored[:, None], 0.0, state)


def _target_logit(u: Tensor, targets: Tensor) -> Tensor:
    """u of the sampled tokens, -inf of those elsewhere."""
    chosen = u.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == ELSEWHERE, -torch.inf, chosen)


def _sampled_term(logp: Tensor, entropy: Tensor) -> Tensor:
    return torch.where(logp.isneginf(), 0.0, -logp.exp() * (logp + entropy))


def _reported(value: Tensor, rows: _Rows) -> Tensor:
    """NaN for bad rows and 0 for ignored ones."""
    return torch.where(rows.ignored, 0.0, torch.where(rows.bad, torch.nan, value))


def _statistics_gradient(
    stats: _Statistics, grads: Sequence[Tensor], rows: _Rows, row: RowParams
) -> Tensor:
    """d(g_logp logp + g_entropy H + g_unit_polarity c + g_lse lse) / dlogits, term by term."""
    g_logp, g_entropy, g_polarity, g_lse = (g.to(rows.logits)[:, None] for g in grads)
    p, log_p, entropy = stats.p, stats.log_p, stats.entropy[:, None]
    Q, R = stats.Q[:, None], stats.R[:, None]
    alive = ~stats.logp.isneginf()[:, None]
    log_p_a = torch.where(alive, stats.logp[:, None], 0.0)
    p_a = log_p_a.exp()
    columns = torch.arange(p.shape[1], device=p.device)
    one_hot = (columns == rows.targets[:, None]).to(p.dtype)

    dlogp = one_hot - p
    dentropy = -p * (log_p + entropy)
    dstate_term = 2 * p * p * log_p + p * p - p * (2 * R + Q)
    dstate_term += Q * dentropy + 2 * entropy * (p * p - p * Q)
    dsampled_term = -p_a * dlogp * (log_p_a + entropy) - p_a * (dlogp + dentropy)
    du = g_logp * dlogp + g_entropy * dentropy + g_polarity * (dstate_term + dsampled_term)
    du = du + g_lse * p

    dz = du / row.temperature_of_rows()
    if row.softcap:
        dz = dz * (1.0 - torch.tanh(rows.logits / row.softcap) ** 2)
    return torch.where(alive, dz, 0.0)


def _row_gradient(grad: Tensor, rows: _Rows, like: Tensor) -> Tensor:
    """`grad` in the shape and dtype of the logits: bad rows NaN, ignored rows and padding 0."""
    grad = torch.where(rows.bad[:, None], torch.nan, grad)
    full = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    full[:, : grad.shape[1]] = torch.where(rows.ignored[:, None], 0.0, grad).to(like.dtype)
    return full


# ---- the functions of the backend protocol -------------------------------------------------------


def token_stats_fwd(
    logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of every row."""
    rows = _rows(logits, targets, targets == IGNORE_INDEX, row, state)
    if state is None:
        stats, state = _statistics(rows, row), _state(rows, row)
    else:
        stats = _statistics_from(state, rows, row)
    acc = acc_dtype(logits.dtype)
    logp, entropy, unit_polarity, lse = (_reported(s, rows).to(acc) for s in stats[:4])
    return logp, entropy, unit_polarity, lse, state


def token_stats_bwd(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    grads: Sequence[Tensor | None],
    row: RowParams,
    dlogits: Tensor | None = None,
) -> Tensor:
    """The gradient of the statistics."""
    rows = _rows(logits, targets, targets == IGNORE_INDEX, row, state)
    acc, none = acc_dtype(logits.dtype), torch.zeros_like(state[:, 0])
    upstream = [none if g is None else saturated(g, acc) for g in grads]
    stats = _statistics_from(state, rows, row)
    grad = _statistics_gradient(stats, upstream, rows, row)
    dlogits = torch.empty_like(logits) if dlogits is None else dlogits
    return dlogits.copy_(_row_gradient(grad, rows, dlogits))


def policy_loss_fwd(
    logits: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    weighting: WeightingInputs | None,
    row: RowParams,
    dlogits: Tensor | None,
    state: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The policy loss per token, and its gradient where `dlogits` is given."""
    ignored = left_out(targets, tokens)
    rows = _rows(logits, targets, ignored, row, state)
    stats = _statistics(rows, row) if state is None else _statistics_from(state, rows, row)
    # Rounded first, as an earlier call rounded old_logp: its ratio to the same logp is exactly 1.
    acc = acc_dtype(logits.dtype)
    rounded = [x.to(acc).double() for x in stats[:3]]
    token = token_loss(rounded[0], rounded[1], rounded[2], tokens, objective, weighting)
    per_token = (token.loss, *stats[:3], token.polarity, token.weight, token.ratio)
    outputs = [_reported(x, rows).to(acc) for x in per_token]
    if dlogits is not None:
        g_logp = saturated(token.dlogp + token.dlog_ratio, acc)
        g_entropy, none = saturated(token.dentropy, acc), torch.zeros_like(g_logp)
        grad = _statistics_gradient(stats, (g_logp, g_entropy, none, none), rows, row)
        dlogits.copy_(_row_gradient(grad, rows, dlogits))
    return (*outputs, torch.where(rows.ignored | rows.bad, INSIDE, token.clip_side))


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor``, and 0 where either is: the other may have overflowed."""
    finite = saturated(factor, acc_dtype(dlogits.dtype))
    dlogits.copy_(torch.where(factor == 0, 0.0, dlogits * finite))


# ---- split vocabularies --------------------------------------------------------------------------


def merge_states(states: Tensor) -> Tensor:
    """The states of whole rows from those of their shards.

    Args:
        states: ``[shards, N, 6]`` float64; the order of the shards affects rounding only.

    Returns:
        ``[N, 6]`` float64.
    """
    row_max, target_u = states[..., 0].amax(dim=0), states[..., 5].amax(dim=0)
    empty = states[..., 0].isneginf() & (states[..., 1] == 0)
    shift = torch.where(empty, 0.0, states[..., 0] - row_max)
    alpha = shift.exp()
    # exp underflows long before shift * 0 could matter; -inf * 0 would be NaN.
    shift = torch.where(alpha == 0, 0.0, shift)
    _, Z, T, Z2, T2, _ = states.unbind(dim=-1)
    parts = (alpha * Z, alpha * (T + shift * Z), alpha**2 * Z2, alpha**2 * (T2 + shift * Z2))
    return torch.stack([row_max, *(p.sum(dim=0) for p in parts), target_u], dim=1)
