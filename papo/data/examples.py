"""From a row's fields to a problem: the prompt, the reference answer, and the rest as metadata."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from papo.data.rows import head, name_of, open_rows
from papo.errors import PapoError, listed, printable, shown
from papo.inputs import is_text
from papo.numbers import positional

if TYPE_CHECKING:
    from papo.config import DataConfig

_SHOWN_KEYS = 20
_DEEPEST = 64
_PATTERN_SECONDS = 5.0
_MISSING = object()


@dataclass(frozen=True)
class Example:
    """A row as a problem, without system prompt and suffix.

    Attributes:
        messages: the chat as the row has it. Each message is `{"role": ..., "content": ...}` with
            whatever else it has (`tool_calls`, `name`); the last one is the user's.
        answer: the reference answer as text.
        metadata: the row's other fields; with `answer_pattern` also the field of the whole answer.
        conversational: the row has messages rather than text.
    """

    messages: tuple[Mapping[str, Any], ...]
    answer: str
    metadata: Mapping[str, Any]
    conversational: bool = False


def read(config: DataConfig, *, held_out: bool = False) -> Iterator[Example]:
    """The training problems of a file or of a dataset, or the held-out ones, in order.

    Args:
        config: the config's `data` section, its source not `reasoning_gym`.

    Raises:
        PapoError: a row cannot be read; the message has the file or dataset, the row and what was
            expected.
    """
    rows, schema = open_rows(config, held_out=held_out)
    fields = _Fields(config, _precision(schema, config.answer_field))
    for where, row in rows:
        yield fields.example(row, where)


def first(config: DataConfig, *, held_out: bool = False) -> Example:
    """The first problem of a file, for which torch is not imported.

    Raises:
        PapoError: as `read`, or there is no row.
    """
    for where, row in head(config, held_out=held_out):
        return _Fields(config, float).example(row, where)
    raise PapoError(f"{name_of(config, held_out=held_out)}: has no rows")


def _precision(schema: Any, path: str) -> Callable[[float], Any]:
    """The type of the numbers in the Arrow column at `path`.

    Numbers of single or half precision have fewer decimal digits than the Python floats that they
    become.
    """
    if schema is None:
        return float
    kind = schema
    for name in [path] if path in schema.names else path.split("."):
        if hasattr(kind, "value_type"):  # a list, and an index into it
            kind = kind.value_type
            continue
        fields = {field.name: field.type for field in kind} if hasattr(kind, "__iter__") else {}
        if name not in fields:
            return float
        kind = fields[name]
    return {"float": np.float32, "halffloat": np.float16}.get(str(kind), float)


class _Fields:
    """Finds the prompt and the reference answer among a row's fields."""

    def __init__(self, config: DataConfig, precision: Callable[[float], Any]) -> None:
        self._precision = precision
        self._prompt = config.prompt_field
        self._answer = config.answer_field
        self._pattern = regex.compile(config.answer_pattern) if config.answer_pattern else None

    def example(self, row: Any, where: str) -> Example:
        """The problem in a row.

        Raises:
            PapoError: a field is missing or holds something that it should not.
        """
        if not isinstance(row, dict):
            raise PapoError(f"{where}: expected an object, got {type(row).__name__}")
        _check_plain(row, where)
        prompt = self._prompt_of(row, where)
        answer = self._answer_of(row, where)
        used = {prompt} if self._pattern else {prompt, self._answer}
        metadata = {k: v for k, v in row.items() if k not in used}
        asked = _at(row, prompt)
        messages = _messages(asked, prompt, where)
        return Example(messages, answer, metadata, not isinstance(asked, str))

    def _prompt_of(self, row: Mapping[str, Any], where: str) -> str:
        if self._prompt is not None:
            _require(row, self._prompt, where, "data.prompt_field")
            return self._prompt
        given = [name for name in ("prompt", "messages") if name in row]
        if len(given) != 1:
            raise PapoError(
                f"{where}: expected either prompt or messages, got keys {shown(sorted(row), 200)}; "
                "name the field with data.prompt_field"
            )
        return given[0]

    def _answer_of(self, row: Mapping[str, Any], where: str) -> str:
        _require(row, self._answer, where, "data.answer_field")
        value = _at(row, self._answer)
        text = _answer_text(value, self._precision)
        if text is None:
            raise PapoError(
                f"{where}: {self._answer}={shown(value)}: expected text or a finite number"
            )
        if self._pattern is None:
            return text
        option = f"data.answer_pattern={shown(self._pattern.pattern)}"
        try:
            match = self._pattern.search(text, timeout=_PATTERN_SECONDS)
        except TimeoutError as error:
            raise PapoError(
                f"{where}: {self._answer}={shown(value)}: {option} searches it for more than "
                f"{_PATTERN_SECONDS:g} s; write it without nested repetitions"
            ) from error
        group = (match[1] or "").strip() if match else ""
        if not group:
            raise PapoError(f"{where}: {self._answer}={shown(value)}: {option} finds nothing in it")
        return group


