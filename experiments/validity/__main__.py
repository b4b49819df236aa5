"""``python -m experiments.validity VERB``: PROTOCOL.md, part by part.

tabular                  part 1
isolated --task TASK     parts 2, 3 and 6
own --task TASK          part 4
runs                     part 5
summary                  records to experiments/results/validity-DATE.json
tables                   the newest summary to the tables of docs/evidence.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from experiments.validity import isolated, own, runs, summary, tables, tabular
from experiments.validity.workbench import TASKS
from papo.errors import PapoError

RECORDS = Path("build/validity")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("tabular", "isolated", "own", "runs", "summary", "tables"))
    parser.add_argument("--task", choices=list(TASKS), default="chain_sum")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where raw records lie")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="of the config"
    )
    args = parser.parse_args()
    verbs: dict[str, Callable[[], object]] = {
        "tabular": lambda: tabular.main(args.records),
        "isolated": lambda: isolated.main(args.records, args.task, args.set),
        "own": lambda: own.main(args.records, args.task, args.set),
        "runs": lambda: runs.main(args.records, args.set),
        "summary": lambda: summary.main(args.records),
        "tables": tables.main,
    }
    try:
        verbs[args.verb]()
    except PapoError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
