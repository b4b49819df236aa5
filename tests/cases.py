"""The inputs of the kernel tests: `Case` holds a call's arguments, the makers cover its regimes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import papo_kernels
from papo_kernels import (
    Compute,
    Logits,
    LogRatio,
    Objective,
    PolarityWeighting,
    PolicyLossOutput,
    TokenStats,
    TokenWeights,
)
from tests.oracle import (
    acc_dtype,
    divergence,
    kl_estimate,
    plain_policy_loss,
    plain_token_stats,
)


@dataclass(frozen=True)
class Case:
    """The arguments of one call. `logits [N, V]`, everything per token `[N]`; `log_ratio` in place
    of `old_logp`, `kl_weight` and `entropy_weight` beside `token_weight`."""

    logits: Tensor
    targets: Tensor
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    advantages: Tensor | None = None
    token_weight: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    log_ratio: Tensor | None = None
    kl_weight: Tensor | None = None
    entropy_weight: Tensor | None = None
    objective: Objective = field(default_factory=Objective)
    weighting: PolarityWeighting | None = None

    @property
    def row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("temperature", "softcap", "vocab_size")}

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the policy, the KL and the entropy term."""
        own = (self.token_weight, self.kl_weight, self.entropy_weight)
        return tuple(self.token_weight if w is None else w for w in own)

    def token_stats(self, logits: Tensor, backend: str | None) -> TokenStats:
        return papo_kernels.token_stats(
            Logits(logits, softcap=self.softcap, vocab_size=self.vocab_size),
            self.targets,
            temperature=self.temperature,
            compute=Compute(backend),
        )

    def policy_loss(
        self, logits: Tensor, backend: str | None, *, inplace: bool = False
    ) -> PolicyLossOutput:
        names = ("advantages", "ref_logp", "objective", "weighting", "temperature")
        weights: Any = self.token_weight
        if self.kl_weight is not None or self.entropy_weight is not None:
            weights = TokenWeights(weights, self.kl_weight, self.entropy_weight)
        return papo_kernels.policy_loss(
            Logits(logits, softcap=self.softcap, vocab_size=self.vocab_size),
            self.targets,
            token_weight=weights,
            old_logp=self.old_logp if self.log_ratio is None else LogRatio(self.log_ratio),
            **{name: getattr(self, name) for name in names},
            compute=Compute(backend, inplace=inplace),
        )


def _normal(n: int, v: int, g: torch.Generator) -> Tensor:
    return 3.0 * torch.randn(n, v, generator=g)


def _peaked(n: int, v: int, g: torch.Generator) -> Tensor:
    z = _normal(n, v, g)
    z[torch.arange(n), torch.randint(v, (n,), generator=g)] += 12.0
    return z


def _one_hot(n: int, v: int, g: torch.Generator) -> Tensor:
    z = torch.zeros(n, v)
    z[torch.arange(n), torch.randint(v, (n,), generator=g)] = 1e4
    return z


def _masked(n: int, v: int, g: torch.Generator) -> Tensor:
    z = _normal(n, v, g)
    hole = torch.rand(n, v, generator=g) < 0.3
    hole[torch.arange(n), torch.randint(v, (n,), generator=g)] = False
    return z.masked_fill(hole, -torch.inf)


