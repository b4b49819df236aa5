"""Inputs and outputs of the public functions, and the parameter tuples every backend receives."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_above, check_device, check_type
from .objective import Objective

IGNORE_INDEX = -100
ELSEWHERE = -1  # a sampled token that lies in another shard of the vocabulary
# Of `PolicyLossOutput.clip_side`: no bound, the lower, the upper, and the dual clip.
INSIDE, CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL = range(4)
STATE_SIZE = 6  # float64 row_max, Z, T, Z2, T2 and target_u of a row


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits that are held, with what a model does to them before the softmax.

    A plain tensor stands for ``Logits(tensor)``.

    Args:
        values: ``[..., V]`` float16, bfloat16, float32, or float64 (reference and cpu backends).
            -inf masks a token: p = 0, gradient 0. Read without a copy where the leading dimensions
            flatten to one stride and the last has stride 1.
        softcap: u = softcap * tanh(z / softcap) / temperature; in [1e-18, 1e18], None for none.
        vocab_size: columns from there on are padding: never read, p = 0, gradient 0.
    """

    values: Tensor
    _: KW_ONLY
    softcap: float | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Compute:
    """How a call is computed. No option changes a number but by rounding.

    Args:
        backend: "reference", "cpu", "triton" or "cuda"; None: ``PAPO_BACKEND`` or else the fastest
            that serves the logits.
        chunk_bytes: the workspace of a head's logits; None: 256 MiB, or 1/32 of a GPU's memory
            where that is more.
        logits_dtype: of a head's logits; None: float32 (float64 for float64). For half-precision
            hidden states the other choice is their own dtype, which rounds every logit to 8
            (bfloat16) or 11 bits. It is faster on a CPU, where a product of half-precision numbers
            is half precision, and float32 logits take a float32 product.
        full_stats: `token_stats` returns `FullTokenStats`.
        grad_scale: for float16, the factor that the loss is multiplied by before backward (a
            `GradScaler`'s scale), > 0: gradients are formed in the forward pass, times it, so that
            rounding to float16 loses none of them. None: gradients of float16 logits and hidden
            states are formed in the backward pass, from the upstream gradient; a head then computes
            its logits twice.
        inplace: `policy_loss` overwrites the logits it is given with their gradient instead of
            allocating it. They must not be a leaf, and belong to this loss alone: another use in a
            loss, or a second backward, raises. Of a view, whose rows must be whole rows of a
            contiguous tensor, such as ``logits[:, :-1]`` or ``logits.view(-1, V)``, all of that
            tensor is overwritten. No effect under no_grad, nor under torch.compile, which places
            its buffers itself.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of its range.
    """

    backend: str | None = None
    chunk_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    inplace: bool = False
    full_stats: bool = False
    grad_scale: float | None = None

    def __post_init__(self) -> None:
        if self.backend is not None:
            check_type("backend", self.backend, str)
        if self.logits_dtype is not None:
            check_type("logits_dtype", self.logits_dtype, torch.dtype)
        check_type("inplace", self.inplace, bool)
        check_type("full_stats", self.full_stats, bool)
        if self.grad_scale is not None:
            check_above("grad_scale", self.grad_scale, 0.0)
        size = self.chunk_bytes
        if size is None:
            return
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"chunk_bytes: expected an int or None, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"chunk_bytes: expected at least 1, got {size}")


class TokenStats(NamedTuple):
    """Statistics of the sampled tokens, each shaped like `targets`; float32 (float64 for float64
    logits), in nats. Of k ids a row, logp and unit_polarity are like `targets`, and entropy and lse
    have their leading dimensions.

    With u = softcap(logits) / temperature and p = softmax(u):

    Attributes:
        logp: log p_a of the target a.
        entropy: H = -sum_v p_v log p_v.
        unit_polarity: c = sum_v p_v^2 (log p_v + H) - p_a (log p_a + H), the first-order change of
            H per unit of advantage and step when the target is reinforced (arXiv 2605.11775).
        lse: logsumexp(u).
    """

    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    lse: Tensor


