"""Problems: read or generated, split, templated and handed out in an order that depends on the seed
and a cursor alone."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papo.errors import PapoError
from papo.types import Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Raw:
    """A problem before the chat template."""

    messages: tuple[Mapping[str, str], ...]
    answer: str
    metadata: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The text two problems share when they are the same one."""
        text = " ".join(m["content"] for m in self.messages if m["role"] != "system")
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class ProblemSource:
    """Training and held-out problems, disjoint by normalised text. Its only state is the caller's
    cursor.

    Args:
        config: the config's `data` section.
        tokenizer: the policy's; its chat template is applied, plain text is used where it has none.
        seed: orders the training problems; the split depends on `config.split_seed` alone.

    Attributes:
        dropped_long: problems left out because their prompt exceeds `max_prompt_tokens`.

    Raises:
        PapoError: no such dataset or file, a bad line, bad parameters, or too few distinct
            problems.
    """

    def __init__(self, config: Any, tokenizer: Any, seed: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._epoch: tuple[int, list[Problem]] | None = None
        self.dropped_long = 0
        if not getattr(tokenizer, "chat_template", None):
            log.warning("the tokenizer has no chat template: prompts are plain text")
        held_out, train = self._generated() if config.source == "reasoning_gym" else self._read()
        self._held_out = [self._problem(uid, *item) for uid, item in enumerate(held_out)]
        self._train = [
            self._problem(uid, *item) for uid, item in enumerate(train, start=len(held_out))
        ]
        if self.dropped_long:
            limit = config.max_prompt_tokens
            log.warning(
                "%d prompts of more than data.max_prompt_tokens=%d tokens dropped",
                self.dropped_long,
                limit,
            )

    def __len__(self) -> int:
        """Number of training problems."""
        return len(self._train)

    def held_out(self) -> list[Problem]:
        """The problems that are never trained on, always in the same order."""
        return list(self._held_out)

    def drop(self, uids: Collection[int]) -> None:
        """Leave problems out, of training and of the evaluation.

        Raises:
            PapoError: none is left to train on.
        """
        self._held_out = [p for p in self._held_out if p.uid not in uids]
        self._train = [p for p in self._train if p.uid not in uids]
        self._epoch = None
        if not self._train:
            raise PapoError(f"all training problems are among the {len(uids)} that were dropped")

    def batch(self, cursor: int, n: int) -> list[Problem]:
        """Training problems number `cursor` to `cursor + n - 1` of an endless sequence of
        reshuffled epochs."""
        return [self._at(position) for position in range(cursor, cursor + n)]

    def _at(self, position: int) -> Problem:
        epoch, index = divmod(position, len(self._train))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                sorted(self._train, key=lambda p: _digest(self._seed, epoch, p.uid)),
            )
        return self._epoch[1][index]

    def _generated(self) -> tuple[list[_Templated], list[_Templated]]:
        """Held-out problems first, so that `train_size` does not change them."""
        c = self._config
        found = list(
            self._usable(
                _reasoning_gym(c.dataset, c.params, c.split_seed), c.held_out_size + c.train_size
            )
        )
        held_out, train = found[: c.held_out_size], found[c.held_out_size :]
        self._require(train, len(found), f"data.dataset={c.dataset!r} with these data.params")
        if len(train) < c.train_size:
            log.info(
                "%s has %d distinct problems: %d held out, %d to train on",
                c.dataset,
                len(found),
                len(held_out),
                len(train),
            )
        return held_out, train

    def _read(self) -> tuple[list[_Templated], list[_Templated]]:
        c = self._config
        train = list(self._usable(_jsonl(c.train_path)))
        if c.eval_path is not None:
            held_out = list(self._usable(_jsonl(c.eval_path)))
            kept_out = {raw.key for raw, _ in held_out}
            disjoint = [item for item in train if item[0].key not in kept_out]
            if len(disjoint) < len(train):
                log.warning(
                    "%d training problems are also in %s: not trained on",
                    len(train) - len(disjoint),
                    c.eval_path,
                )
            if not held_out:
                raise PapoError(f"data.eval_path={c.eval_path!r}: no usable problem")
            left_out = f"data.eval_path={c.eval_path!r} leaves none to train on; widen the data"
            self._require(disjoint, len(train), f"data.train_path={c.train_path!r}", left_out)
            return held_out, disjoint
        train.sort(key=lambda item: _digest(c.split_seed, item[0].key))
        held_out, rest = train[: c.held_out_size], train[c.held_out_size :]
        self._require(rest, len(train), f"data.train_path={c.train_path!r}")
        return held_out, rest

    def _require(
        self, train: Sequence[Any], found: int, what: str, left_out: str | None = None
    ) -> None:
        """`left_out`: why nothing is left of the problems found; None: they are held out."""
        c = self._config
        if not train:
            held_out = (
                f"data.held_out_size={c.held_out_size} leaves none to train on; lower it or widen "
                "the data"
            )
            raise PapoError(
                f"{what}: {found} distinct problems of at most "
                f"data.max_prompt_tokens={c.max_prompt_tokens} tokens, {left_out or held_out}"
            )

    def _usable(self, raws: Iterable[_Raw], limit: int | None = None) -> Iterator[_Templated]:
        """The first `limit` distinct problems whose prompt is not too long.

        Generated problems have no end: the search is given up when a long run brings nothing new.
        """
        seen: set[str] = set()
        kept = stale = 0
        for raw in raws:
            if limit is not None and (kept == limit or stale > max(1000, 5 * len(seen))):
                return
            stale += 1
            full = self._with_options(raw)
            if full.key in seen:
                continue
            seen.add(full.key)
            stale = 0
            ids = self._prompt_ids(full.messages)
            if len(ids) > self._config.max_prompt_tokens:
                self.dropped_long += 1
                continue
            kept += 1
            yield full, ids

    def _with_options(self, raw: _Raw) -> _Raw:
        """`raw` with the system prompt (unless it brings one) and the suffix on its last user
        message."""
        c = self._config
        messages = list(raw.messages)
        if c.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": c.system_prompt})
        last = messages[-1]
        messages[-1] = {**last, "content": last["content"] + c.prompt_suffix}
        return _Raw(tuple(messages), raw.answer, raw.metadata)

    def _prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        if not getattr(self._tokenizer, "chat_template", None):
            return tuple(self._tokenizer("\n".join(m["content"] for m in messages))["input_ids"])
        try:
            encoded = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True
            )
        except Exception as error:  # a template is a program: it may refuse a role, or be wrong
            raise PapoError(
                f"the tokenizer's chat template failed on {list(messages)!r:.120}: {error}"
            ) from error
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
        return tuple(int(i) for i in ids)

    @staticmethod
    def _problem(uid: int, raw: _Raw, ids: tuple[int, ...]) -> Problem:
        return Problem(uid, raw.messages, raw.answer, raw.metadata, ids)


