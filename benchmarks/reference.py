"""What a peer's results are held against before it is timed: autograd through torch's own formulas,
in float64 at a few rows of logits, in float32 from hidden states."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Errors as shares of a norm. Half precision costs a gradient up to 0.02 of it.
STATS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 0.05
_ROWS_AT_A_TIME = 512  # of the logits that are made from hidden states

RowLoss = Callable[[Tensor, Tensor], Tensor]  # of logits and targets


class Disagreement(Exception):
    """A result that is not what its case's name says."""


def logp_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """In the precision of the logits."""
    logps = torch.log_softmax(logits, dim=-1)
    logp = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, -(logps.exp() * logps).sum(-1)


def logp_entropy_float32(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers compute without a kernel, in float32."""
    return logp_entropy(logits.float(), targets)


def stats_sum(logits: Tensor, targets: Tensor) -> Tensor:
    logp, entropy = logp_entropy(logits, targets)
    return logp.sum() + entropy.sum()


def nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return -logp_entropy(logits, targets)[0].sum()


def hold(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises unless `got` is near `expected`."""
    error = float((got.to(expected) - expected).norm() / expected.norm())
    if not error <= tolerance:  # NaN is not
        raise Disagreement(f"{what} differs by {error:.1e} of its norm")


def hold_gradient(what: str, got: Tensor, expected: Tensor, targeted: Tensor) -> None:
    """The same of a gradient, at the targets and elsewhere: beside what the targets get, all else
    is small, and it would not be missed."""
    if got.shape != expected.shape:
        raise Disagreement(f"{what} has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    for place, mask in (("at the targets", targeted), ("off the targets", ~targeted)):
        if mask.any():
            hold(f"{what} {place}", got[mask], expected[mask], GRADIENT_TOLERANCE)


class LogitsReference:
    """The first, the middle and the last row of logits [N, V]."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        rows = len(targets)
        self.index = torch.tensor(sorted({0, rows // 2, rows - 1}), device=logits.device)
        self.logits, self.targets = logits[self.index].double(), targets[self.index]
        columns = torch.arange(logits.shape[1], device=logits.device)
        self.targeted = columns == self.targets[:, None]

    def check_stats(self, result: tuple[Tensor, Tensor]) -> None:
        exact = logp_entropy(self.logits, self.targets)
        for what, got, expected in zip(("logp", "entropy"), result, exact, strict=True):
            hold(what, got[self.index], expected, STATS_TOLERANCE)

    def check_nll(self, result: Tensor) -> None:
        exact = logp_entropy(self.logits, self.targets)[0]
        hold("loss", result[self.index], -exact, STATS_TOLERANCE)

    def gradient_check(self, loss: RowLoss) -> Callable[[Tensor], None]:
        """Of the gradient of `loss`, which is given these rows of logits in float64."""

        def check(gradient: Tensor) -> None:
            leaf = self.logits.detach().requires_grad_()
            loss(leaf, self.targets).backward()
            assert leaf.grad is not None
            rows = gradient.reshape(-1, leaf.shape[1])[self.index]
            hold_gradient("the gradient", rows, leaf.grad, self.targeted)

        return check


class LinearReference:
    """Of hidden states [N, D] and the head's weight [V, D]: both gradients, computed once for each
    loss and only if asked for."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        self.hidden, self.weight, self.targets = hidden, weight, targets
        self.gradients = functools.cache(self._gradients)

    def gradient_check(
        self, loss: RowLoss, scale: float = 1.0
    ) -> Callable[[tuple[Tensor, Tensor]], None]:
        """Of the gradients of `scale` times `loss`, a sum over rows."""

        def check(result: tuple[Tensor, Tensor]) -> None:
            dhidden, dweight = self.gradients(loss)
            hold(
                "the gradient of the hidden states", result[0], dhidden * scale, GRADIENT_TOLERANCE
            )
            targeted = torch.zeros(len(self.weight), dtype=torch.bool, device=dweight.device)
            targeted[self.targets] = True
            what = "the gradient of the weight"
            hold_gradient(what, result[1], dweight * scale, targeted)

        return check

    def _gradients(self, loss: RowLoss) -> tuple[Tensor, Tensor]:
        hidden, weight = (x.detach().float().requires_grad_() for x in (self.hidden, self.weight))
        with _tf32():
            for i in range(0, len(hidden), _ROWS_AT_A_TIME):
                rows = slice(i, i + _ROWS_AT_A_TIME)
                loss(hidden[rows] @ weight.T, self.targets[rows]).backward()
        assert hidden.grad is not None and weight.grad is not None
        return hidden.grad, weight.grad


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Products in TF32, which is exact enough here and eight times as fast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
