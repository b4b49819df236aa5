"""What the ranks do in test_average: `python -m tests.distributed.average_tasks <json>`."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch

from papo.config import OptimConfig
from papo.dist import collectives
from papo.dist.engine import Engine, StepResult
from papo.dist.partition import COMPUTE, MASTER, MOMENTS, read_share
from papo.policy.batch import TrainingSequence
from papo.policy.module import Policy
from papo.policy.passes import loss_of
from papo.train.entropy import EntropyGradient
from papo_kernels import Objective
from tests.distributed import tasks
from tests.distributed.configs import deepspeed_dict
from tests.distributed.tasks import Loss, model, my_part, passes, sequences

DECAY = 0.7
FOLDS = 3
CLIP = 1e-2


def engine_of(stage: int, dtype: str, **offload: str) -> Engine:
    """Untied; both gradients are clipped, and weights decay."""
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    policy = Policy(model(False).to(torch_dtype), temperature=1.0)
    ds = {**deepspeed_dict(stage, dtype, **offload), "gradient_clipping": CLIP}
    return Engine(policy, ds, OptimConfig(lr=1e-2, eps=1e-3, weight_decay=0.1))


def batch(seed: int) -> list[TrainingSequence]:
    return sequences(8, seed)


def part(seed: int) -> list[TrainingSequence]:
    """This rank's; ranks have different numbers of them."""
    return my_part(batch(seed), [8] if collectives.world_size() == 1 else [5, 3])


def fold(e: Engine, seed: int) -> float:
    return EntropyGradient(e, passes(e, 2), 1.0, DECAY).take(part(seed))


def one_update(e: Engine, seed: int) -> StepResult:
    over = passes(e, 2)
    pieces = over.pieces(tasks.with_token_weights(part(seed), Loss()))
    for i, piece in enumerate(pieces):
        loss = loss_of(e, over.batcher.batch(piece), Objective(), None).loss
        e.backward(loss, last=i == len(pieces) - 1)
    return e.step(1e-2, blocked=False)


def held(e: Engine, *kinds: str) -> dict[str, torch.Tensor]:
    """This rank's shares, copied."""
    named = [(name, e.partition(p)) for name, p in e.trained_parameters()]
    return {f"{k}/{n}": read_share(p, k).clone() for n, p in named for k in kinds}


def state(e: Engine) -> dict[str, torch.Tensor]:
    kinds = (MASTER, COMPUTE, *MOMENTS) if e.has_moments else (MASTER, COMPUTE)
    return held(e, *kinds)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def average(e: Engine) -> dict[str, torch.Tensor]:
    named = [(name, e.partition(p)) for name, p in e.trained_parameters()]
    return {n: e.average.share(n, len(p.share)).double() for n, p in named}


def whole(e: Engine, shares: dict[str, torch.Tensor]) -> torch.Tensor:
    """All parameters' shares of all ranks laid end to end."""
    gathered = collectives.gather_objects({n: s.cpu() for n, s in shares.items()})
    return torch.cat([torch.cat([rank[n] for rank in gathered]) for n in shares])


def reference_gradient(e: Engine, seed: int) -> torch.Tensor:
    """Of the mean entropy, by plain autograd in float64 at the engine's compute weights."""
    with e.inference_model() as now:
        weights = {name: p.double() for name, p in now.named_parameters()}
    causal_lm = model(False).double()
    causal_lm.load_state_dict(weights)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for s in batch(seed):
        ids, n = torch.tensor([s.prompt_ids + s.response_ids]), len(s.response_ids)
        logits = causal_lm(ids).logits[0, -n - 1 : -1]
        total = total + torch.distributions.Categorical(logits=logits).entropy().sum()
        tokens += n
    (total / tokens).backward()
    return torch.cat([p.grad.flatten() for _, p in causal_lm.named_parameters()])


def first_order(e: Engine, before: dict[str, torch.Tensor]) -> float:
    """Average times what compute weights have changed by since `before`."""
    after, kept = held(e, COMPUTE), average(e)
    keys = {n: f"{COMPUTE}/{n}" for n in kept}
    change = {n: after[key].double() - before[key].double() for n, key in keys.items()}
    return float(whole(e, kept) @ whole(e, change))


def run_average(stage: int, dtype: str, **offload: str) -> dict[str, Any]:
    """Updates with gradients averaged between them, beside the same updates without."""
    e, plain = (engine_of(stage, dtype, **offload) for _ in range(2))
    before, change = state(e), 1e-4 if dtype == "fp32" else -1e-2
    with e.moved_along_average(1.0):
        said: dict[str, list[Any]] = {"nothing": [not e.has_average, same(state(e), before)]}
    gradients = []
    for seed in range(FOLDS):
        gradients.append(reference_gradient(e, seed))
        before = state(e)
        norm = fold(e, seed)
        kept = same(state(e), before) and e.optimizer_steps == seed
        if seed == 0:
            said["moves"] = [moved(e, seed, change)]
        done, beside = one_update(e, seed), one_update(plain, seed)
        pairs = {
            "norms": (norm, float(gradients[-1].norm())),
            "first_orders": (done.first_order, first_order(e, before)),
            "kept": kept,
            "followed": done.applied and same(state(e), state(plain)),
            "without": math.isnan(beside.first_order),
        }
        for name, pair in pairs.items():
            said.setdefault(name, []).append(pair)
    shares = [DECAY ** (FOLDS - 1 - i) for i in range(FOLDS)]
    expected = sum(s * g for s, g in zip(shares, gradients, strict=True)) / sum(shares)
    average_off = float((whole(e, average(e)) - expected).norm() / expected.norm())
    said["moves"].append(moved(e, FOLDS - 1, change))
    return {**said, "average_off": average_off, **spoiled(e)}


def spoiled(e: Engine) -> dict[str, Any]:
    """A gradient that is not a number on one rank, folded and then stepped with."""
    kept, before, over = average(e), state(e), passes(e, 2)
    pieces = over.pieces(part(0))

    def backward() -> None:
        factor = math.nan if collectives.rank() == 0 else 1.0
        for i, piece in enumerate(pieces):
            entropy = e.forward(over.batcher.batch(piece).model_inputs())[1]
            e.backward(entropy.sum() * factor, last=i == len(pieces) - 1)

    backward()
    norm = e.average_gradient(DECAY)
    backward()
    step = e.step(1e-2, blocked=False)
    return {
        "spoiled": not math.isfinite(norm) and not step.applied and math.isnan(step.first_order),
        "unspoiled": same(average(e), kept) and same(state(e), before) and e.average.count == FOLDS,
    }


def moved(e: Engine, seed: int, change: float) -> dict[str, Any]:
    """What the mean entropy and the weights' place along the average change by where they are moved
    for an entropy change, over that change."""
    over = passes(e, 8)
    pieces = over.pieces(part(seed))
    before, entropy = state(e), over.mean_entropy(pieces)
    with contextlib.suppress(ArithmeticError), e.moved_along_average(change):
        inside, measured = state(e), over.mean_entropy(pieces) - entropy
        raise ArithmeticError
    step = {k: inside[k].double() - before[k].double() for k in inside if COMPUTE in k}
    return {
        "entropy": measured / change,
        "along": float(whole(e, average(e)) @ whole(e, step)) / change,
        "moved": sorted({k.split("/")[0] for k in before if not before[k].equal(inside[k])}),
        "restored": same(state(e), before) and over.mean_entropy(pieces) == entropy,
    }


if __name__ == "__main__":
    tasks.main(globals())
