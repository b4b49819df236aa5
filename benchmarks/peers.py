"""What others offer for the same work, as benchmark cases.

A peer that cannot be imported, because it is absent or for any other reason, gives none; the reason
is in ``unavailable``.

Their APIs as of TRL 1.16, Liger-Kernel 0.8.5, QuACK 0.6.5 and cut-cross-entropy 25.1. None of them
computes the polarity; what each does compute is in its case's name.
"""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, one_line

# The error by module, of the peers that were asked for and could not be imported.
unavailable: dict[str, str] = {}


def use_wheels(wheels: Path, into: Path) -> list[str]:
    """Unpacks a folder's wheels into `into`, from where they are then imported, in preference to
    what is installed; the file names of those that could be unpacked, the others are in
    ``unavailable``. Nothing that they need besides is looked for."""
    unpacked = []
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                if bad := archive.testzip():  # before a part of it is there to be imported
                    raise zipfile.BadZipFile(f"{bad} is damaged")
                archive.extractall(into)
        except Exception as error:  # the archive's, the compression's or the disk's
            unavailable[wheel.name] = one_line(error)
        else:
            unpacked.append(wheel.name)
    sys.path.insert(0, str(into))
    importlib.invalidate_caches()
    return unpacked


def _imported(module: str, name: str) -> Any:
    """A module's attribute, or None. Packages raise all kinds of errors on import: for a missing
    driver, another package's version, a compiler."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        unavailable[module] = one_line(error)
        return None


def _forward_backward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        leaf = logits.detach().requires_grad_()
        loss(leaf).backward()
        return leaf.grad

    return run


def logp_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers compute without a kernel, in float32."""
    logps = torch.log_softmax(logits.float(), dim=-1)
    logp = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, -(logps.exp() * logps).sum(-1)


def torch_cases(logits: Tensor, targets: Tensor) -> Iterator[Case]:
    """torch.compile and torch's own fused cross-entropy."""
    compiled = torch.compile(logp_entropy, dynamic=False)

    def stats_sum(z: Tensor) -> Tensor:
        logp, entropy = compiled(z, targets)
        return logp.sum() + entropy.sum()

    def cross_entropy(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets, reduction="sum")

    yield Case("torch.compile logp+entropy fwd", torch.no_grad()(lambda: compiled(logits, targets)))
    yield Case("torch.compile logp+entropy fwd+bwd", _forward_backward(stats_sum, logits))
    yield Case("torch F.cross_entropy fwd+bwd", _forward_backward(cross_entropy, logits))


def trl_cases(logits: Tensor, targets: Tensor) -> Iterator[Case]:
    """TRL's one-pass kernel."""
    fused = _imported("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    if fused is None:
        return

    def stats_sum(z: Tensor) -> Tensor:
        logp, entropy = fused(z, targets)
        return logp.sum() + entropy.sum()

    yield Case("TRL logp+entropy fwd", torch.no_grad()(lambda: fused(logits, targets)))
    yield Case("TRL logp+entropy fwd+bwd", _forward_backward(stats_sum, logits))


def liger_cases(logits: Tensor, targets: Tensor) -> Iterator[Case]:
    """Liger's Triton GRPO loss, gradient over the logits. It takes [B, L + 1, V] and drops the last
    position, so one row is added."""
    triton_grpo_loss = _imported("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    if triton_grpo_loss is None:
        return
    rows, vocab = logits.shape
    padded = torch.empty(1, rows + 1, vocab, dtype=logits.dtype, device=logits.device)
    old_logp = torch.full((1, rows), -5.0, device=logits.device)
    advantages = torch.ones(1, device=logits.device)

    def prepare() -> None:
        padded[0, :rows].copy_(logits)
        padded[0, rows].zero_()

    def run() -> Any:
        leaf = padded.detach().requires_grad_()
        out = triton_grpo_loss(
            leaf, old_logp, None, targets[None], advantages, temperature=1.0, beta=0.0
        )
        out[0].sum().backward()
        return leaf.grad

    yield Case("Liger triton_grpo_loss fwd+bwd", run, prepare)


def quack_cases(logits: Tensor, targets: Tensor) -> Iterator[Case]:
    """QuACK's cross-entropy, loss and dx in one kernel (one read, one write)."""
    cross_entropy_fwd = _imported("quack.cross_entropy", "cross_entropy_fwd")
    if cross_entropy_fwd is None:
        return
    yield Case(
        "QuACK cross_entropy with dx (loss only)",
        torch.no_grad()(lambda: cross_entropy_fwd(logits, targets, return_dx=True)),
    )
    yield Case(
        "QuACK cross_entropy fwd (loss only)",
        torch.no_grad()(lambda: cross_entropy_fwd(logits, targets)),
    )


def logits_cases(logits: Tensor, targets: Tensor, compiled: bool = True) -> list[Case]:
    """Every peer that starts from logits [N, V]; torch.compile only where `compiled`."""
    makers = (torch_cases, trl_cases, liger_cases, quack_cases)
    cases = [case for make in makers for case in make(logits, targets)]
    return [case for case in cases if compiled or "torch.compile" not in case.name]


# ---- from hidden states -------------------------------------------------------------------------


def _linear_run(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor
) -> Callable[[], Any]:
    def run() -> Any:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss(h, w).backward()
        return h.grad, w.grad

    return run


def linear_cases(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Case]:
    """Every peer that starts from hidden states [N, D] and the head's weight [V, D]."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch F.linear_cross_entropy (loss only)"] = lambda h, w: F.linear_cross_entropy(
            h, w, targets
        )
    if chunked := _imported("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"):

        def trl_loss(h: Tensor, w: Tensor) -> Tensor:
            out = chunked.apply(h, w, None, targets, 1.0, 32768, None, 1.0, ("entropy",))
            return out[0].sum() + out[1].sum()

        losses["TRL ChunkedLogProbFunction logp+entropy"] = trl_loss
    module = "liger_kernel.ops.fused_linear_cross_entropy"
    if liger := _imported(module, "LigerFusedLinearCrossEntropyFunction"):
        losses["Liger fused_linear_cross_entropy (loss only)"] = lambda h, w: liger.apply(
            h, w, targets
        )[0]
    if quack := _imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy"):
        losses["QuACK chunked_linear_cross_entropy (loss only)"] = lambda h, w: quack(h, w, targets)
    if cce := _imported("cut_cross_entropy", "linear_cross_entropy"):
        losses["CCE linear_cross_entropy (loss only, gradients filtered)"] = lambda h, w: cce(
            h, w, targets
        )
    return [Case(name, _linear_run(loss, hidden, weight)) for name, loss in losses.items()]
