"""The arguments of the operations: rows and losses as flat lists of what torch's schemas have.

The numbers of a call travel as one float64 tensor on the CPU, which an operation reads when it
runs. As floats they would be constants of a compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from papo_kernels.objective import Objective
from papo_kernels.types import LossInputs, RowParams, TokenInputs, WeightingInputs

# `RowParams` and the backend.
ROW_SCHEMA = "Tensor numbers, Tensor? temperatures, SymInt vocab_size, str backend"
# `LossInputs`. The weighting applies where phase, sigma and scale are given.
LOSS_SCHEMA = (
    "Tensor targets, Tensor advantages, Tensor token_weight, Tensor? old_logp, Tensor? ref_logp, "
    "Tensor? log_ratio, Tensor? kl_weight, Tensor? entropy_weight, "
    "Tensor? phase, Tensor? sigma, Tensor? scale, str shape, "
    "str surrogate, str kl_estimator, bool kl_ratio, Tensor numbers, Tensor? temperatures, "
    "SymInt vocab_size, str backend"
)


def _tensor_of(numbers: Sequence[float]) -> Tensor:
    """`numbers` as a float64 tensor on the CPU."""
    # Sums, unlike torch.tensor(), leave the numbers variables of a traced graph.
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + number for number in numbers])


def flattened_row(row: RowParams, backend: str) -> tuple[Any, ...]:
    """The arguments of `ROW_SCHEMA`."""
    numbers = _tensor_of((row.temperature, row.softcap))
    return numbers, row.temperatures, row.vocab_size, backend


def unflattened_row(arguments: Sequence[Any]) -> tuple[RowParams, str]:
    """The inverse of `flattened_row`."""
    numbers, temperatures, vocab_size, backend = arguments
    temperature, softcap = numbers.tolist()
    return RowParams(temperature, softcap, vocab_size, temperatures=temperatures), backend


def flattened(inputs: LossInputs) -> tuple[Any, ...]:
    """The arguments of `LOSS_SCHEMA`."""
    targets, tokens, objective, weighting, row, backend = inputs[:6]
    scalars: tuple[Tensor | None, ...] = (None, None, None)
    shape, strength, dead_zone = "sign", 0.0, 0.0
    if weighting is not None:
        scalars = (weighting.phase, weighting.sigma, weighting.scale)
        shape, strength, dead_zone = weighting.shape, weighting.strength, weighting.dead_zone
    numbers = (row.temperature, row.softcap, strength, dead_zone, *objective.numbers())
    return (
        targets,
        *tokens,
        *scalars,
        shape,
        objective.surrogate,
        objective.kl_estimator,
        objective.kl_ratio,
        _tensor_of(numbers),
        row.temperatures,
        row.vocab_size,
        backend,
    )


def unflattened(arguments: Sequence[Any]) -> LossInputs:
    """The inverse of `flattened`, but for what a backend does not read."""
    targets, *tokens, phase, sigma, scale, shape = arguments[:12]
    surrogate, kl_estimator, kl_ratio, numbers, temperatures, vocab_size, backend = arguments[12:]
    temperature, softcap, strength, dead_zone, *terms = numbers.tolist()
    weighting = None
    if phase is not None:
        weighting = WeightingInputs(strength, phase, shape, sigma, scale, dead_zone)
    return LossInputs(
        targets,
        TokenInputs(*tokens),
        Objective.of_numbers(surrogate, kl_estimator, kl_ratio, terms),
        weighting,
        RowParams(temperature, softcap, vocab_size, temperatures=temperatures),
        backend,
    )
