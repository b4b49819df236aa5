"""Micro-batches: shared prompts, padding and batch mates never change what a token's logits are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from papo.policy.batch import TrainingSequence, collate, micro_batches, rows_of
from tests.trainer.families import token_logits
from tests.trainer.tiny import small_llama

V = 50


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_llama(0, vocab_size=V, attn_implementation="sdpa").eval()


def sequence(prompt: list[int], response: list[int], group: int = 0) -> TrainingSequence:
    logp = tuple(-0.1 * (i + 1) for i in range(len(response)))
    return TrainingSequence(
        tuple(prompt), tuple(response), logp, advantage=float(group), weight=0.5, group=group
    )


def alone(model: LlamaForCausalLM, seq: TrainingSequence) -> torch.Tensor:
    ids = torch.tensor([seq.prompt_ids + seq.response_ids])
    with torch.no_grad():
        return model(ids).logits[0, len(seq.prompt_ids) - 1 : -1]


ids = st.integers(0, V - 1)
prompts = st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=3)
responses = st.lists(st.lists(ids, min_size=1, max_size=7), min_size=1, max_size=4)


@given(
    prompts,
    st.lists(responses, min_size=3, max_size=3),
    st.sampled_from([0, 9, 2048]),
    st.sampled_from([1, 16]),
)
@settings(max_examples=40, deadline=None)
def test_logits_do_not_depend_on_padding_sharing_or_mates(
    model: LlamaForCausalLM,
    some_prompts: list,
    some_responses: list,
    max_row_tokens: int,
    multiple: int,
) -> None:
    sequences = [
        sequence(prompt, response, g)
        for g, prompt in enumerate(some_prompts)
        for response in some_responses[g]
    ]
    batch = collate(sequences, pad_id=0, max_row_tokens=max_row_tokens, width_multiple=multiple)
    assert batch.input_ids.shape[1] % multiple == 0
    with torch.no_grad():
        got = token_logits(model, batch)
    expected = torch.cat([alone(model, s) for s in sequences])
    assert torch.allclose(got, expected, atol=2e-5, rtol=1e-4)


def test_targets_and_masks_are_the_sampled_ids_even_where_pad_is_eos() -> None:
    eos = 0
    sequences = [
        sequence([5, eos, 6], [7, eos], 1),
        sequence([5, eos, 6], [eos], 1),
        sequence([8], [9, 9, eos], 2),
    ]
    batch = collate(sequences, pad_id=eos, max_row_tokens=64)
    assert batch.targets.tolist() == [7, eos, eos, 9, 9, eos]
    assert batch.advantages.tolist() == [1, 1, 1, 2, 2, 2]
    assert (
        len(batch.logit_index)
        == len(batch.targets)
        == len(batch.sampler_logp)
        == len(batch.token_weight)
    )
    assert batch.old_logp is None and batch.factor is None
    assert batch.completion.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.loss_inputs()["old_logp"] is None
    assert batch.loss_inputs("sequence")["old_logp"] == (None, batch.completion)
    # The fed tokens are each prompt once and all but the last token of every response.
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1], [0, 1, 1, -1]]
    assert batch.input_ids.tolist() == [[5, eos, 6, 7], [8, 9, 9, eos]]


def test_rows_share_a_prompt_up_to_the_limit() -> None:
    same = [sequence([1, 2, 3], [4] * 5, 0) for _ in range(4)]
    assert rows_of(same, 2048) == [[0, 1, 2, 3]]
    assert rows_of(same, 11) == [[0, 1], [2, 3]]
    assert rows_of(same, 0) == [[0], [1], [2], [3]]
    assert rows_of([same[0], sequence([9], [4], 1), same[1]], 2048) == [[0], [1], [2]]


def test_idle_micro_batches_even_out_the_ranks_and_weigh_nothing() -> None:
    sequences = [sequence([1], [2, 3], 0) for _ in range(3)]
    pieces = list(micro_batches(sequences, 2, count=4))
    assert [len(p) for p in pieces] == [2, 1, 1, 1]
    assert all(p[0].weight == 0.0 and p[0].group == -1 for p in pieces[2:])
    # A rank without sequences cannot tell which inputs the loss of the others needs.
    (empty,) = micro_batches([], 2, count=1)
    batch = collate(empty, pad_id=0, max_row_tokens=64)
    assert batch.token_weight.tolist() == [0.0]
    assert batch.old_logp is not None and batch.ref_logp is not None


@pytest.mark.parametrize("bad", [sequence([], [1]), sequence([1], [])])
def test_empty_prompts_and_responses_are_refused(bad: TrainingSequence) -> None:
    with pytest.raises(
        ValueError, match=r"sequences\[1\]: expected at least one prompt and one response token"
    ):
        collate([sequence([1], [2]), bad], pad_id=0, max_row_tokens=64)
