"""Problems: read or generated, split, made into prompts, and handed out in an order that depends
only on the seed and a cursor."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from papo.data.examples import Example, read
from papo.data.generated import generate
from papo.data.prompts import PromptEncoder
from papo.data.rows import name_of
from papo.errors import PapoError
from papo.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from papo.config import DataConfig

log = logging.getLogger(__name__)

_HELD_OUT = 64  # problems, unless data.held_out_size says otherwise


@dataclass(frozen=True)
class _Item:
    """A problem with its tokens, kept small because there may be a million of them.

    Attributes:
        prompt: digest of `messages`; items that share it are on one side of the split.
        row: digest of the messages as the row has them, without system prompt and suffix.
    """

    prompt: bytes
    row: bytes
    messages: tuple[Mapping[str, Any], ...]
    answer: str
    metadata: Mapping[str, Any]
    ids: array[int]
    conversational: bool

    def problem(self, uid: int) -> Problem:
        ids, chat = tuple(self.ids), self.conversational
        return Problem(uid, self.messages, self.answer, self.metadata, ids, chat)


class ProblemSource:
    """Training and held-out problems, which share no prompt. The caller's cursor is its only state.

    Two prompts are the same if their messages are, role by role and character by character. Rows
    that are equal in every field are one problem; rows that share only the prompt are all kept, on
    the same side of the split.

    Args:
        config: the config's `data` section.
        tokenizer: the policy's. Its chat template is applied; without one, prompts are plain text.
        seed: orders the training problems. The split depends on `config.split_seed` and on the
            rows' own messages instead.

    Attributes:
        dropped_long: problems left out because their prompt exceeds `max_prompt_tokens`.
        dropped_equal: rows left out because they equal an earlier one in every field.
        dropped_held_out: training rows left out because their prompt is held out.
        other_answers: rows whose prompt had another answer in an earlier row; they are kept.

    Raises:
        PapoError: no such dataset or file, a bad row, bad parameters, or too few distinct
            problems.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._epoch: tuple[int, list[tuple[int, _Item]]] | None = None
        self.dropped_long = self.dropped_equal = self.dropped_held_out = self.other_answers = 0
        self._encoder = PromptEncoder(
            tokenizer, config.max_prompt_tokens, config.chat_template_args
        )
        generated = config.source == "reasoning_gym"
        held_out, train = self._generated() if generated else self._read()
        # Held-out problems of their own file may change without a change of the others' order.
        apart = config.eval_path is not None or config.eval_split is not None
        self._held_out = list(enumerate(held_out, start=len(train) if apart else 0))
        self._train = list(enumerate(train, start=0 if apart else len(held_out)))
        if self.dropped_long:
            log.warning(
                "%d prompts of more than data.max_prompt_tokens=%d tokens dropped",
                self.dropped_long,
                config.max_prompt_tokens,
            )
        log.info("problems: %d to train on, %d held out", len(self._train), len(self._held_out))

    def __len__(self) -> int:
        """Number of training problems."""
        return len(self._train)

    @property
    def fingerprint(self) -> str:
        """Equal for two sources if they have the same training problems under the same uids, and
        the tokenizer gives their prompts the same ids."""
        digest = hashlib.sha256()
        for uid, i in self._train:
            digest.update(_digest(uid, i.prompt, i.answer, _json(i.metadata), i.ids.tobytes()))
        return digest.hexdigest()

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(item.ids) for _, item in (*self._held_out, *self._train))

    @property
    def largest_id(self) -> int:
        """The largest token id of the prompts."""
        return max(max(item.ids, default=0) for _, item in (*self._held_out, *self._train))

    def without_tokens(self) -> list[Problem]:
        """All problems, held-out ones first, with empty `prompt_ids`, which would take the
        memory."""
        pairs = (*self._held_out, *self._train)
        return [Problem(uid, i.messages, i.answer, i.metadata, ()) for uid, i in pairs]

    def held_out(self) -> list[Problem]:
        """The problems that are never trained on, always in the same order."""
        return [item.problem(uid) for uid, item in self._held_out]

    def drop(self, uids: Collection[int]) -> None:
        """Leave problems out of training and out of the evaluation.

        Raises:
            PapoError: no problem is left to train on, or none of the held-out ones.
        """
        evaluated = bool(self._held_out)
        self._held_out = [pair for pair in self._held_out if pair[0] not in uids]
        self._train = [pair for pair in self._train if pair[0] not in uids]
        self._epoch = None
        if not self._train:
            raise PapoError(f"all training problems are among the {len(uids)} that were dropped")
        if evaluated and not self._held_out:
            raise PapoError(f"all held-out problems are among the {len(uids)} that were dropped")

    def batch(self, cursor: int, n: int) -> list[Problem]:
        """Training problems number `cursor` to `cursor + n - 1` of an endless sequence of
        reshuffled epochs."""
        return [self._at(position) for position in range(cursor, cursor + n)]

    def _at(self, position: int) -> Problem:
        epoch, index = divmod(position, len(self._train))
        if self._epoch is None or self._epoch[0] != epoch:
            order = sorted(self._train, key=lambda pair: _digest(self._seed, epoch, pair[0]))
            self._epoch = (epoch, order)
        uid, item = self._epoch[1][index]
        return item.problem(uid)

    def _generated(self) -> tuple[list[_Item], list[_Item]]:
        """Held-out problems first, so that `train_size` does not change them."""
        c = self._config
        size = self._split_size
        assert c.dataset is not None  # DataConfig requires it
        stream = generate(c.dataset, c.params, c.split_seed)
        found = list(self._new_prompts(stream, size + c.train_size))
        held_out, train = found[:size], found[size:]
        self._require(train, len(found), f"data.dataset={c.dataset!r} with these data.params")
        if len(train) < c.train_size:
            log.info("%s has no more than %d distinct problems", c.dataset, len(found))
        return held_out, train

    def _new_prompts(self, examples: Iterable[Example], limit: int) -> Iterator[_Item]:
        """The first `limit` problems with distinct prompts that are not too long.

        Generated problems have no end: the search stops after many in a row bring nothing new.
        """
        seen: set[bytes] = set()
        kept = stale = 0
        for example in examples:
            if kept == limit or stale > max(1000, 5 * len(seen)):
                return
            stale += 1
            messages = self._with_options(example.messages)
            prompt = _digest(messages)
            if prompt in seen:
                continue
            seen.add(prompt)
            stale = 0
            item = self._item(example, messages, prompt)
            if item is not None:
                kept += 1
                yield item

    def _read(self) -> tuple[list[_Item], list[_Item]]:
        c = self._config
        found = self._distinct(read(c), name_of(c))
        if c.eval_path is None and c.eval_split is None:
            held_out, train = _split(found, self._split_size, c.split_seed)
            self._require(train, len(found), name_of(c))
            if self._split_size and not held_out:
                raise PapoError(
                    f"data.held_out_size={self._split_size}: every prompt of {name_of(c)} has more "
                    "rows than that, and they stay together; hold out more"
                )
            return held_out, train
        where = name_of(c, held_out=True)
        held_out = self._distinct(read(c, held_out=True), where)
        if not held_out:
            raise PapoError(f"{where}: no usable problem")
        prompts = {item.prompt for item in held_out}
        train = [item for item in found if item.prompt not in prompts]
        self.dropped_held_out = len(found) - len(train)
        if self.dropped_held_out:
            log.warning(
                "%d training problems are also in %s: not trained on", self.dropped_held_out, where
            )
        self._require(train, len(found), name_of(c), where)
        if c.held_out_size is not None and c.held_out_size < len(held_out):
            held_out, _ = _split(held_out, c.held_out_size, c.split_seed)
        return held_out, train

    @property
    def _split_size(self) -> int:
        given = self._config.held_out_size
        return _HELD_OUT if given is None else given

    def _require(
        self, train: Sequence[Any], found: int, what: str, held_out_by: str | None = None
    ) -> None:
        """Refuse to go on without training problems. `held_out_by` is the file or split that they
        went to, None for `data.held_out_size`."""
        if train:
            return
        keeps = held_out_by or f"data.held_out_size={self._split_size}"
        raise PapoError(
            f"{what}: {found} distinct problems of at most "
            f"data.max_prompt_tokens={self._config.max_prompt_tokens} tokens, "
            f"of which {keeps} leaves none to train on; hold out less or use more data"
        )

    def _distinct(self, examples: Iterable[Example], what: str) -> list[_Item]:
        """The problems of a file or of a dataset, without repeated and overlong ones; log lines say
        what was dropped and which prompts have several answers."""
        rows: set[bytes] = set()
        answers: dict[bytes, str] = {}
        items = []
        count, contrary, first = 0, 0, ""
        for example in examples:
            count += 1
            messages = self._with_options(example.messages)
            row = _digest(messages, example.answer, _json(example.metadata))
            if row in rows:
                continue
            rows.add(row)
            prompt = _digest(messages)
            earlier = answers.setdefault(prompt, example.answer)
            if earlier != example.answer:
                contrary += 1
                asked = messages[-1]["content"]
                first = first or f"{asked!r:.80}: {earlier!r:.40} and {example.answer!r:.40}"
            item = self._item(example, messages, prompt)
            if item is not None:
                items.append(item)
        if not count:
            raise PapoError(f"{what}: has no rows")
        self._report(what, count - len(rows), contrary, first)
        return items

    def _report(self, what: str, equal: int, contrary: int, first: str) -> None:
        self.dropped_equal += equal
        self.other_answers += contrary
        if equal:
            log.warning("%s: %d rows that equal an earlier one dropped", what, equal)
        if contrary:
            log.warning(
                "%s: %d rows repeat a prompt with another answer, all are kept; the first is %s",
                what,
                contrary,
                first,
            )

    def _with_options(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """`messages` with the system prompt, unless they have one, and the suffix."""
        c = self._config
        full = list(messages)
        if c.system_prompt is not None and full[0]["role"] != "system":
            full.insert(0, {"role": "system", "content": c.system_prompt})
        full[-1] = {**full[-1], "content": full[-1]["content"] + c.prompt_suffix}
        return tuple(full)

    def _item(
        self, example: Example, messages: tuple[Mapping[str, Any], ...], prompt: bytes
    ) -> _Item | None:
        """The item; None where the prompt is too long, which is counted."""
        ids = self._encoder.encode(messages)
        if ids is None:
            self.dropped_long += 1
            return None
        return _Item(
            prompt,
            _digest(example.messages),
            messages,
            example.answer,
            example.metadata,
            array("i", ids),
            example.conversational,
        )


def _split(items: Sequence[_Item], size: int, seed: int) -> tuple[list[_Item], list[_Item]]:
    """At most `size` items to hold out, and the others; items of one prompt stay together.

    The result depends neither on the order of the rows nor on the system prompt and suffix.
    """
    groups: dict[bytes, list[_Item]] = {}
    for item in items:
        groups.setdefault(item.prompt, []).append(item)
    ordered = sorted(groups.values(), key=lambda group: min(_digest(seed, i.row) for i in group))
    held_out: list[_Item] = []
    rest: list[_Item] = []
    for group in ordered:
        side = held_out if len(held_out) + len(group) <= size else rest
        side += sorted(group, key=lambda i: _digest(i.answer, _json(i.metadata)))
    return held_out, rest


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _json(metadata: Mapping[str, Any]) -> str:
    """`metadata` as text, the same for any order of its keys."""
    return json.dumps(metadata, sort_keys=True, default=repr)
