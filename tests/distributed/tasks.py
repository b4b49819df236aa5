"""What a distributed test's ranks do: `python -m tests.distributed.tasks <json of run_tasks>`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaForCausalLM

from papo.config import OptimConfig, WeightingConfig
from papo.dist import collectives, group
from papo.dist.engine import Engine
from papo.errors import PapoError
from papo.policy.batch import Batcher, TrainingSequence
from papo.policy.module import Policy
from papo.policy.update import Update
from papo.policy.weighting import WeightController
from papo.train.entropy import EntropyMeasurement
from papo.train.experience import with_token_weights
from papo.train.stats import Passes, Pieces
from papo.train.step import Updater
from papo_kernels import Compute, Objective, PolarityWeighting
from tests.trainer.tiny import small_llama

VOCABULARY = 96


@dataclass(frozen=True)
class Loss:
    aggregation: str = "token"
    constant_length: int | None = 16


def model(tied: bool) -> LlamaForCausalLM:
    return small_llama(7, vocab_size=VOCABULARY, intermediate_size=56, tie_word_embeddings=tied)


def ds_config(stage: int, dtype: str) -> dict[str, Any]:
    from tests.distributed.configs import deepspeed_dict

    return deepspeed_dict(stage, dtype)


def make_engine(
    stage: int = 3,
    tied: bool = True,
    dtype: str = "fp32",
    temperature: float = 1.0,
    lr: float = 1e-2,
    frozen: bool = False,
) -> Engine:
    """`frozen`: the head, and with it the embedding where it is tied, is not trained."""
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    causal_lm = model(tied).to(torch_dtype)
    causal_lm.get_output_embeddings().requires_grad_(not frozen)
    policy = Policy(causal_lm, temperature=temperature)
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


def passes(e: Engine, micro: int) -> Passes:
    return Passes(e, Batcher(pad_id=0, max_row_tokens=2048, device=e.device), micro)


def update(
    over: Passes,
    pieces: Pieces,
    weighting: PolarityWeighting | None = None,
    lr: float = 1e-2,
    controller: WeightController | None = None,
) -> Update:
    controller = controller or WeightController(WeightingConfig())
    engine: Any = over.engine
    return Updater(engine, over.batcher, Objective(), controller).update(pieces, weighting, lr)


def my_part(everything: list[TrainingSequence], split: list[int]) -> list[TrainingSequence]:
    rank = collectives.rank()
    begin = sum(split[:rank])
    return everything[begin : begin + split[rank]]


def one_update(
    e: Engine,
    part: list[TrainingSequence],
    micro: int,
    loss: Loss,
    weighted: bool,
    *,
    lr: float = 1e-2,
    measured_tokens: int | None = None,
) -> Update:
    weighting = PolarityWeighting(strength=0.5, phase=0.7, scale=1.1) if weighted else None
    over = passes(e, micro)
    pieces = over.pieces(with_token_weights(part, loss))
    if measured_tokens is None:
        return update(over, pieces, weighting, lr)
    measurement = EntropyMeasurement.of(over, pieces, measured_tokens)
    return measurement.measure(update(over, pieces, weighting, lr))


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
    frozen: bool = False,
) -> dict[str, Any]:
    """One update on `sum(split)` sequences, `split[rank]` of them here."""
    e = make_engine(stage, tied, dtype, frozen=frozen)
    part = my_part(sequences(sum(split)), split)
    result = one_update(e, part, micro, Loss(aggregation), weighted, measured_tokens=0)
    return {
        "measured": result.measured_delta,
        "trained": e.trained_numel,
        "weights": whole_weights(e),
        "grad_norm": result.grad_norm,
        "sums": result.sums._asdict(),
        "branches": result.branches._asdict(),
        "applied": result.applied,
    }


def run_unfused(tied: bool, aggregation: str, frozen: bool) -> dict[str, Any]:
    """The update of `run_update` on eight sequences without anything of ours but the formulas:
    logits whole, from the model's own forward pass, torch's autograd through the eager loss.
    """
    from papo_kernels import policy_loss

    causal_lm = model(tied)
    causal_lm.get_output_embeddings().requires_grad_(not frozen)
    trained = [p for p in causal_lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.0)
    loss = predicted = 0.0
    part = with_token_weights(sequences(8), Loss(aggregation))

    def logits_of(s: TrainingSequence) -> torch.Tensor:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        return causal_lm(ids).logits[0, -len(s.response_ids) - 1 : -1]

    def mean_entropy() -> float:
        with torch.no_grad():
            logits = torch.cat([logits_of(s) for s in part])
        return float(torch.distributions.Categorical(logits=logits.double()).entropy().mean())

    before = mean_entropy()
    for s in part:
        n = len(s.response_ids)
        out = policy_loss(
            logits_of(s),
            torch.tensor(s.response_ids),
            torch.full((n,), s.advantage),
            torch.full((n,), s.weight),
            weighting=PolarityWeighting(strength=0.5, phase=0.7, scale=1.1),
            compute=Compute("reference"),
        )
        out.loss.backward()
        loss += float(out.loss)
        predicted += s.weight * float((out.weight * out.polarity).sum())
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    weights = {k: p.double().flatten().tolist() for k, p in causal_lm.named_parameters()}
    return {
        "weights": weights,
        "grad_norm": float(norm),
        "loss": loss,
        "predicted": predicted,
        "measured": mean_entropy() - before,
        "trained": sum(p.numel() for p in trained),
    }


def run_still(split: list[int], micro: int, dtype: str, tokens: int) -> float | None:
    """The entropy change that is measured where the weights do not move."""
    e = make_engine(3, dtype=dtype)
    part = my_part(sequences(sum(split)), split)
    return one_update(e, part, micro, Loss(), True, lr=0.0, measured_tokens=tokens).measured_delta


def run_nothing(stage: int) -> dict[str, Any]:
    """An update for which every completion was masked on every rank, after one that was not."""
    e = make_engine(stage)
    one_update(e, sequences(8), 4, Loss(), True)
    before = whole_weights(e)
    result = one_update(e, [], 4, Loss(), True)
    return {
        "sums": result.sums._asdict(),
        "grad_norm": result.grad_norm,
        "applied": result.applied,
        "unchanged": whole_weights(e) == before,
    }


def run_finite(stage: int, dtype: str) -> list[bool]:
    """What is said of weights and moments before and after an update, and with a NaN in the last
    moment that rank 0 holds."""
    e = make_engine(stage, dtype=dtype)
    said = [e.finite()]
    one_update(e, sequences(8), 4, Loss(), True)
    said.append(e.finite())
    if collectives.rank() == 0:
        assert e.adamw is not None
        *_, state = e.adamw.state.values()
        state["exp_avg_sq"].view(-1)[0] = math.nan
    return [*said, e.finite()]


def run_head_outside_a_gather() -> dict[str, Any]:
    """What a user of ZeRO-3 gets who passes the head's weight by attribute."""
    from papo_kernels import Head, token_stats

    e = make_engine(3, tied=False)
    weight = e.policy.causal_lm.get_output_embeddings().weight
    try:
        token_stats(Head(weight)(torch.zeros(4, weight.ds_shape[1])), torch.arange(4))
        message = ""
    except ValueError as error:
        message = str(error)
    return {"elements": weight.numel(), "message": message}


