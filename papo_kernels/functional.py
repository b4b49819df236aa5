"""The public functions: validate, flatten to rows, dispatch to the torch operations, reshape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .types import PolarityWeighting, PolicyLossOutput, PolicyLossParams, TokenStats, acc_dtype

_LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-probability, entropy and entropy polarity of sampled tokens, in one pass over the logits.

    With u = softcap(logits) / temperature, p = softmax(u) and sampled token a: logp = log p_a,
    entropy = H = -sum_v p_v log p_v, and the unit polarity c = sum_v p_v^2 (log p_v + H) -
    p_a (log p_a + H), the first-order change of H per unit of advantage and step when a is
    reinforced (arXiv 2605.11775). All in nats. logp, entropy and unit_polarity are differentiable
    in the logits, once; using lse in a loss raises in backward.

    Args:
        logits: ``[..., V]`` float16, bfloat16, float32, or float64 (reference and cpu backends).
            -inf masks a token: p = 0, gradient 0. Read without a copy where the leading dimensions
            flatten to one stride and the last has stride 1.
        targets: ``[...]`` int64, the sampled tokens; -100: ignored, all outputs and the gradient 0.
        temperature: > 0.
        softcap: u = softcap * tanh(z / softcap) / temperature; > 0, None for none.
        vocab_size: columns from there on are padding: never read, p = 0, gradient 0.
        backend: "reference", "cpu", "triton" or "cuda"; by default ``PAPO_BACKEND`` or else the
            fastest that serves the logits.

    Returns:
        TokenStats(logp, entropy, unit_polarity, lse), each shaped like `targets`; float32, or
        float64 for float64 logits. A row with NaN, +inf or nothing but -inf gives NaN. A sampled
        token that is masked has logp -inf and its row's gradient is 0.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected. A target out
            of range raises for CPU tensors; on a GPU it makes its row NaN.
    """
    _check_logits(logits)
    columns = _check_row_options(logits, temperature, softcap, vocab_size)
    _check_targets(logits, targets)
    rows = _rows(logits)
    logp, entropy, unit_polarity, lse, _ = ops.token_stats(
        rows,
        targets.reshape(-1).contiguous(),
        float(temperature),
        float(softcap or 0.0),
        columns,
        backend or "",
    )
    lse = ops.not_differentiable(lse, rows, "TokenStats.lse")
    return TokenStats(*(x.view(targets.shape) for x in (logp, entropy, unit_polarity, lse)))


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    params: PolicyLossParams | None = None,
    weighting: PolarityWeighting | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> PolicyLossOutput:
    """The clipped policy-gradient loss with polarity weighting, fused with its gradient.

    For a token with advantage A: r = exp(logp - old_logp), A' = w A, and

        L = -min(r A', clip(r, 1 - clip_low, 1 + clip_high) A')    (where A' < 0: <= -dual_clip A')
          + kl_coef (exp(ref_logp - logp) - (ref_logp - logp) - 1) - entropy_coef H
        loss = sum over tokens of token_weight L

    w = scale (1 + strength phase h(polarity / sigma)) with polarity = r A c carries no gradient;
    without `weighting`, w = 1. The gradient is formed in the forward pass, where logits require it.

    Args:
        logits, targets, temperature, softcap, vocab_size, backend: as for `token_stats`.
        advantages: like `targets`, any real dtype.
        token_weight: like `targets`: the loss mask times the normaliser of the aggregation, e.g.
            mask / mask.sum() for a token mean. A token of weight 0 contributes exactly nothing,
            whatever its logits hold, and all its outputs are 0.
        old_logp: logp under the policy that sampled, like `targets`; None: on-policy, r = 1 with
            the gradient of exp(logp - stop_gradient(logp)).
        ref_logp: logp under the reference policy; needed where params.kl_coef is not 0.
        params: the surrogate's options; None for `PolicyLossParams()`.
        weighting: polarity weighting, None for none.
        inplace: overwrite the logits with their gradient instead of allocating it. The logits must
            not be a leaf or a view, and belong to this loss alone: another use in a loss, or a
            second backward, raises. Without a gradient to form (no_grad) they are left as they are.

    Returns:
        PolicyLossOutput(loss, logp, entropy, unit_polarity, polarity, weight, ratio, clipped):
        `loss` is a differentiable scalar, the rest is detached and shaped like `targets`.

    Raises:
        TypeError, ValueError: as for `token_stats`.
    """
    params = PolicyLossParams() if params is None else params
    _check_type("params", params, PolicyLossParams)
    _check_logits(logits)
    columns = _check_row_options(logits, temperature, softcap, vocab_size)
    _check_targets(logits, targets)
    inputs = {
        "advantages": advantages,
        "token_weight": token_weight,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
    }
    for name, value in inputs.items():
        if value is not None or name in ("advantages", "token_weight"):
            _check_token_input(name, value, targets)
    if params.kl_coef and ref_logp is None:
        raise ValueError(f"ref_logp: expected a tensor, since params.kl_coef is {params.kl_coef}")
    acc = acc_dtype(logits.dtype)
    phase, sigma, scale = _weighting_scalars(weighting, acc, logits.device)
    options = ops.LossOptions(
        float(temperature),
        float(softcap or 0.0),
        float(params.clip_low),
        float(params.clip_high),
        float(params.dual_clip or 0.0),
        float(params.kl_coef),
        float(params.entropy_coef),
        0.0 if weighting is None else float(weighting.strength),
        0.0 if weighting is None else float(weighting.dead_zone),
    )
    call = ops.LossInputs(
        targets.reshape(-1).contiguous(),
        *(None if x is None else _row_tensor(x, acc) for x in inputs.values()),
        phase,
        sigma,
        scale,
        "sign" if weighting is None else weighting.shape,
        list(options),
        columns,
        backend or "",
    )
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_grad:
        _check_overwritable(logits)
        loss, *parts = ops.policy_loss_in_place(logits, call)
    else:
        loss, *parts, _ = ops.policy_loss(_rows(logits), *call, needs_grad)
    return PolicyLossOutput(loss, *(x.view(targets.shape) for x in parts))


