"""The public functions' arguments made ready for the operations: checked, flattened to rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .checks import (
    check_device,
    check_factor,
    check_float,
    check_targets,
    check_tensor,
    check_token_input,
    check_type,
    check_vocab_size,
    counted_columns,
    factors,
)
from .dispatch import filled, is_plain
from .objective import Objective, PolarityWeighting
from .token_loss import left_out
from .types import (
    IGNORE_INDEX,
    FullTokenStats,
    Logits,
    LogProbs,
    LogRatio,
    LossInputs,
    RowParams,
    Sequences,
    TokenInputs,
    TokenStats,
    TokenWeights,
    WeightingInputs,
    acc_dtype,
)

_DEFAULT_OBJECTIVE = Objective()


# ---- tensors of tokens --------------------------------------------------------------------------


def flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a detached, contiguous `[N]` tensor of `dtype`; itself if it is one already."""
    if value.dim() != 1:
        value = value.reshape(-1)
    if value.requires_grad:
        value = value.detach()
    if value.dtype != dtype:
        value = value.to(dtype)
    if not is_compiling() and value.is_neg():
        value = value.resolve_neg()
    return value if value.is_contiguous() else value.contiguous()


def shaped(
    values: Sequence[Tensor], targets: Tensor, rows: Tensor | None = None
) -> Sequence[Tensor]:
    """The inverse of `flat` and `flat_ids`: `values [N]` in the shape of `targets`, or of `rows`
    where `values [N, k]` have that of `targets`."""
    if rows is not None and rows is not targets:
        return [x.view(targets.shape if x.dim() == 2 else rows.shape) for x in values]
    return values if targets.dim() == 1 else [x.view_as(targets) for x in values]


def _like_targets(name: str, value: Tensor, targets: Tensor) -> Tensor:
    """`value` in the shape of `targets [B, T]`: a tensor of that shape, `[B]`, `[B, 1]`, `[1, T]`
    or `[]`."""
    shape, wanted = value.shape, targets.shape
    if shape == wanted:
        return value
    missing = len(wanted) - len(shape)
    if missing > 0 and shape == wanted[: len(shape)]:
        return value.reshape(*shape, *[1] * missing).expand(wanted)
    if missing == 0 and all(n in (1, full) for n, full in zip(shape, wanted, strict=True)):
        return value.expand(wanted)
    raise ValueError(
        f"{name}: expected shape {tuple(wanted)} like targets, its leading dimensions, or 1 in "
        f"place of a dimension, got {tuple(shape)}"
    )


class TokenLike(NamedTuple):
    """What the inputs that are per token have to be like, looked up once.

    Attributes:
        dtype: what they are made.
        source: what the loss is differentiable in, for messages.
    """

    targets: Tensor
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    source: str
    eager: bool

    @classmethod
    def of(cls, targets: Tensor, dtype: torch.dtype, source: str) -> TokenLike:
        return cls(targets, targets.shape, targets.device, dtype, source, not is_compiling())

    def checked(self, name: str, value: Tensor | None) -> Tensor:
        """The checked `value`, `[N]` of `dtype`."""
        targets, shape, device, dtype, source, eager = self
        # As most are: one call in place of three.
        if (
            eager
            and type(value) is Tensor
            and value.dtype is dtype
            and value.layout is torch.strided
            and not value.is_nested
            and value.shape == shape
            and value.device == device
            and value.is_contiguous()
            and not value.is_neg()
            and not value.requires_grad
        ):
            return value if value.dim() == 1 else value.view(-1)
        check_token_input(name, value, targets, source)
        assert value is not None
        if value.shape != shape:
            value = _like_targets(name, value, targets)
        return flat(value, dtype)


def targets_of_rows(logits: object, targets: Tensor) -> Tensor:
    """`targets` where they are one a row, or of several ids each row's first; both unchecked."""
    if isinstance(logits, tuple):  # of a head
        logits = logits[0]
    elif isinstance(logits, Logits):
        logits = logits.values
    try:
        if targets.dim() != logits.dim() or not targets.dim():  # type: ignore[attr-defined]
            return targets
    except AttributeError:
        return targets
    check_tensor("targets", targets)
    if targets.shape[-1] == 0:
        raise ValueError(f"targets: expected an id a row, got shape {tuple(targets.shape)}")
    return targets[..., 0]


def flat_ids(targets: Tensor, rows: Tensor) -> Tensor:
    """Checked `targets` as `[N]`, or where `rows` are their first as `[N, k]`."""
    flattened = flat(targets, torch.int64)
    return flattened if rows is targets else flattened.view(-1, targets.shape[-1])


