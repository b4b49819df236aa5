"""Ranks for the tests' tasks, forked from one process that has imported what they need: imports are
most of what a start costs.

A line of JSON on standard input starts ranks, and a line on standard output has their exit codes.
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path

from tests.campaigns import ranks

_SECONDS = 240.0


def main() -> None:
    """Start what each line asks for: number of ranks, module, its tasks, folder of what they
    print."""
    ranks.prepare()
    for line in sys.stdin:
        world, module, tasks, folder = json.loads(line)
        started = ranks.start(world, [tasks], Path(folder), run=partial(_run, module))
        ranks.ended(started, _SECONDS)
        print(json.dumps([rank.code for rank in started]), flush=True)


def _run(module: str, arguments: list[str]) -> int:
    """What `python -m module arguments...` does."""
    from tests.distributed import tasks

    sys.argv = [module, *arguments]
    tasks.main(vars(importlib.import_module(module)))
    ranks.leave()
    return 0


if __name__ == "__main__":
    main()
