"""What others offer from hidden states, as benchmark cases; see `peers`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case
from benchmarks.peers import bare_packages, imported
from benchmarks.reference import LinearReference, RowLoss, nll_sum, stats_sum

TRL_VOCAB_CHUNK = 32768
# Liger's own choice is the smallest tiles of logits, about as many numbers as the hidden states
# have. This many times as large, they are few enough to keep the device busy.
LIGER_BUDGET = 8

LinearLoss = Callable[[Tensor, Tensor], Tensor]  # of hidden states and weight


def _run(loss: LinearLoss, hidden: Tensor, weight: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss(h, w).backward()
        return h.grad, w.grad

    return run


def _stats_losses(targets: Tensor, compiled: bool) -> Iterator[tuple[str, LinearLoss]]:
    """The sum of logp and entropy."""
    if compiled:
        head = torch.compile(lambda h, w: stats_sum((h @ w.T).float(), targets), dynamic=False)
        yield "torch.compile head logp+entropy", head
    if chunked := imported("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"):

        def trl(h: Tensor, w: Tensor) -> Tensor:
            chunk = TRL_VOCAB_CHUNK
            out = chunked.apply(h, w, None, targets, 1.0, chunk, None, 1.0, ("entropy",))
            return out[0].sum() + out[1].sum()

        yield "TRL ChunkedLogProbFunction logp+entropy", trl
    if not targets.is_cuda:  # verl's kernel asserts that
        return
    bare_packages("verl", "verl.utils")
    if fused := imported("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"):
        ones = torch.ones(len(targets), device=targets.device)

        def verl(h: Tensor, w: Tensor) -> Tensor:
            logp, entropy = fused(h, w, targets, 1.0, "none")
            # Not `sum`: its gradient has no strides, which the kernel does not take.
            return torch.dot(logp, ones) + torch.dot(entropy, ones)

        yield "verl linear_cross_entropy logp+entropy", verl


def _nll_losses(targets: Tensor) -> Iterator[tuple[str, LinearLoss, bool]]:
    """The mean negative log-probability, and whether its gradients are complete."""
    if hasattr(F, "linear_cross_entropy"):
        name = "torch F.linear_cross_entropy (loss only)"
        yield name, lambda h, w: F.linear_cross_entropy(h, w, targets), True
    if liger := imported(
        "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    ):
        name = "Liger fused_linear_cross_entropy (loss only)"
        yield name, lambda h, w: liger(h, w, targets), True
        wide = functools.partial(liger, chunk_mem_const=LIGER_BUDGET)
        name = f"Liger fused_linear_cross_entropy, {LIGER_BUDGET}x tiles (loss only)"
        yield name, lambda h, w: wide(h, w, targets), True
    if quack := imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy"):
        name = "QuACK chunked_linear_cross_entropy (loss only)"
        yield name, lambda h, w: quack(h, w, targets), True
    if cce := imported("cut_cross_entropy", "linear_cross_entropy"):
        name = "CCE linear_cross_entropy (loss only, gradients filtered)"
        yield name, lambda h, w: cce(h, w, targets), False
        name = "CCE linear_cross_entropy, unfiltered (loss only)"
        yield name, lambda h, w: cce(h, w, targets, filter_eps=None), True


def _liger_grpo(targets: Tensor, sequences: int) -> Iterator[tuple[str, LinearLoss]]:
    """Liger's fused linear GRPO loss, compiled, without a reference model: the sum over tokens of
    -ratio, where the ratio is to the logp itself. A sequence at a time."""
    module = imported("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if module is None:
        return
    loss = module(beta=0.0, use_ref_model=False, loss_type="dapo")
    ids = targets.view(sequences, -1)
    mask = torch.ones_like(ids)
    advantages = torch.ones(sequences, device=ids.device)

    def run(h: Tensor, w: Tensor) -> Tensor:
        out = loss(h.view(*ids.shape, -1), w, ids, mask, advantages)[0]
        return out * len(targets)

    yield "Liger LigerFusedLinearGRPOLoss, compiled", run


def linear_cases(
    hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool = False
) -> list[Case]:
    """Every peer that starts from hidden states [N, D] and the head's weight [V, D]; those that
    torch.compile makes only where `compiled`."""
    reference = LinearReference(hidden, weight, targets)
    cases: list[Case] = []

    def add(name: str, loss: LinearLoss, exact: RowLoss | None, scale: float = 1.0) -> None:
        check = None if exact is None else reference.gradient_check(exact, scale)
        cases.append(Case(name, _run(loss, hidden, weight), check=check))

    for name, loss in _stats_losses(targets, compiled):
        add(name, loss, stats_sum)
    for name, loss, complete in _nll_losses(targets):
        add(name, loss, nll_sum if complete else None, 1 / len(targets))
    if compiled:
        for name, loss in _liger_grpo(targets, 8):
            add(name, loss, nll_sum)
    return cases
