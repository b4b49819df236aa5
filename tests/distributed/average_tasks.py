"""What the ranks do in test_average: `python -m tests.distributed.average_tasks <json>`."""

from __future__ import annotations

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
    """Average times what masters have changed by since `before`."""
    after, kept = held(e, MASTER), average(e)
    change = {n: after[f"{MASTER}/{n}"].double() - before[f"{MASTER}/{n}"].double() for n in kept}
    return float(whole(e, kept) @ whole(e, change))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def run_average(stage: int, dtype: str, **offload: str) -> dict[str, Any]:
    """Updates with gradients averaged between them, beside the same updates without."""
    e, plain = (engine_of(stage, dtype, **offload) for _ in range(2))
    said: dict[str, list[Any]] = {
        name: [] for name in ("norm", "true_norm", "kept", "first_order", "true", "weights")
    }
    gradients = []
    for seed in (0, 1, 2):
        true = reference_gradient(e, seed)
        gradients.append(true)
        before = state(e)
        said["norm"].append(fold(e, seed))
        said["true_norm"].append(float(true.norm()))
        said["kept"].append(same(state(e), before) and e.optimizer_steps == seed)
        done = one_update(e, seed)
        assert done.applied and one_update(plain, seed).applied
        said["first_order"].append(done.first_order)
        said["true"].append(first_order(e, before))
        said["weights"].append(same(state(e), state(plain)))
    shares = [DECAY ** (2 - i) for i in range(3)]
    expected = sum(s * g for s, g in zip(shares, gradients, strict=True)) / sum(shares)
    return {
        **said,
        "average": relative(whole(e, average(e)), expected),
        **not_finite(e),
        **moved(e, 1e-3 if dtype == "fp32" else 0.1),
    }


def not_finite(e: Engine) -> dict[str, Any]:
    """A gradient that is not a number, on one rank, is not folded in; nor is it by a step."""
    kept, before = average(e), state(e)
    over = passes(e, 2)
    pieces = over.pieces(part(0))
    for i, piece in enumerate(pieces):
        spoiled = math.nan if collectives.rank() == 0 else 1.0
        entropy = e.forward(over.batcher.batch(piece).model_inputs())[1]
        e.backward(entropy.sum() * spoiled, last=i == len(pieces) - 1)
    norm = e.average_gradient(DECAY)
    same_average = same(average(e), kept) and e.average.count == 3
    return {"bad": math.isfinite(norm), "bad_kept": same_average and same(state(e), before)}


def moved(e: Engine, change: float) -> dict[str, Any]:
    """The mean entropy's change where weights are moved for one of `change`."""
    over = passes(e, 8)
    pieces = over.pieces(part(2))
    before, entropy = state(e), over.mean_entropy(pieces)
    with e.moved_along_average(change):
        up = over.mean_entropy(pieces) - entropy
        masters = same(held(e, *MOMENTS), {k: v for k, v in before.items() if "exp" in k})
        now = held(e, COMPUTE)
    step = {k: now[k].double() - before[k].double() for k in now}
    directions = whole(e, average(e)) @ whole(e, step)
    return {
        "up": up / change,
        "along": float(directions) / change,
        "moments_kept": masters,
        "restored": same(state(e), before) and over.mean_entropy(pieces) == entropy,
    }


if __name__ == "__main__":
    tasks.main(globals())
