"""Problems that reasoning-gym generates."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from papo.data.examples import Example
from papo.errors import PapoError, first_line, listed, printable, shown

_SHOWN_NAMES = 20


def generate(name: str, params: Mapping[str, Any], seed: int) -> Iterator[Example]:
    """An endless stream of a reasoning-gym dataset's problems.

    `metadata` holds what the dataset's own `score_answer` needs: the dataset's name, its parameters
    and the entry.

    Raises:
        PapoError: there is no such dataset, or it refuses its parameters.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        advice = (
            f"did you mean {', '.join(close)}?"
            if close
            else f"known: {listed(sorted(DATASETS), _SHOWN_NAMES)}"
        )
        raise PapoError(f"data.dataset={shown(name)}: reasoning-gym has no such dataset; {advice}")
    reserved = next((key for key in ("size", "seed") if key in params), None)
    if reserved:
        instead = {"size": "data.train_size", "seed": "data.split_seed"}[reserved]
        raise PapoError(f"data.params.{reserved}={shown(params[reserved])}: set {instead} instead")
    known = [
        field for field in DATASETS[name][1].__dataclass_fields__ if field not in ("size", "seed")
    ]
    unknown = next((key for key in params if key not in known), None)
    if unknown is not None:
        raise PapoError(
            f"data.params.{printable(unknown)}={shown(params[unknown])}: {name} has no such "
            f"parameter; known: {', '.join(known)}"
        )
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=2**31 - 1, **params)
        dataset[0]
    except Exception as error:  # datasets check their parameters with assertions of their own
        raise PapoError(
            f"data.dataset={name!r}: refused data.params={shown(dict(params))}: {first_line(error)}"
        ) from error
    index = 0
    while True:
        entry = dataset[index]
        index += 1
        answer = entry["answer"]
        yield Example(
            messages=({"role": "user", "content": entry["question"]},),
            answer="" if answer is None else str(answer),
            metadata={"dataset": name, "params": dict(params), "entry": entry},
        )
