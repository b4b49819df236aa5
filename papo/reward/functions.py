"""Users' reward functions: found by name, and called in the way that their parameters ask for.

No torch here: reward workers import this file.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from papo.errors import PapoError, printable
from papo.reward.verifiers import BUILT_IN

SHOWN_CHARACTERS = 200  # of an exception's text, of a completion


class Task(NamedTuple):
    """What a worker is to judge.

    Attributes:
        text: the completion; None to judge the reference answer itself.
        answer: the reference answer.
        metadata: what the verifier reads besides.
        thinks: the prompt ends with `<think>`, so that the completion begins inside its thinking.
        prompt: what was asked: text, or the messages where the row had messages.
        completion_ids: the sampled token ids.
        answer_field: the name of the row's field that `answer` comes from.
    """

    text: str | None
    answer: str
    metadata: Mapping[str, Any]
    thinks: bool = False
    prompt: str | list[Mapping[str, Any]] = ""
    completion_ids: tuple[int, ...] = ()
    answer_field: str = "answer"


Call = Callable[[str, Task], Any]  # of the part of a completion that `reward.extract` leaves


@lru_cache(maxsize=8)
def load_verifier(name: str) -> Call:
    """A built-in verifier, or the user's `package.module:function`; imports their packages.

    What a user's function returns is the reward, with no threshold; None or a value that is not
    finite masks the completion. docs/rewards.md has the three ways in which it may be called.

    Raises:
        PapoError: no such verifier, module or function, it cannot be imported, or its parameters
            fit none of the ways.
    """
    if name in BUILT_IN:
        verifier = BUILT_IN[name]
        if name != "exact":
            importlib.import_module(name)  # so that no completion waits for it
            logging.getLogger(name).setLevel(logging.ERROR)  # its timeouts are off, as it warns
        return lambda text, task: verifier(text, task.answer, task.metadata)
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        known = ", ".join(BUILT_IN)
        raise PapoError(
            f"reward.verifier={name!r}: expected auto, {known}, or package.module:function"
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
        callable_ = callable(function)
    except BaseException as error:
        raise PapoError(f"reward.verifier={name!r}: {described(error)}") from error
    if not callable_:
        raise PapoError(
            f"reward.verifier={name!r}: {attribute} is a {type(function).__name__}, not a function"
        )
    return _adapted(function, name)


def described(error: BaseException) -> str:
    """An exception's type and text on one line; safe with exceptions that fail to say."""
    if isinstance(error, PapoError):
        return str(error)
    try:
        text = str(error)
        name = type(error).__name__
        return printable(f"{name}: {text}" if text else name, SHOWN_CHARACTERS)
    except BaseException:
        return "an exception that cannot be shown"


def _adapted(function: Callable[..., Any], name: str) -> Call:
    """`function` as it is called with a completion and its task."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # functions in C need not have one
        signature = inspect.Signature.from_callable(_plain)
    parameters = signature.parameters
    if "completions" in parameters:
        return lambda text, task: _only(_called(function, _columns(text, task), parameters))
    if {"solution_str", "ground_truth"} <= set(parameters):
        return lambda text, task: _score(_called(function, _fields(text, task), parameters))
    try:
        signature.bind("", "", {})
    except TypeError:
        raise PapoError(
            f"reward.verifier={name!r}: its parameters are ({', '.join(parameters)}): expected "
            "(text, answer, metadata), or some named completions, or solution_str and ground_truth"
        ) from None
    return lambda text, task: _awaited(function(text, task.answer, task.metadata))


def _plain(text: str, answer: str, metadata: Mapping[str, Any]) -> None:
    """The parameters of a function that does not say what it takes."""


def _columns(text: str, task: Task) -> dict[str, Any]:
    """Arguments as TRL passes them: lists over completions, here of one."""
    chat = not isinstance(task.prompt, str)
    completion = [{"role": "assistant", "content": text}] if chat else text
    row = {**task.metadata, task.answer_field: task.answer}
    own = {
        "prompts": task.prompt,
        "completions": completion,
        "completion_ids": list(task.completion_ids),
    }
    columns = {name: [value] for name, value in {**row, **own}.items()}
    return {**columns, "log_extra": _logs_nothing, "log_metric": _logs_nothing}


def _logs_nothing(name: str, value: Any) -> None:
    """Stands for TRL's own loggers."""


def _fields(text: str, task: Task) -> dict[str, Any]:
    """Arguments as verl passes them."""
    return {
        "data_source": task.metadata.get("data_source", ""),
        "solution_str": text,
        "ground_truth": task.answer,
        "extra_info": task.metadata.get("extra_info", task.metadata),
    }


def _called(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
) -> Any:
    """What it returns for those of the arguments that it takes."""
    kinds = {p.kind for p in parameters.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    wanted = [
        p.name for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    missing = [
        n for n in wanted if parameters[n].default is inspect.Parameter.empty and n not in given
    ]
    if missing:
        raise TypeError(f"it needs {', '.join(missing)}, and the row has {', '.join(given)}")
    chosen = {n: v for n, v in given.items() if takes_all or n in wanted}
    return _awaited(function(**chosen))


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _awaited(value: Any) -> Any:
    """The value of an `async def` function, any other value as it is.

    All of a worker's calls share an event loop, so that a function may keep its connections.
    """
    return _loop().run_until_complete(value) if inspect.iscoroutine(value) else value


def _only(values: Any) -> Any:
    """The one element of what a function returns for one completion."""
    try:
        (value,) = values
    except (TypeError, ValueError) as error:
        raise TypeError("expected a list of one number or None, one for each completion") from error
    return value


def _score(value: Any) -> Any:
    return value["score"] if isinstance(value, dict) else value
