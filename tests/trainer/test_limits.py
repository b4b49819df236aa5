"""What a model's tables have room for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

from papo.errors import PapoError
from papo.model.limits import check_ids, check_lengths

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def told(config: Any, longest_prompt: int, max_new_tokens: int) -> list[str]:
    lines: list[str] = []
    check_lengths(config, longest_prompt, max_new_tokens, lines.append)
    return lines


def test_ids_beyond_the_embedding_are_refused() -> None:
    check_ids(99, 100)
    with pytest.raises(PapoError, match=r"^token id 100: expected less than 100, the rows of"):
        check_ids(100, 100)


@pytest.mark.parametrize("config", [GPT2Config(n_positions=64)], ids=["gpt2"])
def test_a_table_of_positions_that_is_too_short_is_refused(config: Any) -> None:
    """It ended in the middle of a rollout, with the first completion that was long enough."""
    assert told(config, 40, 24) == []
    with pytest.raises(PapoError, match=r"max_new_tokens=25 make 65 tokens: expected at most 64,"):
        told(config, 40, 25)


def test_rotary_positions_beyond_the_models_own_are_said() -> None:
    for config in (
        LlamaConfig(max_position_embeddings=64),
        Gemma3TextConfig(max_position_embeddings=64),
    ):
        assert told(config, 40, 24) == []
        (line,) = told(config, 40, 25)
        assert line.endswith("more than the 64 that the model was made for")


def test_alibi_has_no_end() -> None:
    assert told(BloomConfig(), 10**6, 10**6) == []


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            max_position_embeddings=64,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
        Phi3Config(
            **SIZES,
            pad_token_id=0,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            rope_parameters={
                **LONG,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_angles_that_depend_on_the_longest_of_a_batch_are_refused(config: Any) -> None:
    """A short completion's log-probs moved by 0.7 nats when a long one joined its batch."""
    assert told(config, 40, 24) == []
    with pytest.raises(PapoError, match=r"65 tokens: expected at most 64 with (dynamic|longrope)"):
        told(config, 40, 25)
