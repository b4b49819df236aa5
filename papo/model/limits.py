"""What a model's tables have room for, checked against the data before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from papo.errors import PapoError

# Rotary embeddings whose angles change for all of a batch with the longest sequence in it.
_OF_THE_BATCH = ("longrope", "dynamic")


def check_ids(largest: int, rows: int) -> None:
    """Refuse token ids that the embedding has no row for.

    Args:
        largest: id of the prompts, of padding and of the ends of a sequence.
        rows: of the embedding.

    Raises:
        PapoError: a tokenizer of another model, or one that tokens were added to.
    """
    if largest >= rows:
        raise PapoError(
            f"token id {largest}: expected less than {rows}, the rows of the model's embedding; "
            "the tokenizer is another model's, or the embedding was not resized after tokens were "
            "added"
        )


def check_lengths(
    config: Any, longest_prompt: int, max_new_tokens: int, say: Callable[[str], None]
) -> None:
    """Refuse sequences longer than the model's positions, or say so where it can go on.

    Args:
        config: the model's.
        longest_prompt: tokens of the longest prompt.

    Raises:
        PapoError: the model has no position for the last tokens, or what they are would depend on
            the others of their batch.
    """
    text = config.get_text_config()
    places = getattr(text, "max_position_embeddings", None)
    longest = longest_prompt + max_new_tokens
    told = f"the longest prompt of {longest_prompt} tokens and rollout.max_new_tokens="
    told += f"{max_new_tokens} make {longest} tokens"
    ropes = list(_ropes(getattr(text, "rope_parameters", None) or {}))
    for rope in ropes:
        kind = rope.get("rope_type")
        original = rope.get("original_max_position_embeddings")
        change = (original or places) if kind == "longrope" else places
        if kind in _OF_THE_BATCH and change and longest > change:
            raise PapoError(
                f"{told}: expected at most {change} with {kind} rotary embeddings, whose angles "
                "beyond that change for the whole batch; lower data.max_prompt_tokens or "
                "rollout.max_new_tokens"
            )
    if not places or longest <= places:
        return
    if not ropes:
        raise PapoError(
            f"{told}: expected at most {places}, the positions that the model has; lower "
            "data.max_prompt_tokens or rollout.max_new_tokens"
        )
    say(f"{told}: more than the {places} that the model was made for")


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary embeddings of a config: one, or one for each kind of layer."""
    if "rope_type" in parameters:
        yield parameters
    for inner in parameters.values():
        if isinstance(inner, Mapping):
            yield from _ropes(inner)
