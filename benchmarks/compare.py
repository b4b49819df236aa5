"""Two result files side by side: ``python -m benchmarks.compare BEFORE.json AFTER.json``.

Times are compared as the ratio after / before; a ratio above ``--tolerance`` is marked and makes
the exit status 1. Compare files of the same machine only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def times(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """(name, ms) of every time in a record: what is under a key ``ms``, a number or a table."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == "ms" and isinstance(value, (int, float)):
            yield " / ".join(path), float(value)
        elif key == "ms" and isinstance(value, dict):
            yield from ((" / ".join((*path, name)), float(v)) for name, v in value.items())
        else:
            yield from times(value, (*path, key))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=1.05)
    args = parser.parse_args()
    before, after = (dict(times(json.loads(p.read_text()))) for p in (args.before, args.after))
    worse = 0
    for name in sorted(before.keys() & after.keys()):
        ratio = after[name] / before[name]
        slower = ratio > args.tolerance
        worse += slower
        mark = "  <-- slower" if slower else ""
        print(f"{before[name]:10.3f} {after[name]:10.3f} {ratio:7.3f}x  {name}{mark}")
    for name in sorted(before.keys() ^ after.keys()):
        print(f"only in {'before' if name in before else 'after'}: {name}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