# ---- validation ---------------------------------------------------------------------------------


def _check_type(name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {type(value).__name__}")


def _check_logits(logits: Tensor) -> None:
    _check_type("logits", logits, Tensor)
    if logits.dtype not in _LOGITS_DTYPES:
        raise TypeError(
            f"logits: expected float16, bfloat16, float32 or float64, got {logits.dtype}"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V >= 1, got {tuple(logits.shape)}")


def _check_row_options(
    logits: Tensor, temperature: float, softcap: float | None, vocab_size: int | None
) -> int:
    """Raises for an option out of range; the number of columns to read."""
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap!r}")
    columns = logits.shape[-1]
    if vocab_size is None:
        return columns
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size: expected an int or None, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size: expected a value in [1, {columns}] (columns of logits), got {vocab_size}"
        )
    return vocab_size


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    _check_type("targets", targets, Tensor)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])}, that of logits "
            f"{tuple(logits.shape)} without the vocabulary, got {tuple(targets.shape)}"
        )
    _check_device("targets", targets, logits.device)


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like logits, got {value.device}")


def _check_token_input(name: str, value: Tensor | None, targets: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype.is_complex:
        raise TypeError(f"{name}: expected a real dtype, got {value.dtype}")
    if value.shape != targets.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(targets.shape)} like targets, got {tuple(value.shape)}"
        )
    _check_device(name, value, targets.device)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without gradient (the loss is differentiable in the "
            "logits only), got requires_grad=True; detach() it"
        )


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(
            "inplace: expected False for logits that are a leaf requiring grad: "
            "autograd would lose their value"
        )
    if logits._is_view():
        raise ValueError(
            "inplace: expected False for logits that are a view of another tensor; or pass that "
            "tensor itself, any leading shape is accepted"
        )
    if not logits.is_contiguous():
        raise ValueError(
            f"inplace: expected False for logits that are not contiguous, got strides "
            f"{logits.stride()} for shape {tuple(logits.shape)}"
        )


# ---- flattening ---------------------------------------------------------------------------------


def _rows(logits: Tensor) -> Tensor:
    """`logits` as `[N, V]` with unit column stride, a view where the layout allows."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _row_tensor(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().reshape(-1).to(dtype).contiguous()


def _weighting_scalars(
    weighting: PolarityWeighting | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """phase, sigma and scale as 0-dim tensors on the logits' device, without a host sync."""
    if weighting is None:
        return None, None, None
    _check_type("weighting", weighting, PolarityWeighting)
    scalars = []
    for name in ("phase", "sigma", "scale"):
        value = getattr(weighting, name)
        if isinstance(value, Tensor):
            _check_device(f"weighting.{name}", value, device)
            scalars.append(value.detach().to(dtype))
        else:
            scalars.append(torch.full((), value, dtype=dtype, device=device))
    phase, sigma, scale = scalars
    return phase, sigma, scale
