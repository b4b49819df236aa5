"""The calls that are measured on a GPU: inputs of one shape, and how backends are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import produced
from benchmarks.shapes import LinearShape, Shape
from papo_kernels import (
    PolarityWeighting,
    PolicyLossOutput,
    PolicyLossParams,
    TokenStats,
    linear_policy_loss,
    policy_loss,
    token_stats,
)
from papo_kernels.backends import choice as backends
from papo_kernels.types import RowParams, TokenInputs

GPU = torch.device("cuda", 0)
_ROWS_AT_A_TIME = 256  # of torch's own formulas, which widen what they are given


class Workload:
    """Inputs of one shape; ``scratch`` is a copy of the logits that in-place cases may spoil,
    ``plain`` torch's logp."""

    def __init__(self, shape: Shape, device: torch.device = GPU) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)
        self.logits = torch.empty(shape.rows, shape.vocab, dtype=shape.dtype, device=device)
        self.logits.normal_(0, 2, generator=generator)
        self.scratch = torch.empty_like(self.logits)
        rows = (shape.rows,)
        self.targets = torch.randint(shape.vocab, rows, generator=generator, device=device)
        self.advantages = torch.randn(rows, generator=generator, device=device)
        self.token_weight = torch.full(rows, 1 / shape.rows, device=device)
        drift = torch.randn(rows, generator=generator, device=device)
        self.plain = plain_logp(self.logits, self.targets)
        self.old_logp = self.plain + 0.1 * drift
        one = torch.ones((), device=device)
        self.weighting = PolarityWeighting(0.5, one * 0.3, "tanh", sigma=one, scale=one)

    def restore(self) -> None:
        self.scratch.copy_(self.logits)

    def stats(self, backend: str) -> TokenStats:
        with torch.no_grad():
            return token_stats(self.logits, self.targets, backend=backend)

    def stats_backward(self, backend: str) -> Tensor | None:
        leaf = self.logits.detach().requires_grad_()
        out = token_stats(leaf, self.targets, backend=backend)
        (out.logp.sum() + out.entropy.sum() + out.unit_polarity.sum()).backward()
        return leaf.grad

    def loss(self, backend: str) -> PolicyLossOutput:
        """The loss, its gradient in ``scratch`` in place of the logits there."""
        out = policy_loss(
            produced(self.scratch),
            self.targets,
            self.advantages,
            self.token_weight,
            old_logp=self.old_logp,
            weighting=self.weighting,
            inplace=True,
            backend=backend,
        )
        out.loss.backward()
        return out

    def loss_into(self, logits: Tensor, dlogits: Tensor, backend: str) -> tuple[Tensor, ...]:
        """The backend's loss of the first rows, as the fused head calls it: one kernel, whose
        gradient may be narrower than the logits."""
        n, columns = logits.shape
        tokens = TokenInputs(self.advantages[:n], self.token_weight[:n], self.old_logp[:n], None)
        out: tuple[Tensor, ...] = backends.module(backend).policy_loss_fwd(
            logits,
            self.targets[:n],
            tokens,
            PolicyLossParams(),
            None,
            RowParams(1.0, 0.0, columns),
            dlogits,
        )
        return out


class LinearWorkload:
    """Inputs of one shape: hidden states, the head's weight and what the loss needs."""

    def __init__(self, shape: LinearShape, device: torch.device = GPU) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            out = torch.empty(size, dtype=shape.dtype, device=device)
            return out.normal_(0, std, generator=generator)

        rows = (shape.rows,)
        self.hidden = normal(shape.rows, shape.hidden)
        self.weight = normal(shape.vocab, shape.hidden, std=shape.hidden**-0.5)
        self.targets = torch.randint(shape.vocab, rows, generator=generator, device=device)
        self.advantages = torch.randn(rows, generator=generator, device=device)
        self.token_weight = torch.full(rows, 1 / shape.rows, device=device)

    def products(self) -> Any:
        """The three products of a head and its gradients, nothing else."""
        logits = self.hidden @ self.weight.T
        return logits @ self.weight, logits.T @ self.hidden

    def loss(self) -> Any:
        """Loss and both gradients."""
        h, w = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        linear_policy_loss(h, w, self.targets, self.advantages, self.token_weight).loss.backward()
        return h.grad, w.grad


def plain_logp(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of the targets in float32 by torch alone: no kernel under test decides the inputs."""
    parts = zip(logits.split(_ROWS_AT_A_TIME), targets.split(_ROWS_AT_A_TIME), strict=True)
    logps = [torch.log_softmax(z.float(), 1).gather(1, t[:, None])[:, 0] for z, t in parts]
    return torch.cat(logps)


def able_backends(dtype: torch.dtype, device: torch.device = GPU) -> dict[str, str]:
    """For each GPU backend why this machine cannot run it; empty where it can."""
    reasons = {}
    for name in ("cuda", "triton"):
        try:
            backends.choose(name, device, dtype)
            reasons[name] = ""
        except ValueError as error:
            reasons[name] = str(error)
    return reasons


def rates(ms: float, moved: int, copy_ms: float, copied: int) -> dict[str, Any]:
    """GB/s of `moved` bytes in `ms`, and that as a share of the copy's rate, which reads and
    writes `copied` bytes in `copy_ms`."""
    rate, copy_rate = moved / ms, copied / copy_ms
    return {"GB/s": rate / 1e6, "of copy rate": rate / copy_rate}
