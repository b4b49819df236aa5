"""What fits into a model's tables, checked against the data before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from papo.errors import PapoError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Rotary embeddings whose angles change for the whole batch with the longest sequence in it.
_OF_THE_BATCH = ("longrope", "dynamic")


def check_ids(largest: int, rows: int | None) -> None:
    """Refuse token ids that the embedding has no row for.

    Args:
        largest: the largest id among prompts, padding and the tokens that end a completion.
        rows: number of rows of the embedding; None where it is not known.

    Raises:
        PapoError: the tokenizer is another model's, or tokens were added to it.
    """
    if rows is not None and largest >= rows:
        raise PapoError(
            f"token id {largest}: expected less than {rows}, the rows of the model's embedding; "
            "the tokenizer is another model's, or the embedding was not resized after tokens were "
            "added"
        )


def positions_of(config: PreTrainedConfig) -> int | None:
    """The positions that a model was made for; None if its config does not say."""
    return _count(config, "max_position_embeddings")


def vocabulary_of(config: PreTrainedConfig) -> int | None:
    """The rows of a model's embedding as its config has them; None if it does not say."""
    return _count(config, "vocab_size")


def _count(config: PreTrainedConfig, name: str) -> int | None:
    """A number of the config, which may hold anything."""
    value = getattr(config.get_text_config(), name, None)
    return value if isinstance(value, int) else None


def check_lengths(config: PreTrainedConfig, longest_prompt: int, max_new_tokens: int) -> str:
    """Refuse sequences that are longer than the model can have.

    Args:
        config: the model's own.
        longest_prompt: tokens of the longest prompt.

    Returns:
        A warning where sequences are longer than the model was made for, empty where none are.

    Raises:
        PapoError: the model has no position for the last tokens, or their positions would depend on
            the other sequences of their batch.
    """
    text = config.get_text_config()
    positions = positions_of(config)
    longest = longest_prompt + max_new_tokens
    lengths = f"the longest prompt of {longest_prompt} tokens and rollout.max_new_tokens="
    lengths += f"{max_new_tokens} make {longest} tokens"
    ropes = list(_ropes(getattr(text, "rope_parameters", None) or {}))
    for rope in ropes:
        kind = rope.get("rope_type")
        original = rope.get("original_max_position_embeddings")
        change = (original or positions) if kind == "longrope" else positions
        if kind in _OF_THE_BATCH and change and longest > change:
            raise PapoError(
                f"{lengths}: expected at most {change} with {kind} rotary embeddings, whose angles "
                "beyond that change for the whole batch; lower data.max_prompt_tokens or "
                "rollout.max_new_tokens"
            )
    if not positions or longest <= positions:
        return ""
    if not ropes:
        raise PapoError(
            f"{lengths}: expected at most {positions}, the positions that the model has; lower "
            "data.max_prompt_tokens or rollout.max_new_tokens"
        )
    return f"{lengths}: more than the {positions} that the model was made for"


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary embeddings of a config: a single one, or one for each kind of layer."""
    if "rope_type" in parameters:
        yield parameters
    for inner in parameters.values():
        if isinstance(inner, Mapping):
            yield from _ropes(inner)
