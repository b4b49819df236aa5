"""Part 4: how much of the change of a token's entropy is its own update's.

A row a token, appended to `own-<task>.jsonl`; batches that are there are not measured again.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.validity.isolated import (
    MAIN,
    SEED,
    Others,
    divisors,
    others_of,
    scaled,
    settings,
)
from experiments.validity.records import Records
from experiments.validity.workbench import Batch, Vector, Workbench, dot, use_threads
from papo.policy.batch import TrainingSequence
from papo.policy.passes import stats_of

BATCHES, TOKENS = 10, 12
KINDS = ("sgd", "adam")
DERIVATIVE = 0.25  # of the main step, by which its first order is differenced


def main(folder: Path, task: str, overrides: list[str]) -> None:
    """Measure what is missing of a task's batches.

    Raises:
        PapoError: an option is wrong, or the records are of other settings.
    """
    use_threads()
    with Workbench(task, SEED, overrides) as bench:
        wanted = {**settings(bench), "tokens": TOKENS}
        records = Records(folder / f"own-{task}.jsonl", wanted)
        batches = bench.batches()
        others = others_of(bench, batches)
        for i, batch in enumerate(islice(batches, BATCHES)):
            if i in records.done:
                continue
            records.append(i, _rows(bench, others, batch, i))
            print(f"{task} {i + 1}/{BATCHES}", flush=True)


def _rows(bench: Workbench, others: Others, batch: Batch, seed: int) -> list[dict[str, Any]]:
    """One for each drawn token and kind of step."""
    micro, side = batch.micro, bench.float32
    gradient = bench.policy_gradient(micro, side)
    base = side.stats(micro)
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    divided: dict[str, Vector] = {}
    for kind in KINDS:
        step = list(scaled(kind, gradient, others.square))
        size = MAIN[kind]
        after, up, down = (
            _entropy_moved(bench, batch, step, s)
            for s in (-size, -DERIVATIVE * size, DERIVATIVE * size)
        )
        changes[kind] = (after - base.entropy, (up - down) / (2.0 * DERIVATIVE))
        divided[kind] = list(divisors(kind, gradient, others.square))
    every = [(s, k) for s in batch.sequences for k in range(len(s.response_ids))]
    places = [(s, k, n) for n, (s, k) in enumerate(every) if s.advantage != 0.0]
    g = torch.Generator().manual_seed(seed)
    drawn = [places[int(i)] for i in torch.randperm(len(places), generator=g)[:TOKENS]]
    rows = []
    for sequence, k, n in drawn:
        up_logp, up_entropy = _token_gradients(bench, sequence, k)
        for kind in KINDS:
            triples = zip(up_logp, up_entropy, divided[kind], strict=True)
            product = sum(dot(a / d, b) for a, b, d in triples)
            measured, total = (float(x[n]) for x in changes[kind])
            rows.append(
                {
                    "kind": kind,
                    "advantage": float(micro.advantages[n]),
                    "weight": float(micro.token_weight[n]),
                    "logp": float(base.logp[n]),
                    "entropy": float(base.entropy[n]),
                    "unit_polarity": float(base.unit_polarity[n]),
                    "own": MAIN[kind]
                    * float(micro.advantages[n] * micro.token_weight[n])
                    * product,
                    "total": total,
                    "measured": measured,
                }
            )
    return rows


def _entropy_moved(bench: Workbench, batch: Batch, step: Vector, size: float) -> Tensor:
    with bench.moved(step, size):
        return bench.float32.stats(batch.micro).entropy


def _token_gradients(bench: Workbench, sequence: TrainingSequence, k: int) -> tuple[Vector, Vector]:
    """Of the log-prob and of the entropy of a completion's token `k`."""
    side = bench.float32
    stats = stats_of(side.policy, bench.micro([sequence]), gradient=True)
    stats.logp[k].backward(retain_graph=True)
    logp = side.take_gradient()
    stats.entropy[k].backward()
    return logp, side.take_gradient()
