"""Inputs and exact answers for the logits of a head.

The logits a head gives are written down once more in plain torch; statistics and loss of them, and
the tolerance rule, are `tests/oracle.py`'s. Scales of gradients are the sizes of what the matrix
products add up, |dlogits| |W| and |dlogits|^T |h|, with the logits' own rounding carried through.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from papo_kernels import (
    Compute,
    Head,
    KeepSet,
    LazyLogits,
    LoRA,
    Objective,
    PolarityWeighting,
    PolicyLossOutput,
    TokenStats,
    policy_loss,
    token_stats,
)
from tests.cases import Case
from tests.oracle import (
    acc_dtype,
    assert_close,
    plain_policy_loss,
    plain_token_stats,
    sampled_token_scale,
    slope_scale,
)

PARAMETERS = ("hidden", "weight", "bias", "lora_a", "lora_b")
LOSS_INPUTS = ("advantages", "token_weight", "old_logp", "ref_logp", "objective", "weighting")


@dataclass(frozen=True)
class HeadCase:
    """The arguments of one call. `tokens.logits` is what the head gives, in float64."""

    parameters: dict[str, Tensor]
    tokens: Case
    scaling: float = 1.0
    logit_scale: float | None = None
    keep: KeepSet | None = None

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The parameters as leaves that require grad, in their own dtype or another."""
        return {
            name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
            for name, x in self.parameters.items()
        }

    def head(self, leaves: dict[str, Tensor]) -> Head:
        lora = None
        if "lora_a" in leaves:
            lora = LoRA(leaves["lora_a"], leaves["lora_b"], self.scaling)
        return Head(
            leaves["weight"],
            bias=leaves.get("bias"),
            lora=lora,
            softcap=self.tokens.softcap,
            logit_scale=self.logit_scale,
            vocab_size=self.tokens.vocab_size,
        )

    def logits(self, leaves: dict[str, Tensor]) -> LazyLogits:
        return self.head(leaves)(leaves["hidden"], keep=self.keep)

    def token_stats(self, leaves: dict[str, Tensor], **compute: Any) -> TokenStats:
        return token_stats(
            self.logits(leaves),
            self.tokens.targets,
            temperature=self.tokens.temperature,
            compute=Compute(**compute),
        )

    def policy_loss(self, leaves: dict[str, Tensor], **compute: Any) -> PolicyLossOutput:
        return policy_loss(
            self.logits(leaves),
            self.tokens.targets,
            **{name: getattr(self.tokens, name) for name in LOSS_INPUTS},
            temperature=self.tokens.temperature,
            compute=Compute(**compute),
        )


def plain_logits(case: HeadCase, leaves: dict[str, Tensor]) -> Tensor:
    """The head in the dtype of `leaves`, rows that do not count taken as zero."""
    ignored = case.tokens.targets == -100
    if case.tokens.token_weight is not None:
        ignored = ignored | (case.tokens.token_weight == 0)
    hidden = torch.where(ignored[:, None], 0.0, leaves["hidden"])
    columns = case.tokens.vocab_size or leaves["weight"].shape[0]
    z = hidden @ leaves["weight"][:columns].t()
    if "bias" in leaves:
        z = z + leaves["bias"][:columns]
    if "lora_a" in leaves:
        z = z + case.scaling * (hidden @ leaves["lora_a"].t()) @ leaves["lora_b"][:columns].t()
    z = z * (case.logit_scale or 1.0)
    if case.keep is not None:
        kept = torch.zeros_like(z, dtype=torch.bool)
        for i in range(len(z)):
            kept[i, case.keep.ids[case.keep.offsets[i] : case.keep.offsets[i + 1]]] = True
        z = torch.where(kept | ignored[:, None], z, -torch.inf)
    return z


@dataclass(frozen=True)
class Traits:
    """What a head has beside its weight, and what its logits go through.

    Attributes:
        spread: the standard deviation of the logits.
        masked: the bias of every third id is -inf.
        rank: of the LoRA factors, 0 for none.
        kept: how many ids each token keeps, about; 0 for no filter.
    """

    spread: float = 3.0
    bias: bool = False
    masked: bool = False
    rank: int = 0
    vocab_size: int | None = None
    logit_scale: float | None = None
    softcap: float | None = None
    temperature: float = 1.0
    kept: int = 0