# ---- logits and what stands in their place ------------------------------------------------------


def held_logits(
    logits: Tensor | Logits, targets: Tensor, temperature: float | Tensor
) -> tuple[Tensor, RowParams]:
    """The checked tensor `[..., V]`, and how its rows become distributions."""
    values, softcap, vocab_size = logits, None, None
    if isinstance(logits, Logits):
        values, softcap, vocab_size = logits.values, logits.softcap, logits.vocab_size
        if softcap is not None:
            check_factor("softcap", softcap, "None or ")
        check_vocab_size(vocab_size)
    if not isinstance(values, Tensor):
        raise TypeError(
            "logits: expected a tensor, Logits(tensor), for policy_loss LogProbs or TokenStats, or "
            f"what calling a Head gives, head(hidden); got {type(values).__name__}"
        )
    check_float("logits", values)
    columns = counted_columns(values.shape[-1], vocab_size, "columns of logits")
    check_targets("logits", values, targets)
    dtype = acc_dtype(values.dtype)
    return values, row_params(temperature, softcap, columns, targets, dtype)


def row_params(
    temperature: float | Tensor,
    softcap: float | None,
    columns: int,
    targets: Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
) -> RowParams:
    """How rows become distributions.

    Args:
        temperature: of all rows, or like `targets`.
        dtype: of the sums.
        scale: a factor s on the logits, softcap(s z) / temperature, which moves into the other two.
    """
    cap = float(softcap or 0.0) / scale
    if not isinstance(temperature, Tensor):
        check_factor("temperature", temperature)
        return RowParams(float(temperature) / scale, cap, columns)
    like = TokenLike.of(targets, dtype, "the logits")
    temperatures = like.checked("temperature", temperature)
    if temperatures.is_cpu and is_plain(temperatures):
        low, high = factors()
        good = (temperatures >= low) & (temperatures <= high)
        bad = (~good & (targets.reshape(-1) != IGNORE_INDEX)).nonzero()
        if bad.numel():
            at = int(bad[0])
            raise ValueError(
                f"temperature: expected numbers in [{low:g}, {high:g}], got "
                f"{temperatures[at].item()} at flat position {at}"
            )
    return RowParams(
        1.0, cap, columns, False, temperatures if scale == 1.0 else temperatures / scale
    )


