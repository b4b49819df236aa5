"""The entropy change predicted for a step, three times: to first order in the weights, and by
polarity, through AdamW and from the step's gradient alone.

Each is compared with the measured change, by rank correlation over the last steps.

First order in the weights is G . dtheta, where G is the gradient of the mean entropy, averaged over
the steps (papo/train/entropy.py), and dtheta what an update did to the weights. It is in nats, and
clipping, momentum, weight decay and every term of the loss are in it.

Polarity takes each token's logits for its own. Update k has the gradient g of
sum token_weight * loss, and with it the prediction

    p = -sum of g_t * unit_polarity              over the tokens that train

where g_t is the derivative of the policy term by the token's logp. Of the clipped surrogate, p is
the sum of token_weight * w * polarity over the tokens that are not clipped.

It is linear in g. What the optimizer does to g, it does to p:

    c = min(1, max_grad_norm / |g|)              clipping
    m = b1 m + (1 - b1) c p                      first moment
    v = b2 v + (1 - b2) (c |g|)^2                second moment, summed over the n parameters
    predicted = lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k) / n) + eps)

AdamW divides each parameter's step by the root of its own second moment; the prediction divides by
the root of their mean. Weight decay is left out, and so are the KL and entropy terms of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from papo.config import OptimConfig
    from papo.policy.update import Update

# Measured steps that the running correlation looks back on, and the fewest that show one.
WINDOW = 50
FEWEST = 8

# The metrics of the predictions, and what plots and tables call them.
PREDICTIONS = {
    "entropy/predicted_delta": "first order in the weights",
    "entropy/predicted_delta_polarity": "polarity through AdamW",
    "entropy/predicted_delta_instant": "polarity of the gradient alone",
}


def correlation_of(prediction: str) -> str:
    """The metric of the running correlation of one of `PREDICTIONS`."""
    return prediction.replace("predicted_delta", "prediction_correlation")


class EntropyPrediction:
    """AdamW's averages of polarity's prediction, and the last steps' predicted and measured
    changes.

    A step's figures are sums over its updates, the skipped ones left out: AdamW's moments do not
    move with them.

    Args:
        optim: the config's `optim` section.
        parameters: how many numbers are trained.
    """

    def __init__(self, optim: OptimConfig, parameters: int) -> None:
        self._optim = optim
        self._parameters = parameters
        self._updates = 0
        self._first = 0.0
        self._second = 0.0
        # The predictions of a step, in the order of `PREDICTIONS`, and its measured change.
        self._points: list[tuple[float, ...]] = []

    def observe(self, updates: Sequence[Update]) -> dict[str, float]:
        """Take a step's updates, in order; those that were skipped count for nothing.

        Returns:
            The step's figures by the names of their metrics, NaN where nothing was predicted; the
            measured change and the correlations only where every applied update was measured.
        """
        updates = [u for u in updates if u.applied]
        each = [(u.first_order, self._through_optimizer(u), u.sums.predicted) for u in updates]
        predicted = [sum(column) for column in zip(*each, strict=True)] or [math.nan] * 3
        figures = dict(zip(PREDICTIONS, predicted, strict=True))
        changes = [u.measured_delta for u in updates if u.measured_delta is not None]
        if len(changes) < len(updates):
            return figures
        measured = sum(changes) if updates else math.nan
        if math.isfinite(measured):
            self._points = [*self._points, (*predicted, measured)][-WINDOW:]
        *columns, real = zip(*self._points, strict=True) if self._points else [()] * 4
        return {
            **figures,
            "entropy/measured_delta": measured,
            **{
                correlation_of(name): rank_correlation(column, real)
                for name, column in zip(PREDICTIONS, columns, strict=True)
            },
        }

    def _through_optimizer(self, update: Update) -> float:
        optim, (decay, square_decay) = self._optim, self._optim.betas
        clip = 1.0
        if update.grad_norm > optim.max_grad_norm:
            clip = optim.max_grad_norm / update.grad_norm
        # A prediction that is not finite says nothing; kept, it would spoil all that come after.
        instant = update.sums.predicted if math.isfinite(update.sums.predicted) else 0.0
        self._updates += 1
        self._first = decay * self._first + (1.0 - decay) * clip * instant
        norm = clip * update.grad_norm
        self._second = square_decay * self._second + (1.0 - square_decay) * norm * norm
        first = self._first / (1.0 - decay**self._updates)
        second = self._second / (1.0 - square_decay**self._updates)
        return update.lr * first / (math.sqrt(second / self._parameters) + optim.eps)

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, exact in JSON."""
        return {
            "updates": self._updates,
            "first": self._first,
            "second": self._second,
            "points": [[x if math.isfinite(x) else None for x in p] for p in self._points],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self._updates = int(state["updates"])
        self._first = state["first"]
        self._second = state["second"]
        self._points = [tuple(math.nan if x is None else x for x in p) for p in state["points"]]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks.

    Pairs with a value that is not finite are left out. NaN with fewer than `FEWEST` pairs, and
    where one side is constant.
    """
    pairs = torch.tensor([list(a), list(b)], dtype=torch.float64)
    pairs = pairs[:, pairs.isfinite().all(0)]
    if pairs.shape[1] < FEWEST:
        return math.nan
    return pearson(_ranks(pairs[0]), _ranks(pairs[1]))


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two float64 vectors; NaN where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0.0 else math.nan


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[which]