def make_head_case(
    n: int,
    d: int,
    v: int,
    traits: Traits | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    loss: bool = False,
    objective: Objective | None = None,
    weighting: PolarityWeighting | None = None,
) -> HeadCase:
    """Every seventh row is ignored and holds NaN; rows of padding hold NaN. `loss`: with the
    per-token inputs of one, off-policy."""
    traits = traits or Traits()
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    columns = v if traits.vocab_size is None else traits.vocab_size
    parameters = {"hidden": draw(n, d), "weight": draw(v, d, size=traits.spread / d**0.5)}
    if traits.bias or traits.masked:
        parameters["bias"] = draw(v)
    if traits.rank:
        parameters["lora_a"] = draw(traits.rank, d, size=d**-0.5)
        parameters["lora_b"] = draw(v, traits.rank)
    targets = torch.randint(columns, (n,), generator=g)
    targets[:1], targets[1:2] = 0, columns - 1
    if traits.masked:
        parameters["bias"][1:columns:3] = -torch.inf
        targets = torch.where(targets % 3 == 1, targets - 1, targets)
    targets[5::7] = -100
    parameters["hidden"][5::7] = torch.nan
    for name in ("weight", "bias", "lora_b"):
        if name in parameters:
            parameters[name][columns:] = torch.nan
    tokens = Case(
        torch.empty(n, columns),
        targets,
        temperature=traits.temperature,
        softcap=traits.softcap,
        vocab_size=traits.vocab_size,
        objective=objective or Objective(),
        weighting=weighting,
    )
    keep = make_keep(targets, columns, traits.kept, g)
    case = HeadCase(parameters, tokens, 1.5, traits.logit_scale, keep)
    case = replace(case, tokens=replace(tokens, logits=_exact_logits(case)))
    if loss:
        case = _with_loss(case, g)
    return _to(case, device)


def on_policy(case: HeadCase) -> HeadCase:
    return replace(case, tokens=replace(case.tokens, old_logp=None))


def make_keep(targets: Tensor, columns: int, kept: int, g: torch.Generator) -> KeepSet | None:
    """Random ids with the sampled one in a random place; one token keeps its own alone."""
    if not kept:
        return None
    rows = []
    for i, target in enumerate(targets.tolist()):
        ids = torch.randperm(columns, generator=g)[: 1 + (kept + i) % (2 * kept)]
        ids = ids[ids != target]
        if i == 2:
            ids = ids[:0]
        row = ids if target < 0 else torch.cat([ids, torch.tensor([target])])
        rows.append(row[torch.randperm(len(row), generator=g)])
    counts = torch.tensor([0, *map(len, rows)])
    return KeepSet(counts.cumsum(0), torch.cat(rows))


def _exact_logits(case: HeadCase) -> Tensor:
    return plain_logits(case, {k: x.double() for k, x in case.parameters.items()})


def _with_loss(case: HeadCase, g: torch.Generator) -> HeadCase:
    """Advantages of both signs, ratios beyond both clip bounds but not near them, weights of 0."""
    tokens = case.tokens
    row = {**tokens.row, "vocab_size": None}
    logp = plain_token_stats(tokens.logits, tokens.targets, **row).logp
    n, dtype = len(logp), acc_dtype(case.parameters["hidden"].dtype)

    def draw() -> Tensor:
        return torch.randn(n, generator=g, dtype=torch.float64)

    steps = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5])[torch.randint(5, (n,), generator=g)]
    token_weight = (draw().abs() + 0.1) / n
    token_weight[4::11] = 0.0
    old_logp = (logp - steps).to(dtype)
    ref_logp = (logp + 0.4 * draw()).to(dtype)
    case.parameters["hidden"][4::11] = torch.inf  # weight 0: whatever it holds
    tokens = replace(
        tokens, advantages=draw().to(dtype), token_weight=token_weight.to(dtype),
        old_logp=old_logp, ref_logp=ref_logp,
    )  # fmt: skip
    return replace(case, tokens=tokens)


def _to(case: HeadCase, device: str) -> HeadCase:
    if device == "cpu":
        return case
    tokens = {
        name: x.to(device) if isinstance(x := getattr(case.tokens, name), Tensor) else x
        for name in case.tokens.__dataclass_fields__
    }
    keep = None if case.keep is None else KeepSet(*(x.to(device) for x in case.keep))
    parameters = {name: x.to(device) for name, x in case.parameters.items()}
    return replace(case, parameters=parameters, tokens=Case(**tokens), keep=keep)


# ---- checks -------------------------------------------------------------------------------------


