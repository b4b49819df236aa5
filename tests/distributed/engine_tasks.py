"""What the rank does in test_engine: `python -m tests.distributed.engine_tasks <json>`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from papo.config import OptimConfig, TrainConfig, WeightingConfig
from papo.dist.engine import Engine
from papo.dist.partition import MASTER
from papo.policy.module import Policy
from papo.policy.update import Update
from papo.policy.weighting import WeightController
from papo.train import build, stats
from papo.train.entropy import EntropyGradient, EntropyMeasurement
from papo.train.stats import attach
from papo_kernels import Compute, PolarityWeighting
from tests.distributed import tasks
from tests.distributed.average_tasks import run_average as run_average
from tests.distributed.configs import deepspeed_dict
from tests.distributed.tasks import passes, sequences, update, whole_weights
from tests.kernels.tracking import memory
from tests.trainer.tiny import build_model, small_llama

MiB = 2**20


def engine_of(
    causal_lm: Any,
    *,
    stage: int = 3,
    dtype: str = "fp32",
    chunk_bytes: int | None = None,
    **ds: str,
) -> Engine:
    policy = Policy(causal_lm, temperature=1.0, compute=Compute(chunk_bytes=chunk_bytes))
    return Engine(policy, deepspeed_dict(stage, dtype, **ds), OptimConfig(lr=1e-3, eps=1e-3))


def step(
    e: Engine, part: list[Any], *, micro: int = 64, lr: float = 1e-3, **options: Any
) -> Update:
    over = passes(e, micro)
    return update(over, over.pieces(part), lr=lr, **options)


def measured_step(e: Engine, part: list[Any], **options: Any) -> Update:
    """A step with the entropy change of all its tokens."""
    over = passes(e, 64)
    pieces = over.pieces(part)
    measurement = EntropyMeasurement.of(over, pieces, tokens=0)
    return measurement.measure(update(over, pieces, lr=1e-3, **options))


# ---- memory -------------------------------------------------------------------------------------

WIDE = 32_768


def wide_sequences(count: int) -> list[Any]:
    """64 tokens each: short rows, so that attention stays small beside the logits."""
    from papo.policy.batch import TrainingSequence

    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = tuple(torch.randint(0, WIDE, (66,), generator=g).tolist())
        made.append(
            TrainingSequence(ids[:2], ids[2:], (-10.0,) * 64, (-1.0) ** i, 1 / (64 * count), i)
        )
    return made


def run_memory(dtype: str, tied: bool, count: int, chunk_mib: int) -> dict[str, Any]:
    """Allocations of the entropy's gradient, statistics, forward, backward, step and measurement on
    `count` x 64 tokens of a wide vocabulary. The second step: moments and an average exist by then.
    """
    causal_lm = small_llama(
        0,
        vocab_size=WIDE,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    ).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    e = engine_of(causal_lm, dtype=dtype, chunk_bytes=chunk_mib * MiB)
    weighting = PolarityWeighting(strength=0.5, phase=0.5)
    gradient = EntropyGradient(e, passes(e, 64), 1.0, 0.5)
    gradient.take(wide_sequences(1))
    step(e, wide_sequences(1), weighting=weighting)

    def whole_step() -> None:
        part = wide_sequences(count)
        gradient.take(part)
        old = passes(e, 64).token_stats(part)
        part = [replace(s, old_logp=o.logp) for s, o in zip(part, old, strict=True)]
        done = measured_step(e, part, weighting=weighting)
        assert done.applied and done.measured_delta is not None

    used = memory(whole_step)
    return {
        "peak": used.peak,
        "largest": used.largest,
        "logits": count * 64 * WIDE * (2 if dtype == "bf16" else 4),
        "weight": WIDE * 24 * 4,
    }


# ---- the measurement of the entropy change ------------------------------------------------------


def run_probe(steps: int) -> list[tuple[float, float | None]]:
    """(predicted, measured) entropy change of the same tokens, of updates of one and the same
    policy by other advantages.
    """
    pairs = []
    for i in range(steps):
        causal_lm = tasks.model(True)
        with torch.no_grad():
            causal_lm.get_input_embeddings().weight.mul_(15)
        e = engine_of(causal_lm, stage=0)
        g = torch.Generator().manual_seed(i)
        part = sequences(4, seed=0)
        part = [
            replace(s, advantage=float(torch.randn((), generator=g)), weight=0.01) for s in part
        ]
        done = measured_step(e, part)
        pairs.append((done.sums.predicted, done.measured_delta))
    return pairs


# ---- the engine ---------------------------------------------------------------------------------


def run_masters(stage: int, **offload: str) -> dict[str, bool]:
    """A float32 checkpoint computed in bfloat16: the masters before any step, and after one."""
    causal_lm = tasks.model(False)
    start = {name: p.detach().clone() for name, p in causal_lm.named_parameters()}
    e = engine_of(causal_lm, stage=stage, dtype="bf16", **offload)
    masters = {
        name: e.partition(p).read(MASTER).clone().view(start[name].shape)
        for name, p in e.trained_parameters()
    }
    with e.inference_model() as whole:
        compute = {name: p.clone() for name, p in whole.named_parameters()}
    return {
        "off the bfloat16 grid": any((p != p.bfloat16().float()).any() for p in start.values()),
        "masters": all(torch.equal(masters[name], p) for name, p in start.items()),
        "compute": all(torch.equal(compute[name], p.bfloat16()) for name, p in start.items()),
    }


def run_frozen(stage: int, dtype: str) -> dict[str, Any]:
    """The reference policy of a KL term: its log-probs beside those of the policy it equals."""
    policy = Policy(tasks.model(True), temperature=1.0).requires_grad_(False)
    reference = Engine(policy, deepspeed_dict(stage, dtype), None)
    e = engine_of(tasks.model(True), stage=stage, dtype=dtype)
    part = sequences(4)
    got, expected = (passes(x, 4).token_stats(part) for x in (reference, e))
    return {
        "same": all(torch.equal(a.logp, b.logp) for a, b in zip(got, expected, strict=True)),
        "trained": reference.trained_numel,
    }


def run_whole_model() -> dict[str, Any]:
    """What samples: its hooks beside those of the policy, and its parameters."""

    def hooks(module: torch.nn.Module) -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())

    e = engine_of(tasks.model(True), stage=3)
    source = dict(e.policy.causal_lm.named_parameters())
    with e.inference_model() as whole:
        inside = {
            "hooks": hooks(whole),
            "policy hooks": hooks(e.policy),
            "shared": all(
                p.data_ptr() == source[n].data_ptr() for n, p in whole.named_parameters()
            ),
            "tied": whole.get_input_embeddings().weight is whole.get_output_embeddings().weight,
        }
        ids = torch.arange(12)[None]
        whole.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=[])
    return {**inside, "kept": sum(p.numel() for p in whole.parameters())}


def run_offload(stage: int, dtype: str, **offload: str) -> dict[str, Any]:
    """Three updates with what `offload` keeps in host memory."""
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    e = engine_of(tasks.model(True).to(torch_dtype), stage=stage, dtype=dtype, **offload)
    applied = [step(e, sequences(8), lr=1e-2).applied for _ in range(3)]
    return {"weights": whole_weights(e), "applied": applied, "steps": e.optimizer_steps}


def run_checkpointing(folder: str, on: bool) -> dict[str, Any]:
    """An update of the policy that the trainer makes of its options, and how often a layer runs."""
    config = TrainConfig(
        name="test",
        steps=1,
        model={"path": str(build_model(folder)), "dtype": "fp32", "activation_checkpointing": on},
        data={"source": "reasoning_gym", "dataset": "chain_sum"},
        rollout={"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 8},
        optim={"lr": 1e-2, "eps": 1e-3},
    )
    e, _ = build.engines(config, build.policy(config)[0])
    calls: list[int] = []
    layer = e.policy.causal_lm.get_decoder().layers[0]
    layer.self_attn.register_forward_hook(lambda *args: calls.append(1))
    done = step(e, tasks.with_token_weights(sequences(8), tasks.Loss()), lr=1e-2)
    return {"weights": whole_weights(e), "grad_norm": done.grad_norm, "calls": len(calls)}


def run_source(source: str, conserve: bool) -> dict[str, Any]:
    """The first update of a rollout whose polarity comes from the update or from the old policy."""
    phase, micro = 0.7, 3
    controller = WeightController(WeightingConfig(source=source, conserve=conserve))
    e = engine_of(tasks.model(True))
    # A batch before, for a conserving scale other than 1.
    controller.update(step(e, sequences(4, seed=1), controller=controller).branches)
    part = tasks.with_token_weights(sequences(8), tasks.Loss())
    part = attach(part, passes(e, micro), None, controller, phase, updates_per_rollout=1)
    weighting = controller.kernel_weighting(phase)
    done = step(e, part, micro=micro, lr=1e-2, weighting=weighting, controller=controller)
    return {
        "weights": whole_weights(e),
        "scale": controller.scale(phase),
        "factors": part[0].factor is not None,
        "sums": done.sums._asdict(),
        "branches": done.branches._asdict(),
        "grad_norm": done.grad_norm,
    }


class Sometimes(torch.nn.Module):
    """A layer that has another behind it, as an expert that not every token is sent to."""

    def __init__(self, inner: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.behind, self.on = inner, torch.nn.Linear(width, width), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y + self.behind(y) if self.on else y


def run_unreached(stage: int, **offload: str) -> dict[str, float]:
    """How far an update moves a weight that its loss does not reach, after gradients that did."""
    causal_lm = tasks.model(False)
    layer = causal_lm.model.layers[0]
    layer.mlp = sometimes = Sometimes(layer.mlp, causal_lm.config.hidden_size)
    e = engine_of(causal_lm, stage=stage, **offload)
    part = tasks.with_token_weights(sequences(8), tasks.Loss())
    reached = dict(e.trained_parameters())
    weights = {"unreached": "model.layers.0.mlp.behind.weight", "reached": "lm_head.weight"}
    before = {key: e.partition(reached[n]).read(MASTER).clone() for key, n in weights.items()}
    EntropyGradient(e, passes(e, 4), share=1.0, decay=0.0).take(part)
    sometimes.on = False
    step(e, part)
    return {
        key: float((e.partition(reached[n]).read(MASTER) - before[key]).abs().max())
        for key, n in weights.items()
    }


def run_shared(stage: int) -> dict[str, Any]:
    """An update of plain gradient descent: the change of the mean entropy by what the weights did,
    and by what the tokens' shared polarity adds up to.
    """
    causal_lm = tasks.model(True)
    with torch.no_grad():
        causal_lm.get_input_embeddings().weight.mul_(15)
    lr, eps = 100.0, 1e6  # steps that float32 weights show
    policy = Policy(causal_lm, temperature=1.0)
    e = Engine(policy, deepspeed_dict(stage, "fp32"), OptimConfig(eps=eps))
    controller = WeightController(WeightingConfig(source="rollout", polarity="shared"))
    part = tasks.with_token_weights(sequences(8), tasks.Loss())
    norm = EntropyGradient(e, passes(e, 3), share=1.0, decay=0.8).take(part)
    before = whole_weights(e)
    with mock.patch.object(stats, "SHARED_CHANGE", 0.01):
        part = attach(part, passes(e, 3), None, controller, 0.7, updates_per_rollout=1)
    same = whole_weights(e) == before
    batch = passes(e, 8).batcher.batch(part)
    each = batch.token_weight * batch.advantages * batch.unit_polarity
    done = step(e, part, lr=lr, controller=controller)
    rate = lr / eps * min(1.0, 1.0 / done.grad_norm)
    return {
        "same": same,
        "first_order": done.first_order,
        "polarity": rate * norm**2 * float(each.sum()),
        "sizes": rate * norm**2 * float(each.abs().sum()),
    }


if __name__ == "__main__":
    tasks.main(globals())
