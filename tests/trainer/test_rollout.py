"""Sampling: shared prompts, recorded log-probs, where completions end."""

import pytest
import torch
from transformers import LlamaForCausalLM

from papo.rollout import HFSampler, SamplingParams
from papo.rollout.hf import greedy
from papo.types import Completion, Problem
from tests.trainer.tiny import small_llama

V, EOS = 40, 0


class Tokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    # As in SmolLM2: what ends a completion must never be inferred from padding.
    model = small_llama(3, vocab_size=V, eos_token_id=EOS, pad_token_id=EOS).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


PROMPTS = [(5, 6, EOS, 7), (8,), (9, 10, 11, 12, 13, 14), (5, 6)]


def problems() -> list[Problem]:
    return [Problem(i, (), "", {}, p) for i, p in enumerate(PROMPTS)]


def sample(model, copies: int, params: SamplingParams, seed: int = 0) -> list[Completion]:
    sampler = HFSampler(Tokenizer(), [EOS], EOS)
    return sampler.sample(model, problems(), copies, params, seed)


def true_logp(model, completion: Completion, params: SamplingParams) -> torch.Tensor:
    """float64 [T, V]: the distributions that the tokens are drawn from, by their definition."""
    prompt, response = completion.problem.prompt_ids, completion.response_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logits = logits.double() / params.temperature
    order = logits.argsort(-1, descending=True)
    ranked = logits.gather(-1, order)
    if params.top_k:
        ranked[:, params.top_k :] = -torch.inf
    before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
    ranked[before >= params.top_p] = -torch.inf
    return torch.empty_like(logits).scatter_(-1, order, ranked.log_softmax(-1))


@pytest.mark.parametrize("batch_size", [0, 6, 3, 1])
@pytest.mark.parametrize(
    "params", [SamplingParams(12, 1.3), SamplingParams(12, 0.6, top_p=0.9, top_k=20)]
)
def test_sampler_logp_is_the_models_at_the_temperature(model, batch_size, params) -> None:
    """Prompts of other lengths in the same call and shared prefixes leave it unchanged, and with
    top-k and top-p it is that of the distribution they leave.
    """
    from dataclasses import replace

    completions = sample(model, 4, replace(params, batch_size=batch_size))
    assert [c.problem.uid for c in completions] == [g for g in range(4) for _ in range(4)]
    for c in completions:
        assert len(c.sampler_logp) == len(c.response_ids)
        expected = true_logp(model, c, params)[range(len(c.response_ids)), list(c.response_ids)]
        assert torch.tensor(c.sampler_logp).double().allclose(expected, atol=1e-4)


@pytest.mark.parametrize(
    "cut", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}], ids=["k", "p", "both"]
)
def test_the_ids_that_top_k_and_top_p_kept_come_with_every_token(model, cut) -> None:
    params = SamplingParams(12, 2.0, **cut)
    completions = sample(model, 16, params)
    assert any(not c.truncated for c in completions)
    for c in completions:
        assert c.kept is not None and len(c.kept.counts) == len(c.response_ids)
        rows = c.kept.ids.split(c.kept.counts.tolist())
        expected = [row.nonzero().flatten() for row in true_logp(model, c, params) > -torch.inf]
        assert [r.tolist() for r in rows] == [e.tolist() for e in expected]


def test_sampling_from_the_whole_distribution_keeps_no_ids(model) -> None:
    assert all(c.kept is None for c in sample(model, 2, SamplingParams(4)))


def test_completions_end_at_the_first_eos_and_truncation_is_known(model) -> None:
    completions = sample(model, 16, SamplingParams(10, 2.0))
    assert {c.truncated for c in completions} == {True, False}
    for c in completions:
        assert c.truncated == (EOS not in c.response_ids)
        assert EOS not in c.response_ids[:-1]
        assert len(c.response_ids) == 10 or not c.truncated
        text_ids = c.response_ids if c.truncated else c.response_ids[:-1]
        assert c.text == " ".join(map(str, text_ids))


def test_greedy_equals_step_by_step_argmax(model) -> None:
    for c in sample(model, 2, greedy(SamplingParams(8))):
        ids = list(c.problem.prompt_ids)
        for token in c.response_ids:
            with torch.no_grad():
                assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)


def test_same_seed_same_samples_whatever_came_before(model) -> None:
    first = sample(model, 3, SamplingParams(6), seed=11)
    torch.rand(100)
    assert sample(model, 3, SamplingParams(6), seed=11) == first
    assert sample(model, 3, SamplingParams(6), seed=12) != first
