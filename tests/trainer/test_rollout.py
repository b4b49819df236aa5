"""Sampling: shared prompts, recorded log-probs, where completions end."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from papo.errors import PapoError
from papo.rollout import HFSampler, SamplingParams
from papo.rollout.hf import _TOKENS_AHEAD, _uniforms, greedy
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
    seeds = range(seed, seed + len(PROMPTS))
    return sampler.sample(model, problems(), copies, params, seeds)


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_policy_that_has_diverged_is_one_line(temperature: float) -> None:
    """The token that is drawn, or has the largest of NaN logits, is one like any other."""
    broken = small_llama(3, vocab_size=V, eos_token_id=EOS, pad_token_id=EOS).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(1e38)
        broken.model.norm.weight.fill_(1e38)
    with pytest.raises(PapoError, match=r"^the policy gives no token a probability .*diverged"):
        sample(broken, 2, SamplingParams(max_new_tokens=2, temperature=temperature))


def test_same_seed_same_samples_whatever_came_before(model) -> None:
    first = sample(model, 3, SamplingParams(6), seed=11)
    torch.rand(100)
    assert sample(model, 3, SamplingParams(6), seed=11) == first
    assert sample(model, 3, SamplingParams(6), seed=12) != first


LONG = _TOKENS_AHEAD + 6


@pytest.mark.parametrize(
    "params", [SamplingParams(LONG, 1.3), SamplingParams(8, 1.3, top_p=0.9, top_k=20)]
)
def test_what_shares_a_call_changes_nothing_that_is_drawn(model, params) -> None:
    """Neither the other problems, which are another rank's where there are two, nor how many
    sequences a call may hold: 0 are all at once, 6 are two problems, 2 split a problem's copies.
    """
    sampler, seeds = HFSampler(Tokenizer(), [EOS], EOS), [11, 5, 11, 7]
    whole = sampler.sample(model, problems(), 3, params, seeds)
    assert max(len(c.response_ids) for c in whole) == params.max_new_tokens
    for ranks, batch_size in ((1, 6), (2, 2), (3, 0)):
        cut = replace(params, batch_size=batch_size)
        shares = [
            sampler.sample(model, problems()[rank::ranks], 3, cut, seeds[rank::ranks])
            for rank in range(ranks)
        ]
        found = [c for g in range(4) for c in shares[g % ranks][g // ranks * 3 :][:3]]
        for a, b in zip(found, whole, strict=True):
            assert (a.problem, a.response_ids) == (b.problem, b.response_ids)
            assert a.sampler_logp == pytest.approx(b.sampler_logp, abs=1e-4)
            assert (a.kept is None) == (b.kept is None)
            if a.kept is not None and b.kept is not None:
                assert torch.equal(a.kept.ids, b.kept.ids)


def test_each_copy_and_token_has_a_number_of_its_own() -> None:
    """Equal seeds give equal numbers, whichever of the copies a call takes."""
    device = torch.device("cpu")
    whole = uniforms(_uniforms([3, 4], 4, slice(0, 4), device))
    assert whole.dtype == torch.float64 and whole.min() >= 0.0 and whole.max() < 1.0
    assert len(whole.unique()) == whole.numel() == 2 * _TOKENS_AHEAD * 8
    part = uniforms(_uniforms([4], 4, slice(1, 3), device))
    assert torch.equal(part, whole[:, 5:7])


def uniforms(numbers: Iterator[torch.Tensor]) -> torch.Tensor:
    """[T, B] of two blocks."""
    return torch.stack(list(itertools.islice(numbers, 2 * _TOKENS_AHEAD))).squeeze(-1)
