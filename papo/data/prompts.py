"""From a problem's messages to the token ids that the policy continues."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from papo.errors import PapoError, first_line, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_LARGEST_ID = 2**31 - 1


class PromptEncoder:
    """Turns messages into token ids by the tokenizer's chat template, or as plain text without one.

    Args:
        tokenizer: the policy's.
        max_tokens: longer prompts are refused, very long ones without being tokenized.
        template_args: additional variables of the chat template, such as `enable_thinking`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._args = dict(template_args or {})
        self._template = getattr(tokenizer, "chat_template", None)
        # Except for the unknown token, no token stands for more characters than the longest entry
        # of the vocabulary has.
        self._max_characters = max_tokens * max(map(len, tokenizer.get_vocab()), default=1)
        self._warned: set[str] = set()
        if not self._template:
            log.warning("the tokenizer has no chat template: prompts are plain text")
        for name, value in self._args.items():
            if name not in str(self._template):
                log.warning(
                    "data.chat_template_args.%s=%r: the chat template knows no such name",
                    name,
                    value,
                )

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...] | None:
        """Token ids with the generation prompt; None if there are more than `max_tokens`.

        Raises:
            PapoError: the chat template or the tokenizer fails on the messages, or makes nothing of
                them.
        """
        # A template may leave messages out, so long messages alone do not refuse a prompt.
        characters = sum(len(m.get("content") or "") for m in messages)
        if characters > self._max_characters and len(self._text(messages)) > self._max_characters:
            return None
        kept = self._without_added_end(self._ids(messages), messages)
        if not kept or max(kept) > _LARGEST_ID:
            made = "no tokens" if not kept else f"token id {max(kept)}"
            raise PapoError(f"the tokenizer makes {made} of {shown(list(messages), 120)}")
        return tuple(kept) if len(kept) <= self._max_tokens else None

    def _ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if self._template:
            encoded = self._apply(messages, tokenize=True)
        else:
            try:
                encoded = self._tokenizer(self._text(messages))
            except Exception as error:  # whatever its files make it raise
                raise _failed("tokenizer", messages, error) from error
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
        return [int(i) for i in ids]

    def _text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that is tokenized."""
        if not self._template:
            return "\n".join(m.get("content") or "" for m in messages)
        return str(self._apply(messages, tokenize=False))

    def _apply(self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                add_generation_prompt=True,
                tokenize=tokenize,
                **self._args,
            )
        except Exception as error:  # a template is a program: it may refuse a role, or be wrong
            raise _failed("tokenizer's chat template", messages, error) from error

    def _without_added_end(
        self, ids: list[int], messages: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """`ids` without the end-of-sequence token that the tokenizer itself appended."""
        end = self._tokenizer.eos_token_id
        if end is None or not ids or ids[-1] != end:
            return ids
        name = self._tokenizer.eos_token
        if self._text(messages).endswith(name):
            self._warn_once(
                f"prompts end in the end-of-sequence token {name!r}, written by the chat template "
                "or the data: is the model meant to answer after it?"
            )
            return ids
        self._warn_once(
            f"the tokenizer appends its end-of-sequence token {name!r} to prompts: left out"
        )
        return ids[:-1]

    def _warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            log.warning(line)


def _failed(what: str, messages: Sequence[Mapping[str, Any]], error: Exception) -> PapoError:
    return PapoError(f"the {what} failed on {shown(list(messages), 120)}: {first_line(error)}")


def opens_thinking(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends with `<think>`, as some chat templates make it."""
    return str(tokenizer.decode(list(prompt_ids[-8:]))).rstrip().endswith("<think>")
