"""Which functions of csrc an instruction was inlined from."""

from __future__ import annotations

import re
from pathlib import Path

from .listing import Instruction

DEFINITION = re.compile(r"(?:PAPO_DEVICE|PAPO_HD|PAPO_KERNEL|inline|__global__)\b[^;=]*?(\w+)\(")
KEYWORDS = {"PAPO_KERNEL", "if", "for", "while", "switch", "__launch_bounds__"}


class SourceMap:
    """root: the checkout that was compiled."""

    def __init__(self, root: Path) -> None:
        self.starts: dict[str, list[tuple[int, str]]] = {}
        for path in sorted((root / "csrc").rglob("*")):
            if path.suffix in (".cu", ".cuh", ".h"):
                self.starts[path.name] = self._functions(path.read_text())

    @staticmethod
    def _functions(text: str) -> list[tuple[int, str]]:
        found = []
        for match in DEFINITION.finditer(text):
            name = match[1]
            if name in KEYWORDS:  # PAPO_KERNEL(threads, blocks) name(
                rest = re.match(r"[^)]*\)\s*(\w+)\(", text[match.end() :])
                if rest is None:
                    continue
                name = rest[1]
            found.append((text.count("\n", 0, match.start()) + 1, name))
        return found

    def function(self, file: str, line: int) -> str:
        """The function that a line lies in, by the nearest definition above it."""
        name = Path(file).stem
        for start, candidate in self.starts.get(file, []):
            if start > line:
                break
            name = candidate
        return name

    def path(self, instruction: Instruction) -> tuple[str, ...]:
        """The functions an instruction lies in, the kernel first."""
        names: list[str] = []
        for file, line in reversed(instruction.places):
            name = self.function(file, line)
            if not names or names[-1] != name:
                names.append(name)
        return tuple(names)