def _leading_mask(n: int, v: int, g: torch.Generator) -> Tensor:
    z = _normal(n, v, g)
    z[:, : v // 2] = -torch.inf
    return z


def _all_but_one(n: int, v: int, g: torch.Generator) -> Tensor:
    z = torch.full((n, v), -torch.inf)
    z[torch.arange(n), torch.randint(v, (n,), generator=g)] = 1.5
    return z


LOGITS = {
    "normal": _normal,
    "peaked": _peaked,
    "uniform": lambda n, v, g: torch.full((n, v), 0.75),
    "one_hot": _one_hot,
    "masked": _masked,
    "leading_mask": _leading_mask,
    "all_but_one": _all_but_one,
    "negative": lambda n, v, g: _normal(n, v, g) - 120.0,
    "offset_up": lambda n, v, g: _normal(n, v, g) + 1e4,
    "offset_down": lambda n, v, g: _normal(n, v, g) - 1e4,
}
LAYOUTS = ("contiguous", "row_stride", "misaligned", "column_stride", "transposed")


def with_layout(x: Tensor, layout: str) -> Tensor:
    """`x [N, V]` in another memory layout; what lies between its elements is NaN."""
    n, v = x.shape

    def blank(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)

    if layout == "row_stride":
        return blank(n, v + 3)[:, :v].copy_(x)
    if layout == "misaligned":
        return blank(n * v + 1)[1:].view(n, v).copy_(x)
    if layout == "column_stride":
        return blank(n, 2 * v)[:, ::2].copy_(x)
    if layout == "transposed":
        return blank(v, n).t().copy_(x)
    return x.contiguous()


def make_case(
    kind: str,
    n: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    layout: str = "contiguous",
    vocab_size: int | None = None,
    temperature: float | None = 1.0,
    softcap: float | None = None,
) -> Case:
    """Logits of a regime and targets that include the first and last column, the argmax of every
    third row and, from six rows on, ignored ones. Padding columns hold NaN. A temperature of None:
    each row has its own, of the accumulation dtype."""
    g = torch.Generator().manual_seed(seed)
    columns = v if vocab_size is None else vocab_size
    logits = torch.full((n, v), torch.nan)
    logits[:, :columns] = LOGITS[kind](n, columns, g)
    logits = logits.to(dtype)
    targets = torch.randint(columns, (n,), generator=g)
    targets[:1], targets[1:2] = 0, columns - 1
    best = logits[:, :columns].float().argmax(1)
    unsampled = logits.float().gather(1, targets[:, None])[:, 0].isneginf()
    targets[2::3] = best[2::3]
    targets = torch.where(unsampled, best, targets)
    targets[5::7] = -100
    of_rows = 0.5 + torch.rand(n, generator=g).to(device, acc_dtype(dtype))
    logits = with_layout(logits.to(device), layout)
    return Case(
        logits,
        targets.to(device),
        of_rows if temperature is None else temperature,
        softcap,
        vocab_size,
    )


def make_loss_case(
    kind: str,
    n: int,
    v: int,
    *,
    on_policy: bool = False,
    gives_log_ratio: bool = False,
    own_weights: bool = False,
    objective: Objective | None = None,
    weighting: PolarityWeighting | None = None,
    seed: int = 0,
    **more: Any,
) -> Case:
    """`make_case` with advantages of both signs, ratios on both sides of both clip bounds, and some
    tokens of weight 0: the fifth, and any whose branch a rounding error could decide.

    `gives_log_ratio`: instead of `old_logp`. `own_weights`: the KL term and the entropy bonus have
    weights of their own.
    """
    case = make_case(kind, n, v, seed=seed, **more)
    g = torch.Generator().manual_seed(seed + 1)
    device, dtype = case.logits.device, acc_dtype(case.logits.dtype)

    def draw() -> Tensor:
        return torch.randn(n, generator=g).to(device=device, dtype=dtype)

    def weight(zero: int) -> Tensor:
        x = (draw().abs() + 0.1) / n
        x[zero::11] = 0.0
        return x

    logp = plain_token_stats(case.logits, case.targets, dtype=torch.float64, **case.row).logp
    token_weight = weight(4)
    advantages, gap = draw(), torch.minimum(0.4 * draw(), -logp.to(dtype))  # old_logp <= 0
    case = replace(
        case,
        advantages=advantages,
        token_weight=token_weight,
        old_logp=None if on_policy or gives_log_ratio else (logp + gap).to(dtype),
        log_ratio=-gap if gives_log_ratio else None,
        ref_logp=(logp + 0.4 * draw()).to(dtype),
        objective=Objective() if objective is None else objective,
        weighting=weighting,
    )
    if own_weights:
        case = replace(case, kl_weight=weight(2), entropy_weight=weight(3))
    near = _undecided(case)
    for own in case.weights:
        own[near] = 0.0
    return case


def _undecided(case: Case) -> Tensor:
    """Tokens near a discontinuity: a clip bound, a limit, the dead zone, polarity 0."""
    exact = plain_policy_loss(case, torch.float64)
    o, c, r = case.objective, exact.unit_polarity.abs(), exact.ratio
    near = torch.zeros_like(r, dtype=torch.bool)
    slack = 1e-4 * (1.0 + exact.logp.abs())
    distances = [o.clip_low, o.clip_high, *(o.negative_clip or ())]
    if case.old_logp is not None or case.log_ratio is not None:
        limit = torch.inf if o.log_ratio_limit is None else o.log_ratio_limit
        near |= (r.log().abs() - limit).abs() < slack
        for bound in (*(1.0 + x for x in distances), *(1.0 - x for x in distances), o.dual_clip):
            near |= bound is not None and (r - bound).abs() < slack
        if o.surrogate.startswith("dppo"):
            old_logp = exact.logp - r.log() if case.old_logp is None else case.old_logp.double()
            for bound in distances:
                far = divergence(o.surrogate, exact.logp, old_logp)
                near |= (far - bound).abs() < 1e-5
    if o.kl_coef:
        kl = kl_estimate(o, exact.logp, case.ref_logp.double()).abs()
        near |= (kl - (torch.inf if o.kl_limit is None else o.kl_limit)).abs() < slack
        near |= (o.kl_estimator == "abs") & (kl < slack)
    if case.weighting is not None and case.weighting.shape == "sign":
        near |= (c - case.weighting.dead_zone).abs() < 1e-5
    return near


# ---- one token ----------------------------------------------------------------------------------

P_A = 0.4  # of the sampled token of `one_token`


def one_token(
    backend: str, device: str, ratio: float = 1.0, advantage: float = 1.0, **more: Any
) -> tuple[PolicyLossOutput, float]:
    """The loss of one token of probability 0.4 at a chosen ratio, and its derivative by logp. A
    ratio of 1 is that of the policy itself, exactly."""
    logits = torch.tensor([[math.log(P_A), math.log(0.35), math.log(0.25)]], device=device)
    logits = logits.requires_grad_()
    old_logp = torch.tensor([math.log(P_A) - math.log(ratio)], device=device)
    out = papo_kernels.policy_loss(
        logits,
        torch.tensor([0], device=device),
        torch.tensor([advantage], device=device),
        torch.ones(1, device=device),
        old_logp=None if ratio == 1.0 else old_logp,
        compute=Compute(backend),
        **more,
    )
    return out, torch.autograd.grad(out.loss, logits)[0][0, 0].item() / (1.0 - P_A)
