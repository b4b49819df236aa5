"""The two alarms: the probe of a loaded policy, and the KL to the sampler before weights change."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from papo.config import TrainConfig, WeightingConfig
from papo.errors import PapoError
from papo.policy import module
from papo.policy.batch import Batcher, collate
from papo.policy.weighting import WeightController
from papo.rollout import HFSampler
from papo.train import probe
from papo.train.stats import Passes
from papo.train.step import Updater
from papo_kernels import Objective
from tests.trainer.families import PlainEngine, V, alone, build, sequences

ROW = 256


class Tokenizer:
    all_special_ids = (0,)

    def __len__(self) -> int:
        return V

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return ""


class Told(list[str]):
    """The lines that the user is shown, in place of the progress display."""

    say = list.append


def check(model: Any, sampler: HFSampler | None = None, **options: Any) -> tuple[int, list[str]]:
    """Row tokens of the run and what the user is told."""
    config = SimpleNamespace(
        model=SimpleNamespace(path="a-model", attn_implementation="eager"),
        rollout=SimpleNamespace(temperature=options.get("temperature", 1.0)),
        optim=SimpleNamespace(max_row_tokens=options.get("row_tokens", ROW)),
    )
    told = Told()
    engine = PlainEngine(model, temperature=config.rollout.temperature)
    sampler = sampler or HFSampler(Tokenizer(), (0,), 0)
    return probe.check(engine, sampler, Tokenizer(), 0, config, told), told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma3_text"])
def test_a_model_that_suits_passes_without_a_word(family: str, dtype: torch.dtype) -> None:
    assert check(build(family).to(dtype)) == (ROW, [])


def test_a_low_temperature_is_no_fault() -> None:
    """It multiplies what rounding does."""
    assert check(build("llama").bfloat16(), temperature=0.1) == (ROW, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bloom", "lfm2", "qwen3_next", "mamba", "falcon_h1"])
def test_alibi_and_linear_attention_are_trained_with_rows_apart(
    family: str, dtype: torch.dtype
) -> None:
    """One completion's state runs into the next one's; alone with their prompt they are right."""
    model = build(family).to(dtype)
    row_tokens, (told,) = check(model)
    assert row_tokens == 0 and "optim.max_row_tokens=0" in told
    assert type(model).__name__ in told and "\n" not in told
    assert check(model, row_tokens=0) == (0, [])


def rows_fault(family: str, noise: float, **options: Any) -> str:
    """What the first batch tells: their log-probs are the model's own."""
    model = build(family, **options)
    made = [
        replace(s, prompt_ids=s.prompt_ids + s.prompt_ids, response_ids=s.response_ids * 3, group=0)
        for s in sequences()[:3]
    ]
    own = alone(model, made).split([len(s.response_ids) for s in made])
    made = [
        replace(s, sampler_logp=tuple(logp.tolist())) for s, logp in zip(made, own, strict=True)
    ]
    shared, apart = (collate(made, pad_id=0, max_row_tokens=n) for n in (ROW, 0))
    return probe.rows_fault(PlainEngine(model), shared, apart, noise)


