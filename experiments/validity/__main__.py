"""``python -m experiments.validity VERB``: PROTOCOL.md, part by part.

tabular                     part 1 (seconds)
isolated --task TASK        parts 2 and 3
own --task TASK             part 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.validity import isolated, own, tabular
from experiments.validity.workbench import TASKS

RECORDS = Path("build/validity")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("tabular", "isolated", "own"))
    parser.add_argument("--task", choices=list(TASKS), default="chain_sum")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where raw records lie")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="of the config"
    )
    args = parser.parse_args()
    if args.verb == "tabular":
        tabular.main(args.records)
    elif args.verb == "isolated":
        isolated.main(args.records, args.task, args.set)
    else:
        own.main(args.records, args.task, args.set)


if __name__ == "__main__":
    main()