_Templated = tuple[_Raw, tuple[int, ...]]


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _reasoning_gym(name: str, params: Mapping[str, Any], seed: int) -> Iterator[_Raw]:
    """An endless stream of a reasoning-gym dataset's problems.

    `metadata` holds what its own `score_answer` needs: the dataset's name, its parameters and the
    entry.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        advice = (
            f"did you mean {', '.join(close)}?"
            if close
            else f"known: {', '.join(sorted(DATASETS))}"
        )
        raise PapoError(f"data.dataset={name!r}: reasoning-gym has no such dataset; {advice}")
    reserved = next((key for key in ("size", "seed") if key in params), None)
    if reserved:
        instead = {"size": "data.train_size", "seed": "data.split_seed"}[reserved]
        raise PapoError(f"data.params.{reserved}={params[reserved]!r}: set {instead} instead")
    known = [
        field for field in DATASETS[name][1].__dataclass_fields__ if field not in ("size", "seed")
    ]
    unknown = next((key for key in params if key not in known), None)
    if unknown is not None:
        raise PapoError(
            f"data.params.{unknown}={params[unknown]!r}: {name} has no such parameter; known: "
            f"{', '.join(known)}"
        )
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=2**31 - 1, **params)
        dataset[0]
    except Exception as error:  # datasets check their parameters with assertions of their own
        raise PapoError(
            f"data.dataset={name!r}: refused data.params={dict(params)}: {error}"
        ) from error
    index = 0
    while True:
        entry = dataset[index]
        index += 1
        answer = entry["answer"]
        yield _Raw(
            messages=({"role": "user", "content": entry["question"]},),
            answer="" if answer is None else str(answer),
            metadata={"dataset": name, "params": dict(params), "entry": entry},
        )


def _jsonl(path: str) -> Iterator[_Raw]:
    """The problems of a file of `{"prompt": text or "messages": [...], "answer": ...}` lines; other
    keys are metadata."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path} line {number}")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PapoError(f"{Path(path)}: cannot be read: {reason}") from error


def _parse_line(line: str, where: str) -> _Raw:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PapoError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(record, dict):
        raise PapoError(f"{where}: expected an object, got {type(record).__name__}")
    answer = record.get("answer")
    if not isinstance(answer, (str, int, float)) or isinstance(answer, bool):
        raise PapoError(f"{where}: answer={answer!r}: expected text or a number")
    metadata = {k: v for k, v in record.items() if k not in ("prompt", "messages", "answer")}
    return _Raw(_messages(record, where), str(answer), metadata)


def _messages(record: Mapping[str, Any], where: str) -> tuple[Mapping[str, str], ...]:
    if ("prompt" in record) == ("messages" in record):
        raise PapoError(f"{where}: expected either prompt or messages, got keys {sorted(record)}")
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise PapoError(f"{where}: prompt={prompt!r}: expected text")
        return ({"role": "user", "content": prompt},)
    messages = record["messages"]
    ok = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not ok or not messages:
        raise PapoError(
            f"{where}: messages={messages!r:.80}: expected a list of {{role, content}}, both text"
        )
    if messages[-1]["role"] != "user":
        raise PapoError(
            f"{where}: the last message's role is {messages[-1]['role']!r}: expected user"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)
