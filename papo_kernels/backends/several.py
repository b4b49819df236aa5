"""Statistics of several ids a row, and the sums of rows, on any backend.

A backend knows one sampled token a row. Here it is the most likely of the row's ids, which leaves
what is formed of the others well conditioned: at most one id has p > 1/2. The other ids' statistics
and all ids' own elements of the gradient are formed in float64 from the row's state and the ids'
scaled logits, which the backend's own arithmetic gives.

The state of a row with k ids is ``[6 + k]``: the backend's, with the most likely id's target_u, and
the scaled logit of every id, -inf where it is masked, ignored or elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from papo_kernels.token_loss import saturated
from papo_kernels.types import ELSEWHERE, IGNORE_INDEX, STATE_SIZE, RowParams, acc_dtype

from .protocol import Backend

_TILE = 2**22  # elements of soft-capped logits that are held at once


def logit_sums(logits: Tensor, row: RowParams) -> Tensor:
    """The sum of u over the columns that count, ``[N]`` float64."""
    z, cap = logits[:, : row.vocab_size], row.softcap
    if cap:
        parts = z.split(max(1, _TILE // z.shape[1]))
        capped = [cap * torch.tanh(part.double() / cap).sum(dim=1, keepdim=True) for part in parts]
        # tanh makes -inf a number, where it stands for a token that cannot be sampled.
        masked = [part.isneginf().any(dim=1, keepdim=True) for part in parts]
        sums = torch.cat(capped).masked_fill(torch.cat(masked), -torch.inf)
    else:
        sums = z.sum(dim=1, keepdim=True, dtype=torch.float64)
    return (sums / row.temperature_of_rows())[:, 0]


def token_stats_fwd(
    backend: Backend, logits: Tensor, targets: Tensor, row: RowParams
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Backend.token_stats_fwd` for ``targets [N]`` or ``[N, k]``: logp and unit polarity like
    them, entropy and lse ``[N]``, and the state."""
    if targets.dim() == 1:
        return backend.token_stats_fwd(logits, targets, row)
    u = _scaled(backend, logits, targets, row)
    target = _most_likely(targets, u, row)[0]
    _, entropy, _, lse, state = backend.token_stats_fwd(logits, target, row)
    state = torch.cat([state, u], dim=1)
    logp, unit_polarity = of_ids(state, targets, acc_dtype(logits.dtype))
    return logp, entropy, unit_polarity, lse, state