def run_fail_together(failing: int) -> str:
    """The text of the error that `failing` alone meets, on every rank."""
    try:
        with collectives.failing_together():
            if collectives.rank() == failing:
                raise PapoError(f"rank {failing} has no disk")
    except PapoError as error:
        return str(error)
    return ""


def run_exchange() -> list[str]:
    """What this rank receives where rank r sends r texts to every rank."""
    rank, world = collectives.rank(), collectives.world_size()
    return collectives.exchange([[f"{rank} to {r}"] * rank for r in range(world)])


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
    over = passes(e, 4)
    old = over.token_stats(part)
    part = [replace(s, old_logp=o.logp) for s, o in zip(part, old, strict=True)]
    from papo.policy.passes import loss_of

    ratios: list[float] = []
    for piece in over.pieces(part):
        batch = over.batcher.batch(piece)
        ratios += loss_of(e, batch, Objective(), None).ratio.tolist()
    return ratios


def run_stats(temperature: float) -> dict[str, Any]:
    """Entropy and logp of every token as the trainer sees them, beside brute force at the same
    temperature.
    """
    e = make_engine(3, True, temperature=temperature)
    part = sequences(6)
    over = passes(e, 4)
    got = over.token_stats(part)
    entropy, logp, unit_polarity = [], [], []
    with e.inference_model() as whole, torch.no_grad():
        for s in part:
            logits = whole(torch.tensor([s.prompt_ids + s.response_ids])).logits[
                0, len(s.prompt_ids) - 1 : -1
            ]
            ell = torch.log_softmax(logits.double() / temperature, -1)
            p, ids = ell.exp(), (range(len(s.response_ids)), list(s.response_ids))
            h = -(p * ell).sum(-1)
            score = p * (h[:, None] + ell)
            entropy += h.tolist()
            logp += ell[ids].tolist()
            unit_polarity += ((p * score).sum(-1) - score[ids]).tolist()
    # The last two carry no weight: what is averaged covers exactly the tokens of the loss.
    trained = [replace(s, weight=float(i < 4)) for i, s in enumerate(part)]
    sums = update(over, over.pieces(trained), lr=0.0).sums
    return {
        "entropy": torch.cat([s.entropy for s in got]).tolist(),
        "logp": torch.cat([s.logp for s in got]).tolist(),
        "unit_polarity": torch.cat([s.unit_polarity for s in got]).tolist(),
        "true_entropy": entropy,
        "true_logp": logp,
        "true_unit_polarity": unit_polarity,
        "lengths": [len(s.response_ids) for s in part],
        "mean_entropy": sums.mean(sums.entropy),
    }


def main(runners: Mapping[str, Any]) -> None:
    """`runners`: the functions `run_<task>` among other names."""
    group.start()
    results = {
        key: runners[f"run_{task}"](**options)
        for key, (task, options) in json.loads(sys.argv[1]).items()
    }
    group.stop()
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(globals())
