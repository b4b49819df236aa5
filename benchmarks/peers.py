"""What others offer for the same work from logits, as benchmark cases.

`linear_peers` has those that start from hidden states. What a case returns is checked before it is
timed. A peer that cannot be imported, because it is absent or for any other reason, gives none; the
reason is in ``unavailable``.

Their APIs as of TRL 1.16, Liger-Kernel 0.8.5, QuACK 0.6.5, cut-cross-entropy 25.1 and verl 0.9.1.
None of them computes the polarity; what each does compute is in its case's name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, one_line
from benchmarks.reference import LogitsReference, logp_entropy, logp_entropy_float32, nll_sum
from benchmarks.reference import stats_sum as exact_sum

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


def imported(module: str, name: str) -> Any:
    """A module's attribute, or None. Packages raise all kinds of errors on import: for a missing
    driver, another package's version, a compiler."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        unavailable[module] = one_line(error)
        return None


def bare_packages(*names: str) -> None:
    """Makes these packages importable without what their `__init__` imports: verl's asks for Ray,
    which its kernels do not use. The outer package comes first."""
    for name in names:
        if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
            return
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations or ())
        package.__spec__ = spec
        sys.modules[name] = package


def _forward_backward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        leaf = logits.detach().requires_grad_()
        loss(leaf).backward()
        return leaf.grad

    return run


def torch_cases(logits: Tensor, targets: Tensor) -> Iterator[Case]:
    """torch.compile and torch's own fused cross-entropy."""
    reference = LogitsReference(logits, targets)
    compiled = torch.compile(lambda z: logp_entropy_float32(z, targets), dynamic=False)

    def stats_sum(z: Tensor) -> Tensor:
        logp, entropy = compiled(z)
        return logp.sum() + entropy.sum()

    def cross_entropy(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets, reduction="sum")

    yield Case(
        "torch.compile logp+entropy fwd",
        torch.no_grad()(lambda: compiled(logits)),
        check=reference.check_stats,
    )
    yield Case(
        "torch.compile logp+entropy fwd+bwd",
        _forward_backward(stats_sum, logits),
        check=reference.gradient_check(exact_sum),
    )
    yield Case(
        "torch F.cross_entropy fwd+bwd (loss only)",
        _forward_backward(cross_entropy, logits),
        check=reference.gradient_check(nll_sum),
    )


def trl_cases(logits: Tensor, targets: Tensor) -> Iterator[Case]:
    """TRL's one-pass kernel."""
    fused = imported("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    if fused is None:
        return
    reference = LogitsReference(logits, targets)

    def stats_sum(z: Tensor) -> Tensor:
        logp, entropy = fused(z, targets)
        return logp.sum() + entropy.sum()

    yield Case(
        "TRL logp+entropy fwd",
        torch.no_grad()(lambda: fused(logits, targets)),
        check=reference.check_stats,
    )
    yield Case(
        "TRL logp+entropy fwd+bwd",
        _forward_backward(stats_sum, logits),
        check=reference.gradient_check(exact_sum),
    )


def liger_cases(logits: Tensor, targets: Tensor, old_logp: Tensor) -> Iterator[Case]:
    """Liger's Triton GRPO loss of one sequence, its gradient in place of the logits. It takes
    [B, L + 1, V] and drops the last position, so one row is added."""
    triton_grpo_loss = imported("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    if triton_grpo_loss is None:
        return
    rows, vocab = logits.shape
    padded = torch.empty(1, rows + 1, vocab, dtype=logits.dtype, device=logits.device)
    advantages = torch.ones(1, device=logits.device)
    low, high = 0.2, 0.28
    reference = LogitsReference(logits, targets)

    def prepare() -> None:
        padded[0, :rows].copy_(logits)
        padded[0, rows].zero_()

    def run() -> Any:
        leaf = padded.detach().requires_grad_()
        inputs = (leaf, old_logp[None], None, targets[None], advantages)
        out = triton_grpo_loss(*inputs, temperature=1.0, beta=0.0, eps_low=low, eps_high=high)
        out[0].sum().backward()
        return leaf.grad

    def exact(z: Tensor, at: Tensor) -> Tensor:
        ratio = (logp_entropy(z, at)[0] - old_logp[reference.index]).exp()
        return -torch.minimum(ratio, ratio.clamp(1 - low, 1 + high)).sum()

    check = reference.gradient_check(exact)
    yield Case("Liger triton_grpo_loss fwd+bwd, in place (loss only)", run, prepare, check)


def quack_cases(logits: Tensor, targets: Tensor) -> Iterator[Case]:
    """QuACK's cross-entropy, loss and dx in one kernel (one read, one write)."""
    cross_entropy_fwd = imported("quack.cross_entropy", "cross_entropy_fwd")
    if cross_entropy_fwd is None:
        return
    reference = LogitsReference(logits, targets)
    check_gradient = reference.gradient_check(nll_sum)

    def check_both(result: tuple[Tensor, Tensor]) -> None:
        reference.check_nll(result[0])
        check_gradient(result[1])

    yield Case(
        "QuACK cross_entropy with dx (loss only)",
        torch.no_grad()(lambda: cross_entropy_fwd(logits, targets, return_dx=True)),
        check=check_both,
    )
    yield Case(
        "QuACK cross_entropy fwd (loss only)",
        torch.no_grad()(lambda: cross_entropy_fwd(logits, targets)),
        check=reference.check_nll,
    )


def logits_cases(
    logits: Tensor, targets: Tensor, old_logp: Tensor, compiled: bool = True
) -> list[Case]:
    """Every peer that starts from logits [N, V]; torch.compile only where `compiled`."""
    liger = functools.partial(liger_cases, old_logp=old_logp)
    makers = (torch_cases, trl_cases, liger, quack_cases)
    cases = [case for make in makers for case in make(logits, targets)]
    return [case for case in cases if compiled or "torch.compile" not in case.name]