def log_probs(
    given: LogProbs | TokenStats | FullTokenStats,
    targets: Tensor,
    temperature: float | Tensor,
    objective: Objective,
    weighting: PolarityWeighting | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The checked logp, entropy and unit polarity, like `targets`."""
    check_tensor("targets", targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if isinstance(temperature, Tensor) or temperature != 1.0:
        raise ValueError(
            "temperature: expected 1.0 with log-probs, which have one already, got "
            f"{tuple(temperature.shape) if isinstance(temperature, Tensor) else temperature!r}"
        )
    needed = {
        "logp": True,
        "entropy": objective.entropy_coef != 0,
        "unit_polarity": weighting is not None,
    }
    for name, is_needed in needed.items():
        value = getattr(given, name)
        if value is None and not is_needed:
            continue
        if not isinstance(value, Tensor):
            reasons = {
                "entropy": f", since objective.entropy_coef is {objective.entropy_coef}",
                "unit_polarity": ", since a weighting is given",
            }
            why = reasons.get(name, "") if is_needed else " or None"
            raise TypeError(f"logits.{name}: expected a tensor{why}, got {type(value).__name__}")
        check_tensor(f"logits.{name}", value)
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"logits.{name}: expected float32 or float64, got {value.dtype}")
        if value.shape != targets.shape:
            raise ValueError(
                f"logits.{name}: expected shape {tuple(targets.shape)} like targets, got "
                f"{tuple(value.shape)}"
            )
        check_device(f"logits.{name}", value, targets.device, "targets")
    return given.logp, given.entropy, given.unit_polarity


# ---- the loss -----------------------------------------------------------------------------------


class LossArguments(NamedTuple):
    """What `policy_loss` takes beside the logits, as it takes it."""

    targets: Tensor
    advantages: Tensor
    token_weight: Tensor | TokenWeights
    old_logp: Tensor | LogRatio | Sequences | None
    ref_logp: Tensor | None
    objective: Objective
    weighting: PolarityWeighting | None

    def checked(self, row: RowParams, dtype: torch.dtype, backend: str, source: str) -> LossInputs:
        """The same, checked and flattened to rows.

        Args:
            dtype: of the sums; the tokens' inputs are made it.
            source: what the loss is differentiable in, for messages.
        """
        targets, objective, weighting = self.targets, self.objective, self.weighting
        like = TokenLike.of(targets, dtype, source)
        advantages = like.checked("advantages", self.advantages)
        policy, kl, entropy = self._weights(like)
        old_logp, log_ratio = self._ratio(like)
        ref_logp = self.ref_logp
        if ref_logp is not None:
            ref_logp = like.checked("ref_logp", ref_logp)
        elif objective.kl_coef:
            raise ValueError(
                f"ref_logp: expected a tensor, since objective.kl_coef is {objective.kl_coef}"
            )
        tokens = TokenInputs(advantages, policy, old_logp, ref_logp, log_ratio, kl, entropy)
        return LossInputs(
            flat(targets, torch.int64),
            tokens,
            objective,
            None if weighting is None else _weighting_inputs(weighting, dtype, targets),
            row,
            backend,
            None if objective.ratio_level == "token" else self._sequences(like, tokens),
        )

    def _weights(self, like: TokenLike) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the policy term, the KL term and the entropy bonus."""
        given = self.token_weight
        if not isinstance(given, TokenWeights):
            return like.checked("token_weight", given), None, None
        policy, kl, entropy = (
            None if x is None else like.checked(f"token_weight.{name}", x)
            for name, x in given._asdict().items()
        )
        if policy is None:
            raise TypeError("token_weight.policy: expected a tensor, got NoneType")
        return policy, kl, entropy

    def _ratio(self, like: TokenLike) -> tuple[Tensor | None, Tensor | None]:
        """old_logp, or the log of the ratio itself."""
        given, level = self.old_logp, self.objective.ratio_level
        if isinstance(given, LogRatio):
            if level != "token":
                raise TypeError(
                    "old_logp: expected a tensor or Sequences, since objective.ratio_level is "
                    f"{level!r}, got LogRatio"
                )
            return None, like.checked("old_logp.values", given.values)
        name = "old_logp"
        if isinstance(given, Sequences):
            if level == "token":
                raise TypeError(
                    "old_logp: expected a tensor or LogRatio, since objective.ratio_level is "
                    "'token', got Sequences"
                )
            name, given = "old_logp.old_logp", given.old_logp
        if given is None:
            return None, None
        return like.checked(name, given), None

    def _sequences(self, like: TokenLike, tokens: TokenInputs) -> Tensor:
        """The id of each token's sequence, `[N]`; negative where it is in none."""
        targets, given = self.targets, self.old_logp
        if isinstance(given, Sequences):
            name = "old_logp.ids"
            check_type(name, given.ids, Tensor)
            if given.ids.dtype != torch.int64:
                raise TypeError(f"{name}: expected int64, got {given.ids.dtype}")
            return like._replace(dtype=torch.int64).checked(name, given.ids)
        if targets.dim() < 2:
            raise ValueError(
                f"old_logp: expected Sequences(old_logp, ids) for targets of shape "
                f"{tuple(targets.shape)}, since objective.ratio_level is "
                f"{self.objective.ratio_level!r}"
            )
        rows = targets.numel() // max(1, targets.shape[-1])
        ids = torch.arange(rows, device=targets.device)[:, None].expand(rows, targets.shape[-1])
        outside = left_out(targets.reshape(-1), tokens)
        return torch.where(outside, -1, ids.reshape(-1))


def checked_objective(objective: Objective | None) -> Objective:
    if objective is None:
        return _DEFAULT_OBJECTIVE
    check_type("objective", objective, Objective)
    return objective


def _weighting_inputs(
    weighting: PolarityWeighting, dtype: torch.dtype, targets: Tensor
) -> WeightingInputs:
    check_type("weighting", weighting, PolarityWeighting)

    def scalar(name: str, value: float | Tensor) -> Tensor:
        """`value` as a 0-dim tensor beside the targets, without a host sync."""
        if not isinstance(value, Tensor):
            return filled(value, dtype, targets)
        check_device(f"weighting.{name}", value, targets.device)
        return value.detach().to(dtype).resolve_neg()

    return WeightingInputs(
        float(weighting.strength),
        scalar("phase", weighting.phase),
        weighting.shape,
        scalar("sigma", weighting.sigma),
        scalar("scale", weighting.scale),
        float(weighting.dead_zone),
    )
