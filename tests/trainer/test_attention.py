"""Rows that completions share: whatever restricts a model's attention restricts it there too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_sliding_window_causal_mask,
)

from papo.model.attention import shared_prompts
from papo.model.recompute import recompute_activations
from papo.policy.batch import collate
from papo.policy.passes import loss_of
from papo_kernels import Objective
from tests.trainer.families import PlainEngine, alone, build, sequences, trained

SHARED = 2048


def worst(model: Any, row_tokens: int) -> float:
    """Largest difference of a token's training log-prob to the model's own."""
    found = trained(PlainEngine(model), sequences(), row_tokens).logp
    return float((found - alone(model, sequences())).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_trains_on_the_same_log_probs(dtype: torch.dtype) -> None:
    """Eager attention adds its mask: a boolean one left every token in sight."""
    model = build("llama", "eager").to(dtype)
    assert worst(model, SHARED) < (1e-5 if dtype == torch.float32 else 0.05)
    assert worst(model, 0) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text", "cohere2", "llama4_text"])
def test_attention_windows_and_chunks_hold_in_shared_rows(family: str, attention: str) -> None:
    """By layer, as the model's own code mixes them."""
    model = build(family, attention)
    assert worst(model, SHARED) < 1e-5
    assert worst(model, 0) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gpt2", "gpt_neox", "opt"])
def test_other_attention_trains_on_the_same_log_probs(family: str) -> None:
    """Soft caps, sinks, experts, learned positions and parallel blocks."""
    model = build(family, "eager")
    assert worst(model, SHARED) < 1e-5
    assert worst(model, 0) < 1e-5


@pytest.mark.parametrize(
    ("family", "option"), [("mistral", "sliding_window"), ("llama4_text", "attention_chunk_size")]
)
def test_an_ignored_window_would_show(family: str, option: str) -> None:
    """What the tests above would see: sequences here are longer than the window."""
    narrow, wide = build(family, "sdpa"), build(family, "sdpa", **{option: 200})
    wide.load_state_dict(narrow.state_dict())
    found = trained(PlainEngine(wide), sequences(), SHARED).logp
    assert (found - alone(narrow, sequences())).abs().max() > 0.05


def test_every_query_may_attend_to_something_padded_ones_included() -> None:
    """A row of the mask without any True is NaN in some attention kernels."""
    model = build("mistral", "sdpa")
    batch = collate(sequences(), pad_id=0, max_row_tokens=SHARED, width_multiple=128)
    embedded = model.get_input_embeddings()(batch.input_ids)
    with shared_prompts(batch.segment_ids, batch.position_ids):
        mask = create_sliding_window_causal_mask(
            model.config, embedded, batch.attention_mask, None, position_ids=batch.position_ids
        )
    padded = batch.attention_mask == 0
    assert padded.any() and mask.shape == (2, 1, 128, 128)
    assert mask[:, 0].any(-1).all()
    itself = torch.eye(128, dtype=torch.bool).expand(2, -1, -1)
    assert torch.equal(mask[:, 0][padded], itself[padded])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_do_not_depend_on_sharing_or_recomputation(recompute: bool) -> None:
    """The backward pass recomputes layers after the masks are the model's own again."""

    def gradients(row_tokens: int, recompute: bool) -> torch.Tensor:
        model = build("mistral", "sdpa")
        if recompute:
            recompute_activations(model, dropout=False)
        engine = PlainEngine(model)
        engine.train(True)
        batch = collate(sequences(), pad_id=0, max_row_tokens=row_tokens)
        loss_of(engine, batch, Objective(), None).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected, found = gradients(0, False), gradients(SHARED, recompute)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_masks_are_the_models_own_again_after_a_shared_pass() -> None:
    """Also where the pass failed, or another was inside."""
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    batch = collate(sequences(), pad_id=0, max_row_tokens=SHARED)
    tree = batch.segment_ids, batch.position_ids
    with pytest.raises(ZeroDivisionError), shared_prompts(*tree):
        outer = dict(ALL_MASK_ATTENTION_FUNCTIONS)
        assert outer != before
        with shared_prompts(*tree):
            assert dict(ALL_MASK_ATTENTION_FUNCTIONS) != outer
        assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == outer
        raise ZeroDivisionError
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before