def of_ids(state: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logp and unit polarity ``[N, k]`` from the states of whole rows."""
    of_row = _of_rows(state)
    u, ignored = state[:, STATE_SIZE:], ids == IGNORE_INDEX
    logp = u - of_row.row_max - of_row.log_Z
    p, s = _probabilities(u, of_row)
    unit_polarity = of_row.S - p * s
    return (
        logp.masked_fill(ignored, 0.0).to(dtype),
        unit_polarity.masked_fill(ignored, 0.0).to(dtype),
    )


def token_stats_bwd(
    backend: Backend,
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    grads: Sequence[Tensor | None],
    row: RowParams,
    dlogits: Tensor | None = None,
) -> Tensor:
    """`Backend.token_stats_bwd` for ``targets [N]`` or ``[N, k]``: upstream gradients of logp and
    unit polarity are like them, the state is that of `token_stats_fwd`."""
    if targets.dim() == 1:
        return backend.token_stats_bwd(logits, targets, state, grads, row, dlogits)
    inside = (targets >= 0) & (targets < row.vocab_size)
    column = torch.where(inside, targets, 0)
    z = logits.gather(1, column).double()
    u = state[:, STATE_SIZE:]
    target, at = _most_likely(targets, u, row)
    upstream = _upstream(targets, u, grads, acc_dtype(logits.dtype))
    of_row = _of_rows(state)
    dlogits = backend.token_stats_bwd(
        logits,
        target,
        state[:, :STATE_SIZE].contiguous(),
        _of_the_row(state, upstream, of_row),
        row,
        dlogits,
    )
    du = _elements(targets, u, upstream, of_row)
    if row.softcap:
        t = torch.tanh(z / row.softcap)
        du = du * (1.0 - t) * (1.0 + t)
    dz = (du / row.temperature_of_rows()).to(dlogits.dtype)
    # What is not to be written repeats what is: the row's most likely id, or where none of the ids
    # is among these columns, an element as it stands.
    found = inside.any(dim=1, keepdim=True)
    instead = torch.where(found, dz.gather(1, at), dlogits[:, :1])
    column = torch.where(inside, column, torch.where(found, column.gather(1, at), 0))
    return dlogits.scatter_(1, column, torch.where(inside, dz, instead))


# ---- the ids of a row ----------------------------------------------------------------------------


def _scaled(backend: Backend, logits: Tensor, ids: Tensor, row: RowParams) -> Tensor:
    """u of every id ``[N, k]`` float64; NaN where an id is out of range."""
    inside = (ids >= 0) & (ids < row.vocab_size)
    z = logits.gather(1, torch.where(inside, ids, 0))
    counts = inside & ~z.isneginf()
    temperatures = row.temperatures
    if temperatures is not None:
        temperatures = temperatures.repeat_interleave(ids.shape[1])
    # Rows of one column.
    *_, state = backend.token_stats_fwd(
        z.view(-1, 1),
        torch.where(counts, 0, IGNORE_INDEX).view(-1),
        row._replace(vocab_size=1, sharded=False, temperatures=temperatures),
    )
    u = torch.where(counts, state[:, STATE_SIZE - 1].view(ids.shape), -torch.inf)
    return u.masked_fill(_bad(ids, row), torch.nan)


def _bad(ids: Tensor, row: RowParams) -> Tensor:
    known = (ids == IGNORE_INDEX) | ((ids >= 0) & (ids < row.vocab_size))
    return ~(known | (ids == ELSEWHERE)) if row.sharded else ~known


def _most_likely(ids: Tensor, u: Tensor, row: RowParams) -> tuple[Tensor, Tensor]:
    """The target that a backend is given for each row ``[N]``, and its place ``[N, 1]`` among the
    row's ids, which holds where one of them is among these columns."""
    inside = (ids >= 0) & (ids < row.vocab_size)
    lowest = torch.finfo(u.dtype).min  # a masked id comes before one that is not there
    at = torch.where(inside, u.clamp(min=lowest), -torch.inf).argmax(dim=1, keepdim=True)
    # ELSEWHERE is the larger of what may stand in place of a column.
    target = torch.where(inside.any(dim=1), ids.gather(1, at)[:, 0], ids.amax(dim=1))
    bad = _bad(ids, row)
    wrong = torch.where(bad, ids, IGNORE_INDEX).gather(1, bad.int().argmax(dim=1, keepdim=True))
    return torch.where(bad.any(dim=1), wrong[:, 0], target), at


class _OfRow(NamedTuple):
    """Of every row, ``[N, 1]`` float64; as in ``csrc/include/papo/row_grad.h``."""

    row_max: Tensor
    Z: Tensor
    log_Z: Tensor
    mu: Tensor
    Q: Tensor
    S: Tensor


def _of_rows(state: Tensor) -> _OfRow:
    row_max, Z, T, Z2, T2 = (x[:, None] for x in state[:, : STATE_SIZE - 1].unbind(dim=1))
    mu, Q = T / Z, Z2 / Z**2
    return _OfRow(row_max, Z, Z.log(), mu, Q, T2 / Z**2 - mu * Q)


def _probabilities(u: Tensor, of_row: _OfRow) -> tuple[Tensor, Tensor]:
    """p and s = log p + H of every id; 0 where it is masked."""
    masked = u.isneginf()
    d = torch.where(masked, 0.0, u - of_row.row_max)
    return (
        torch.where(masked, 0.0, d.exp() / of_row.Z),
        torch.where(masked, 0.0, d - of_row.mu),
    )


# ---- the gradient --------------------------------------------------------------------------------


class _Upstream(NamedTuple):
    """Float64; 0 where an id is masked or ignored."""

    logp: Tensor  # [N, k]
    entropy: Tensor  # [N, 1]
    unit_polarity: Tensor  # [N, k]
    lse: Tensor  # [N, 1]


def _upstream(
    ids: Tensor, u: Tensor, grads: Sequence[Tensor | None], dtype: torch.dtype
) -> _Upstream:
    counts = (ids != IGNORE_INDEX) & ~u.isneginf()

    def given(grad: Tensor | None, of_ids: bool) -> Tensor:
        if grad is None:
            return torch.zeros_like(u if of_ids else u[:, :1])
        grad = saturated(grad, dtype)
        return torch.where(counts, grad, 0.0) if of_ids else grad[:, None]

    g_logp, g_entropy, g_polarity, g_lse = grads
    return _Upstream(
        given(g_logp, True), given(g_entropy, False), given(g_polarity, True), given(g_lse, False)
    )


def _of_the_row(
    state: Tensor, g: _Upstream, of_row: _OfRow
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The backend's upstream gradients ``[N]``: those that give all elements but the ids' own."""
    p, s = _probabilities(state[:, STATE_SIZE:], of_row)
    p_a, s_a = _probabilities(state[:, STATE_SIZE - 1 : STATE_SIZE], of_row)
    gc = g.unit_polarity
    total = gc.sum(dim=1, keepdim=True)
    # A backend's unit polarity is that of its one target.
    entropy = g.entropy - (gc * (p - p_a)).sum(dim=1, keepdim=True)
    lse = g.lse - g.logp.sum(dim=1, keepdim=True)
    lse = lse + (gc * (p * (s + 1.0) - p_a * (s_a + 1.0))).sum(dim=1, keepdim=True)
    return None, entropy[:, 0], total[:, 0], lse[:, 0]


def _elements(ids: Tensor, u: Tensor, g: _Upstream, of_row: _OfRow) -> Tensor:
    """The gradient by u of the ids' own elements, ``[N, k]``."""
    p, s = _probabilities(u, of_row)
    row_max, Z, _, _, Q, S = of_row
    q = (Z - (u - row_max).exp()) / Z
    own_logp, own = _of_the_same_id(ids, g.logp), _of_the_same_id(ids, g.unit_polarity)
    logp = own_logp * q - p * (g.logp.sum(dim=1, keepdim=True) - own_logp)
    # Of the ids that are not this one,
    gc = g.unit_polarity
    others = gc.sum(dim=1, keepdim=True) - own
    share = (gc * p).sum(dim=1, keepdim=True) - own * p
    offset = (gc * p * (s + 1.0)).sum(dim=1, keepdim=True) - own * p * (s + 1.0)
    theirs = others * (2.0 * p * s + p - 2.0 * S - Q - Q * s) + offset + share * s
    # and of this one, whose terms are small for p -> 0 and for p -> 1.
    Q_r, S_r = Q - p * p, S - p * p * s
    its_own = 2.0 * p * q * s - (q * q + Q_r) * (1.0 + s) - 2.0 * S_r
    return logp + p * (g.lse - g.entropy * s + theirs + own * its_own)


def _of_the_same_id(ids: Tensor, g: Tensor) -> Tensor:
    """The sum of `g` over the places that hold the same id, in each of them."""
    ordered = ids.sort(dim=1).values
    first = torch.searchsorted(ordered, ids.contiguous())
    place = first + torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
    sums = torch.zeros_like(g).view(-1).index_add_(0, place.view(-1), g.reshape(-1))
    return sums[place]