def _answers(case: HeadCase, upstream: Tensor | None, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Outputs, gradients and the logits' gradient of the plain formulas in `dtype`."""
    leaves = case.leaves(dtype)
    logits = plain_logits(case, leaves)
    logits.retain_grad()
    tokens = replace(case.tokens, vocab_size=None)
    if upstream is None:
        out = plain_policy_loss(tokens, dtype, logits)
        out.loss.backward()
    else:
        out = plain_token_stats(logits, tokens.targets, dtype=dtype, **tokens.row)
        torch.autograd.backward(out[:3], list(upstream.to(dtype)))
    grads = {name: x.grad for name, x in leaves.items()}
    return type(out)(*(x.detach() for x in out)), grads, logits.grad


def _magnitude(case: HeadCase) -> Tensor:
    """`[N]`: the size of the terms that add up to a row's largest logit, in units of u."""
    leaves = {name: x.double().abs() for name, x in case.parameters.items()}
    if "bias" in leaves:
        leaves["bias"] = leaves["bias"].nan_to_num(0.0, posinf=0.0)
    absolute = replace(case, keep=None, scaling=abs(case.scaling))
    return plain_logits(absolute, leaves).amax(1) / case.tokens.temperature


def _scales(
    case: HeadCase, dlogits: Tensor, swing: Tensor, sampled: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """Per parameter: what its gradient's rounding is measured in. `swing [N, 1]`, times an
    element's probability, is how far it moves in dlogits, beyond its own size, with the logits'
    rounding; `sampled [N, 1]` how far the sampled token's moves besides."""
    leaves = {
        name: x.double().abs().nan_to_num(0.0, posinf=0.0) for name, x in case.parameters.items()
    }
    columns = dlogits.shape[1]
    probability = torch.softmax(case.tokens.logits / case.tokens.temperature, 1).nan_to_num(0.0)
    is_sampled = torch.arange(columns, device=dlogits.device) == case.tokens.targets[:, None]
    size = dlogits.abs() + swing * probability + sampled * is_sampled
    hidden, weight = leaves["hidden"], leaves["weight"][:columns]
    scales = {"hidden": size @ weight, "weight": size.t() @ hidden, "bias": size.sum(0)}
    if "lora_a" in leaves:
        a, b = leaves["lora_a"], leaves["lora_b"][:columns]
        scales["lora_a"] = case.scaling * (size @ b).t() @ hidden
        scales["lora_b"] = case.scaling * size.t() @ (hidden @ a.t())
        scales["hidden"] = scales["hidden"] + case.scaling * size @ b @ a
    rows = len(case.parameters["weight"]) - columns
    for name in ("weight", "bias", "lora_b"):
        if name in scales:
            pad = (0, rows) if name == "bias" else (0, 0, 0, rows)
            scales[name] = torch.nn.functional.pad(scales[name], pad)
    return scales


def _check_gradients(
    case: HeadCase,
    leaves: dict[str, Tensor],
    answers: list[Any],
    swing: Tensor,
    sampled: Tensor | float = 0.0,
) -> None:
    (_, exact, dlogits), (_, plain, _) = answers
    scales = _scales(case, dlogits, swing, sampled)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        # The logits' gradient is rounded to a half dtype for the products that follow.
        half = leaf.dtype.itemsize == 2
        floor = torch.finfo(leaf.dtype).eps if half else None
        assert_close(name, leaf.grad, exact[name], plain[name], scales[name], floor=floor)


def check_head_token_stats(case: HeadCase, **compute: Any) -> None:
    """Every output of `token_stats` and all gradients for random upstream ones."""
    acc = acc_dtype(case.parameters["hidden"].dtype)
    g = torch.Generator().manual_seed(1)
    n = len(case.tokens.targets)
    upstream = torch.randn(3, n, generator=g).to(case.tokens.targets.device, acc)
    leaves = case.leaves()
    actual = case.token_stats(leaves, **compute)
    answers = [_answers(case, upstream, dtype) for dtype in (torch.float64, acc)]
    size = 1.0 + _magnitude(case)
    for name, a, e, p in zip(TokenStats._fields, actual, answers[0][0], answers[1][0], strict=True):
        assert a.dtype == acc
        assert_close(name, a, e, p, size * (1.0 + e.nan_to_num(0.0).abs()))
    torch.autograd.backward(actual[:3], list(upstream))
    swing = (upstream.double().abs().amax(0) * size * (1.0 + answers[0][0].entropy))[:, None]
    _check_gradients(case, leaves, answers, swing / case.tokens.temperature)


def check_head_policy_loss(case: HeadCase, **compute: Any) -> None:
    """Every output of `policy_loss` and all gradients of the loss."""
    acc = acc_dtype(case.parameters["hidden"].dtype)
    leaves = case.leaves()
    actual = case.policy_loss(leaves, **compute)
    answers = [_answers(case, None, dtype) for dtype in (torch.float64, acc)]
    exact, plain = answers[0][0], answers[1][0]
    size = 1.0 + _magnitude(case)
    A, beta = case.tokens.advantages.double().abs(), case.tokens.objective.kl_coef
    per_token = size * (1.0 + A) * (1.0 + exact.ratio) * (1.0 + exact.logp.abs() + exact.entropy)
    if beta:
        gap = (case.tokens.ref_logp.double() - exact.logp).exp()
        per_token = per_token * (1.0 + beta * gap)
    dloss = case.tokens.token_weight.double() * per_token
    for name in PolicyLossOutput._fields[:-1]:
        a, e, p = (getattr(x, name) for x in (actual, exact, plain))
        assert a.dtype == acc
        assert_close(name, a, e, p, dloss.sum() if name == "loss" else per_token)
    assert torch.equal(actual.clipped, exact.clipped)
    actual.loss.backward()
    tokens = replace(case.tokens, vocab_size=None)
    sampled = sampled_token_scale(tokens, exact, slope_scale(tokens, exact, size))
    swing = dloss[:, None] / tokens.temperature
    _check_gradients(case, leaves, answers, swing, sampled[:, None])
