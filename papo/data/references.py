"""Reference answers held against their own verifier, before anything expensive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from papo.data.problems import ProblemSource
from papo.dist import collectives
from papo.errors import PapoError
from papo.reward.pool import BadReference, RewardPool
from papo.types import Problem

_SHOWN_ROWS = 20
_SHOWN_CHARACTERS = 60


def check(
    problems: ProblemSource, rewards: RewardPool, policy: str, say: Callable[[str], None]
) -> None:
    """List the references that would not score 1 as completions, and do as `policy` says; a
    collective, of whose work each rank does a share.

    Args:
        policy: `reward.on_bad_reference`.
        say: shows a line, on rank 0 alone.

    Raises:
        PapoError: there are some and `policy` is `error`, or all problems would be dropped.
    """
    if not rewards.knows_references:
        return
    begin = time.perf_counter()
    everything = problems.without_tokens()
    mine = everything[collectives.rank() :: collectives.world_size()]
    bad: list[BadReference] = []
    with collectives.failing_together():
        bad = rewards.bad_references(mine)
    bad = sorted(collectives.gather_lists(bad))
    seconds = time.perf_counter() - begin
    say(
        f"reference answers checked: {len(everything)}, of which {len(bad)} would not score 1 "
        f"({seconds:.0f} s)"
    )
    if not bad:
        return
    say(table(bad, everything))
    share = f"{len(bad)} of {len(everything)} reference answers"
    if policy == "error":
        raise PapoError(
            f"{share} would not score 1 as completions, such as {bad[0].answer!r:.60}: "
            f"{bad[0].why}; say with data.answer_pattern what the answer is, choose another "
            "reward.extract or reward.verifier, or set reward.on_bad_reference=drop"
        )
    if policy == "drop":
        problems.drop({b.uid for b in bad})
        say(f"{share} dropped with their problems: reward.on_bad_reference=drop")


def table(bad: Sequence[BadReference], problems: Sequence[Problem]) -> str:
    """The first of them, a line each: the problem's number, its prompt, the answer and why."""
    prompts = {p.uid: p.messages[-1]["content"] for p in problems if p.messages}
    rows = [("problem", "prompt", "reference answer", "why")]
    rows += [
        (str(b.uid), _shown(prompts.get(b.uid, "")), _shown(b.answer), b.why)
        for b in bad[:_SHOWN_ROWS]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
    if len(bad) > _SHOWN_ROWS:
        lines.append(f"and {len(bad) - _SHOWN_ROWS} more")
    return "\n".join(lines)


def _shown(text: str) -> str:
    """On one line and not too long; the end tells answers apart."""
    line = repr(text)[1:-1]
    half = _SHOWN_CHARACTERS // 2
    return line if len(line) <= 2 * half else f"{line[:half]}...{line[-half:]}"