class FullTokenStats(NamedTuple):
    """`TokenStats` and more of the rows, without gradient, each shaped like `targets`.

    Attributes:
        logp, entropy, unit_polarity, lse: as in `TokenStats`.
        log_sum_sq_probs: log sum_v p_v^2.
        mean_logits: the mean of u over the vocabulary; -inf where a token is masked.
        is_top1: bool, whether no token is more likely than the target.
    """

    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    lse: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


@dataclass(frozen=True, eq=False)
class LogProbs:
    """What `policy_loss` takes in place of logits where only log-probs are at hand. A `TokenStats`
    serves as well.

    Args:
        logp: like `targets`, float32 or float64; the loss is differentiable in it.
        entropy: the same; needed, and differentiable, where objective.entropy_coef is not 0.
        unit_polarity: the same, without gradient; needed with a `weighting`.
    """

    logp: Tensor
    entropy: Tensor | None = None
    unit_polarity: Tensor | None = None


class TokenWeights(NamedTuple):
    """Weights of a loss's terms, where one `token_weight` for all of them does not do.

    Each is like `targets`: a mask times the normalizer of the term's aggregation. An importance
    weight of the sampler (TIS, IcePop) is a factor on `policy` alone.

    Attributes:
        policy: of the surrogate.
        kl: of the KL term; None: as `policy`.
        entropy: of the entropy bonus; None: as `policy`.
    """

    policy: Tensor
    kl: Tensor | None = None
    entropy: Tensor | None = None


class LogRatio(NamedTuple):
    """In place of `old_logp`: the log of the ratio as given, like `targets`.

    The ratio's value is exp(values), and its gradient that of exp(values + logp - sg[logp]).
    """

    values: Tensor


class Sequences(NamedTuple):
    """In place of `old_logp`, for an objective.ratio_level of "sequence" or "sequence_token": which
    tokens make up a sequence.

    Without it each row of targets ``[B, T]`` is a sequence: of its tokens that are neither ignored
    nor have a weight of 0 in every term.

    Attributes:
        old_logp: as for `policy_loss`, None included.
        ids: like `targets`, int64; tokens of one id are one sequence, whatever their weights. -1:
            in none, where the ratio is 1 and constant: such a token has no policy gradient.
    """

    old_logp: Tensor | None
    ids: Tensor


class PolicyLossOutput(NamedTuple):
    """What `policy_loss` returns. Everything but `loss` is detached and shaped like `targets`.

    Attributes:
        loss: scalar, sum over tokens of token_weight times the token's loss, or with
            objective.reduce False each token's; differentiable in the logits, or in what a head
            makes them of.
        logp, entropy, unit_polarity: as in `TokenStats`.
        polarity: ratio * advantage * unit_polarity; positive expands entropy, negative contracts
            it.
        weight: w, the factor on the advantage.
        ratio: exp(logp - old_logp), or as objective says; 1 where on-policy.
        clip_side: uint8, the bound that acted on the token's policy gradient: 0 none, 1 the lower,
            2 the upper, 3 the dual clip.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    polarity: Tensor
    weight: Tensor
    ratio: Tensor
    clip_side: Tensor

    @property
    def clipped(self) -> Tensor:
        """Bool, whether a bound acted on the token's policy gradient."""
        return self.clip_side != INSIDE

    def metrics(self, mask: Tensor, old_logp: Tensor | None = None) -> dict[str, Tensor]:
        """What training logs of a loss, as means over the tokens of `mask`.

        A rank's means times its `tokens` add up over ranks and micro-batches. Nothing waits for the
        device.

        Args:
            mask: like `targets`, the loss mask or `token_weight`: tokens where it is not 0 count,
                all alike. Tokens of target -100 belong at 0.
            old_logp: like `targets`, log-probs of the policy that sampled; None: without `ppo_kl`.

        Returns:
            0-dim float64 tensors, detached; all 0 for a mask of zeros:

            - ``tokens``, how many they are;
            - ``entropy``, in nats, and ``ratio``;
            - ``clipfrac``, the share of tokens on which a bound acted, and what it is made of:
              ``clipfrac_low``, ``clipfrac_high`` and ``clipfrac_dual``;
            - ``ppo_kl`` and ``ppo_kl_k3``, in nats, with x = logp - old_logp the estimates k1, -x,
              and k3, exp(x) - 1 - x, of KL(old policy || policy).

        Raises:
            TypeError, ValueError: what is not a tensor, or is not shaped like the results or beside
                them.
        """
        given = {"mask": mask} if old_logp is None else {"mask": mask, "old_logp": old_logp}
        for name, value in given.items():
            check_type(name, value, Tensor)
            check_device(name, value, self.logp.device, "the results")
            if value.shape != self.logp.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(self.logp.shape)} like targets, got "
                    f"{tuple(value.shape)}"
                )
        live = mask != 0
        tokens = live.sum().double()
        values = {
            "entropy": self.entropy,
            "ratio": self.ratio,
            "clipfrac": self.clipped,
            "clipfrac_low": self.clip_side == CLIPPED_LOW,
            "clipfrac_high": self.clip_side == CLIPPED_HIGH,
            "clipfrac_dual": self.clip_side == CLIPPED_DUAL,
        }
        if old_logp is not None:
            # A finite stand-in keeps a token that does not count from overflowing.
            x = torch.where(live, self.logp.double() - old_logp.detach().double(), 0.0)
            values |= {"ppo_kl": -x, "ppo_kl_k3": torch.expm1(x) - x}
        sums = {name: torch.where(live, x.double(), 0.0).sum() for name, x in values.items()}
        return {"tokens": tokens, **{k: x / tokens.clamp(min=1.0) for k, x in sums.items()}}