def _at(value: Any, path: str) -> Any:
    """The value at a dotted path, `_MISSING` if there is none.

    A key that itself contains the dots wins; a number is an index into a list.
    """
    if isinstance(value, list):
        first, _, rest = path.partition(".")
        if not first.isdecimal() or len(first) > 9 or int(first) >= len(value):
            return _MISSING
        return _at(value[int(first)], rest) if rest else value[int(first)]
    if not isinstance(value, Mapping):
        return _MISSING
    if path in value:
        return value[path]
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:cut])
        if head in value:
            found = _at(value[head], ".".join(parts[cut:]))
            if found is not _MISSING:
                return found
    return _MISSING


def _require(row: Mapping[str, Any], path: str, where: str, option: str) -> None:
    if _at(row, path) is not _MISSING:
        return
    keys = [printable(key) for key in _paths(row)]
    near = difflib.get_close_matches(path, keys, n=1)
    advice = f"; did you mean {near[0]}?" if near else ""
    raise PapoError(
        f"{where}: {path} is missing: {option} must be one of {listed(keys, _SHOWN_KEYS)}{advice}"
    )


def _check_plain(row: Mapping[str, Any], where: str) -> None:
    """Refuse what cannot reach a verifier or completions.jsonl: values nested too deeply, and text
    that UTF-8 cannot hold."""
    level: list[tuple[str, Any]] = list(row.items())
    for _ in range(_DEEPEST):
        inner: list[tuple[str, Any]] = []
        for field, value in level:
            if not is_text(field):
                raise PapoError(f"{where}: key {shown(field)}: half of a surrogate pair")
            if isinstance(value, str) and not is_text(value):
                raise PapoError(
                    f"{where}: {printable(field)}={shown(value)}: half of a surrogate pair, which "
                    "is not text"
                )
            if isinstance(value, dict):
                inner += ((f"{field}.{key}", part) for key, part in value.items())
            elif isinstance(value, list):
                inner += ((field, part) for part in value)
        if not inner:
            return
        level = inner
    raise PapoError(f"{where}: {printable(level[0][0])}: nested more than {_DEEPEST} deep")


def _paths(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in row.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _answer_text(value: Any, precision: Callable[[float], Any]) -> str | None:
    """An answer as a person writes it: no number has an exponent, no whole one a decimal point.

    None if `value` is no answer.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return None
    return positional(str(precision(value) if isinstance(value, float) else value))


def _messages(value: Any, name: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """The chat in a prompt; plain text becomes a message of the user's."""
    told = f"{name}={shown(value)}"
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    ok = isinstance(value, list) and all(map(_is_message, value))
    if not ok or not value:
        raise PapoError(f"{where}: {told}: expected text or a list of {{role, content}}, both text")
    last = value[-1]
    if last["role"] != "user":
        raise PapoError(
            f"{where}: {name}: the last message's role is {shown(last['role'])}: expected user"
        )
    if not last["content"].strip():
        raise PapoError(f"{where}: {told}: expected text, got white space alone")
    # In a column every message has every key; null stands for a key that the message lacks.
    order = ("role", "content")
    return tuple(
        {k: m[k] for k in (*order, *sorted(m.keys() - order)) if m.get(k) is not None}
        for m in value
    )


def _is_message(value: Any) -> bool:
    """Whether `value` has a role and text; an assistant that calls tools may have no text."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str) or (content is None and bool(value.get("tool_calls")))
