"""What a distributed test's ranks do: `python -m tests.distributed.tasks <json of run_tasks>`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from papo import checkpoint, collectives, engine
from papo.batch import TrainingSequence, collate
from papo.config import OptimConfig
from papo.engine import Engine
from papo.experience import with_token_weights
from papo.objective import Policy
from papo.stats import token_stats_of
from papo.step import Update, update
from papo.weighting import WeightController
from papo_kernels import PolarityWeighting, PolicyLossParams

VOCABULARY = 96


@dataclass(frozen=True)
class Weighting:
    strength: float = 0.5
    shape: str = "sign"
    dead_zone: float = 1e-6
    conserve: bool = True
    sigma_decay: float = 0.95


@dataclass(frozen=True)
class Loss:
    aggregation: str = "token"
    constant_length: int | None = 16


def model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def ds_config(stage: int, dtype: str) -> dict[str, Any]:
    from tests.distributed.configs import deepspeed_dict

    return deepspeed_dict(stage, dtype)


def make_engine(
    stage: int = 3,
    tied: bool = True,
    dtype: str = "fp32",
    temperature: float = 1.0,
    lr: float = 1e-2,
) -> Engine:
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    policy = Policy(model(tied).to(torch_dtype), temperature=temperature, backend=None)
    return Engine(policy, ds_config(stage, dtype), OptimConfig(lr=lr, eps=1e-3))


def sequences(count: int = 8, seed: int = 0) -> list[TrainingSequence]:
    """Pairs of completions share a prompt; lengths differ."""
    g = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCABULARY, (n,), generator=g).tolist())

    made: list[TrainingSequence] = []
    for i in range(count):
        prompt = ids(3 + i) if i % 2 == 0 else made[-1].prompt_ids
        response = ids(2 + (3 * i) % 5)
        advantage = float(torch.randn((), generator=g))
        made.append(
            TrainingSequence(prompt, response, (-1.0,) * len(response), advantage, 1.0, i // 2)
        )
    return made


def make_batch(part: list[TrainingSequence]) -> Any:
    return collate(part, pad_id=0, max_row_tokens=2048)


def my_part(everything: list[TrainingSequence], split: list[int]) -> list[TrainingSequence]:
    rank = collectives.rank()
    begin = sum(split[:rank])
    return everything[begin : begin + split[rank]]


def one_update(
    e: Engine, part: list[TrainingSequence], micro: int, loss: Loss, weighted: bool, **changes: Any
) -> Update:
    weighting = PolarityWeighting(strength=0.5, phase=0.7, scale=1.1) if weighted else None
    part = with_token_weights(part, loss)
    if changes:
        part = [replace(s, **changes) for s in part]
    return update(
        e,
        part,
        make_batch,
        micro_batch_size=micro,
        params=PolicyLossParams(),
        weighting=weighting,
        controller=WeightController(Weighting()),
        lr=1e-2,
    )


def whole_weights(e: Engine) -> dict[str, list[float]]:
    with e.inference_model() as whole:
        return {name: p.double().flatten().tolist() for name, p in whole.named_parameters()}


def run_update(
    split: list[int],
    micro: int,
    stage: int,
    tied: bool,
    aggregation: str = "token",
    weighted: bool = True,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """One update on `sum(split)` sequences, `split[rank]` of them here."""
    e = make_engine(stage, tied, dtype)
    result = one_update(
        e, my_part(sequences(sum(split)), split), micro, Loss(aggregation), weighted
    )
    return {
        "weights": whole_weights(e),
        "grad_norm": result.grad_norm,
        "sums": vars(result.sums),
        "branches": result.branches._asdict(),
        "applied": result.applied,
    }


def run_bad_update(stage: int, where: str) -> dict[str, Any]:
    """A step with a non-finite loss or gradient, then a good one."""
    e = make_engine(stage)
    split = [4, 4][: collectives.world_size()]
    part = my_part(sequences(sum(split)), split)
    one_update(e, part, 4, Loss(), False)
    before = whole_weights(e)
    if collectives.rank() == 0:  # one rank alone is enough to spoil the step for all
        part = [
            replace(part[0], advantage=math.nan if where == "gradient" else math.inf),
            *part[1:],
        ]
    bad = one_update(e, part, 4, Loss(), False)
    unchanged = whole_weights(e) == before
    steps = e.optimizer_steps
    part = my_part(sequences(sum(split)), split)
    good = one_update(e, part, 4, Loss(), False)
    return {
        "bad_applied": bad.applied,
        "reason": bad.reason,
        "unchanged": unchanged,
        "steps": steps,
        "good_applied": good.applied,
        "moved": whole_weights(e) != before,
    }


def run_first_ratio(dtype: str) -> list[float]:
    """Ratios of the first update when the old policy's log-probs were computed."""
    e = make_engine(3, True, dtype, temperature=0.7)
    part = sequences(8)
    old = token_stats_of(e, part, 4, make_batch)
    part = [replace(s, old_logp=o.logp) for s, o in zip(part, old, strict=True)]
    from papo.batch import micro_batches
    from papo.objective import loss_of

    ratios: list[float] = []
    for piece in micro_batches(part, 4, count=2):
        ratios += loss_of(e, make_batch(piece), PolicyLossParams(), None).ratio.tolist()
    return ratios


def run_stats(temperature: float) -> dict[str, Any]:
    """Entropy and logp of every token as the trainer sees them, beside brute force at the same
    temperature.
    """
    e = make_engine(3, True, temperature=temperature)
    part = sequences(6)
    got = token_stats_of(e, part, 4, make_batch)
    entropy, logp = [], []
    with e.inference_model() as whole, torch.no_grad():
        for s in part:
            logits = whole(torch.tensor([s.prompt_ids + s.response_ids])).logits[
                0, len(s.prompt_ids) - 1 : -1
            ]
            ell = torch.log_softmax(logits.double() / temperature, -1)
            entropy += (-(ell.exp() * ell).sum(-1)).tolist()
            logp += ell[range(len(s.response_ids)), list(s.response_ids)].tolist()
    return {
        "entropy": torch.cat([s.entropy for s in got]).tolist(),
        "logp": torch.cat([s.logp for s in got]).tolist(),
        "true_entropy": entropy,
        "true_logp": logp,
    }


def run_save(
    folder: str, stage: int, tied: bool, split: list[int], dtype: str = "fp32"
) -> dict[str, Any]:
    """Two updates, a checkpoint, a third update."""
    from pathlib import Path

    e = make_engine(stage, tied, dtype)
    part = my_part(sequences(sum(split)), split)
    for _ in range(2):
        one_update(e, part, 4, Loss(), True)
    checkpoint.save(Path(folder), 2, e, {"cursor": 5}, keep=2)
    one_update(e, part, 4, Loss(), True)
    return {"weights": whole_weights(e), "steps": e.optimizer_steps}


def run_load(
    folder: str, stage: int, tied: bool, split: list[int], dtype: str = "fp32"
) -> dict[str, Any]:
    """Load what `run_save` saved, then the third update."""
    from pathlib import Path

    e = make_engine(stage, tied, dtype)
    part = my_part(sequences(sum(split)), split)
    one_update(e, part, 4, Loss(), False, weight=0.0)
    state = checkpoint.load(checkpoint.completed(Path(folder))[-1][1], e)
    one_update(e, part, 4, Loss(), True)
    return {"weights": whole_weights(e), "steps": e.optimizer_steps, "cursor": state["cursor"]}


def main() -> None:
    engine.start()
    results = {
        key: globals()[f"run_{task}"](**options)
        for key, (task, options) in json.loads(sys.argv[1]).items()
    }
    engine.stop()
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
