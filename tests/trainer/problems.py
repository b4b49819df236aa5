"""Files of problems, and the problems of a source, for the tests of data."""

from __future__ import annotations

import json
from pathlib import Path

from papo.config.data_options import DataConfig
from papo.data.problems import ProblemSource
from papo.types import Problem


def lines(path: Path, *records: object) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def jsonl(tmp_path: Path, *records: object, **options) -> DataConfig:
    path = lines(tmp_path / "train.jsonl", *records)
    return DataConfig(**{"source": "jsonl", "train_path": path, "held_out_size": 1, **options})


def text(problem: Problem) -> str:
    """The whole chat, as it is: what makes two prompts the same."""
    return repr(problem.messages)


def numbered(n: int) -> list[dict]:
    return [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(n)]


def kept(source: ProblemSource) -> list[Problem]:
    return [*source.held_out(), *source.batch(0, len(source))]
