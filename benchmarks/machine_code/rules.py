"""Rules that machine code keeps or breaks."""

from __future__ import annotations


def broken(where: str, rules: dict[str, bool]) -> list[str]:
    """A line for each rule that is not kept.

    rules: whether a rule is kept, by what can be said where it is not.
    """
    return [f"{where}: {complaint}" for complaint, is_kept in rules.items() if not is_kept]