class RowParams(NamedTuple):
    """How logits become the distribution: u = softcap(z) / temperature over the first vocab_size
    columns.

    `softcap` 0.0 means none. Columns from vocab_size on are padding: never read, p = 0, gradient 0.
    `sharded`: the columns are a shard of the vocabulary. A target may then be ELSEWHERE, which in
    whole rows is out of range. `temperatures`: each row's, contiguous `[N]` in the accumulation
    dtype, in place of `temperature`; one that is not > 0 makes its row NaN.
    """

    temperature: float
    softcap: float
    vocab_size: int
    sharded: bool = False
    temperatures: Tensor | None = None

    def temperature_of_rows(self) -> float | Tensor:
        """The temperature, `[N, 1]` float64 where each row has its own."""
        own = self.temperatures
        return self.temperature if own is None else own.double()[:, None]


class TokenInputs(NamedTuple):
    """Per-token inputs of the loss, contiguous `[N]` in the accumulation dtype; None where not
    given.

    `token_weight` is that of the policy term, and of a term whose own weight is None. `log_ratio`
    is the log of the ratio itself, in place of `old_logp`.
    """

    advantages: Tensor
    token_weight: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    log_ratio: Tensor | None = None
    kl_weight: Tensor | None = None
    entropy_weight: Tensor | None = None

    def weighted(self, factor: float) -> TokenInputs:
        """The same with all weights times `factor`."""
        kl, entropy = self.kl_weight, self.entropy_weight
        return self._replace(
            token_weight=self.token_weight * factor,
            kl_weight=None if kl is None else kl * factor,
            entropy_weight=None if entropy is None else entropy * factor,
        )


class WeightingInputs(NamedTuple):
    """`PolarityWeighting` as a backend gets it: phase, sigma and scale are 0-dim on the logits'
    device."""

    strength: float
    phase: Tensor
    shape: str
    sigma: Tensor
    scale: Tensor
    dead_zone: float


class LossInputs(NamedTuple):
    """A policy loss's arguments beside the logits, as a backend takes them; `targets` is flat.

    `sequences` is for losses whose ratio is a sequence's, which no backend forms: the id of each
    token's sequence, ``[N]`` int64, negative where it is in none.
    """

    targets: Tensor
    tokens: TokenInputs
    objective: Objective
    weighting: WeightingInputs | None
    row: RowParams
    backend: str
    sequences: Tensor | None = None


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and outputs for logits of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