def test_a_window_longer_than_the_probe_is_found_in_the_first_batch() -> None:
    """GPT-Neo cuts by a key's place in the row, in its attention: no mask tells."""
    layers = {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    assert check(build("gpt_neo", window_size=70, **layers)) == (ROW, [])
    told = rows_fault("gpt_neo", 5e-5, window_size=70, **layers)
    assert told.startswith("loss/sampler_kl is 0.") and "in rows of their own" in told
    assert rows_fault("llama", 5e-5) == "" == rows_fault("gemma3_text", 5e-5)


def test_a_prompt_of_one_token_is_sampled_right_by_linear_attention(monkeypatch: Any) -> None:
    """There is nothing to compute before it: padding alone would count as a token."""
    monkeypatch.setattr(probe, "_PROMPT_TOKENS", (1, 1))
    for family in ("lfm2", "qwen3_next", "llama"):
        sampler = HFSampler(Tokenizer(), (0,), 0)
        check(build(family), sampler)
        assert sampler.prefills


@pytest.mark.parametrize(
    ("family", "factor"), [("falcon_h1", "lm_head_multiplier"), ("granite", "logits_scaling")]
)
def test_numbers_that_logits_are_scaled_by_are_read(family: str, factor: str) -> None:
    check(build(family, **{factor: 0.25}))


def test_a_cache_that_cannot_be_repeated_is_not_shared() -> None:
    """Mamba takes its cache by another name."""
    for family, prefills in (("mamba", False), ("lfm2", True)):
        sampler = HFSampler(Tokenizer(), (0,), 0)
        check(build(family), sampler)
        assert sampler.prefills == prefills


@pytest.mark.parametrize("family", ["minimax", "recurrent_gemma"])
def test_models_that_cannot_be_sampled_in_batches_are_refused(family: str) -> None:
    model = build(family)
    with pytest.raises(PapoError, match="cannot be sampled in batches: ") as caught:
        check(model)
    told = str(caught.value)
    assert told.startswith(f"model.path='a-model': {type(model).__name__} ") and "\n" not in told


def every_token(segment_ids: Any, position_ids: Any) -> Any:
    return contextlib.nullcontext()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_completion_that_sees_another_is_found(dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "shared_prompts", every_token)
    row_tokens, (told,) = check(build("llama").to(dtype))
    assert row_tokens == 0 and "completions do not share" in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_attention_misreads_is_found(dtype: torch.dtype, monkeypatch: Any) -> None:
    """A boolean one under eager attention, which adds it."""

    def collate(*args: Any, **options: Any) -> Any:
        batch = probe_collate(*args, **options)
        width = batch.input_ids.shape[1]
        mask = torch.ones(width, width, dtype=torch.bool).tril()
        return replace(batch, attention_mask=mask.expand(len(batch.input_ids), 1, width, width))

    probe_collate = probe.collate
    monkeypatch.setattr(probe, "collate", collate)
    with pytest.raises(PapoError, match=r"cannot be trained in batches: .* padding on the right"):
        check(build("llama").to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_that_sees_padding_is_found(dtype: torch.dtype, monkeypatch: Any) -> None:
    def prefill(model: Any, ids: Any, mask: Any, copies: int) -> DynamicCache:
        return right(model, ids, torch.ones_like(mask), copies)

    right = HFSampler._prefill
    monkeypatch.setattr(HFSampler, "_prefill", staticmethod(prefill))
    sampler = HFSampler(Tokenizer(), (0,), 0)
    assert check(build("llama").to(dtype), sampler) == (ROW, [])
    assert not sampler.prefills  # what generate does by itself was right
    monkeypatch.setattr(HFSampler, "prefills", property(lambda self: True, lambda *_: None), False)
    with pytest.raises(PapoError, match=r"cannot be sampled in batches: .*nats off"):
        check(build("llama").to(dtype))


def test_logits_that_are_not_the_heads_alone_are_found() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            out = super().forward(*args, **options)
            out.logits = out.logits / 2
            return out

    model = build("llama")
    model.__class__ = Scaled
    with pytest.raises(PapoError, match="logits that are not its head's alone"):
        check(model)


# ---- the KL to the sampler ----------------------------------------------------------------------


class Stepped(PlainEngine):
    """Remembers that its weights would have changed."""

    steps = 0

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float, *, blocked: bool) -> Any:
        self.steps += not blocked
        return SimpleNamespace(grad_norm=1.0, applied=not blocked, first_order=math.nan)


def update(sampler_logp: torch.Tensor, bound: float) -> tuple[Stepped, Any]:
    """One update of a small model on completions that a sampler gave `sampler_logp`."""
    engine = Stepped(build("llama"))
    parts = sequences()
    lengths = [len(p.response_ids) for p in parts]
    parts = [
        replace(p, sampler_logp=tuple(logp.tolist()))
        for p, logp in zip(parts, sampler_logp.split(lengths), strict=True)
    ]
    batcher = Batcher(pad_id=0, max_row_tokens=ROW, device=engine.device)
    controller = WeightController(WeightingConfig(strength=0.0))
    updater = Updater(engine, batcher, Objective(), controller)
    pieces = Passes(engine, batcher, 4).pieces(parts)
    return engine, updater.update(pieces, None, 0.1, max_sampler_kl=bound)


def test_a_kl_beyond_the_bound_stops_the_run_before_the_weights_change(monkeypatch: Any) -> None:
    """Also where a single token in ten is off; rounding is not."""
    logp = alone(build("llama"), sequences())
    engine, done = update(logp + 0.02 * (-1.0) ** torch.arange(len(logp)), 0.001)
    assert engine.steps == 1 and 0 < done.sums.mean(done.sums.sampler_kl) < 0.001
    wrong = logp.clone()
    wrong[::10] -= 0.5
    steps: list[int] = []
    monkeypatch.setattr(Stepped, "step", lambda *_, **__: steps.append(1))
    with pytest.raises(PapoError, match=r"^loss/sampler_kl=0\.0\d+: expected at most 0\.001") as e:
        update(wrong, 0.001)
    assert steps == [] and "\n" not in str(e.value)
    for cause in ("attn_implementation", "window", "padding", "dropout", "loss.max_sampler_kl"):
        assert cause in str(e.value)


def test_nan_is_left_to_what_skips_the_step() -> None:
    logp = torch.full_like(alone(build("llama"), sequences()), torch.nan)
    engine, done = update(logp, 0.001)
    assert engine.steps == 1 and math.isnan(done.sums.sampler_kl)


@pytest.mark.parametrize(
    ("model", "rollout", "loss", "bound"),
    [
        ({}, {}, {}, 0.02),
        ({"dtype": "fp32"}, {}, {}, 0.001),
        ({}, {"temperature": 0.5}, {}, 0.08),
        ({}, {"temperature": 2.0}, {}, 0.02),
        ({"dropout": True}, {}, {}, math.inf),
        ({}, {}, {"max_sampler_kl": "none"}, math.inf),
        ({"dropout": True}, {"temperature": 0.5}, {"max_sampler_kl": 0.3}, 0.3),
    ],
)
def test_the_bound_is_by_dtype_and_for_the_samplers_weights(
    model: Any, rollout: Any, loss: Any, bound: float
) -> None:
    sizes = {"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 8}
    config = TrainConfig(
        name="test",
        steps=1,
        model={"path": "somewhere", **model},
        data={"source": "reasoning_gym", "dataset": "chain_sum"},
        rollout={**sizes, **rollout},
        loss=loss,
    )
    assert config.sampler_kl_bound(0) == pytest.approx(bound)
    assert config.sampler_kl_bound(1) == math.inf
