"""Bad references: what is shown of them, and what the run does about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from papo.config.data_options import DataConfig
from papo.data import references
from papo.data.problems import ProblemSource
from papo.dist import collectives
from papo.errors import PapoError
from papo.reward.pool import BadReference
from tests.trainer.tiny import build_tokenizer


class Pool:
    """Reports the given answers as bad."""

    knows_references = True

    def __init__(self, *bad: str) -> None:
        self.bad = bad
        self.asked: list[int] = []

    def bad_references(self, problems: Any) -> list[BadReference]:
        self.asked += [p.uid for p in problems]
        return [BadReference(p.uid, p.answer, "why not") for p in problems if p.answer in self.bad]


@pytest.fixture
def problems(tmp_path: Path) -> ProblemSource:
    """Six, two of them held out; each answers with its own number."""
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "answer": str(i)}) + "\n" for i in range(6))
    )
    config = DataConfig(source="jsonl", train_path=str(path), held_out_size=2)
    return ProblemSource(config, build_tokenizer(), seed=0)


def everything(problems: ProblemSource) -> dict[str, int]:
    whole = [*problems.held_out(), *problems.batch(0, len(problems))]
    return {p.answer: p.uid for p in whole}


def check(problems: ProblemSource, pool: Any, policy: str = "error") -> str:
    said: list[str] = []
    references.check(problems, pool, policy, said.append)
    return "\n".join(said)


def test_every_reference_is_checked_once_held_out_ones_too(problems: ProblemSource) -> None:
    pool = Pool()
    assert "reference answers checked: 6, of which 0 " in check(problems, pool)
    assert sorted(pool.asked) == list(range(6))


def test_a_users_function_checks_nothing(problems: ProblemSource) -> None:
    pool = Pool("1")
    pool.knows_references = False
    assert check(problems, pool) == "" and not pool.asked


def test_bad_references_stop_the_run_with_a_table_and_one_line(
    problems: ProblemSource,
) -> None:
    said: list[str] = []
    with pytest.raises(PapoError) as caught:
        references.check(problems, Pool("1", "4"), "error", said.append)
    table = said[-1].splitlines()
    assert table[0].split() == ["problem", "prompt", "reference", "answer", "why"]
    uids = everything(problems)
    rows = sorted((uids[a], [str(uids[a]), "say", a, a, "why", "not"]) for a in ("1", "4"))
    assert [line.split() for line in table[1:]] == [row for _, row in rows]
    told = str(caught.value)
    assert "\n" not in told and told.startswith("2 of 6 reference answers would not score 1")
    for advice in ("data.answer_pattern", "reward.extract", "reward.on_bad_reference=drop"):
        assert advice in told


def test_dropped_problems_are_neither_trained_on_nor_evaluated(problems: ProblemSource) -> None:
    uids = everything(problems)
    held_out = problems.held_out()[0].answer
    trained = problems.batch(0, 1)[0].answer
    said = check(problems, Pool(held_out, trained), "drop")
    assert "2 of 6 reference answers dropped with their problems" in said
    left = everything(problems)
    assert left == {a: uid for a, uid in uids.items() if a not in (held_out, trained)}
    assert (len(problems), len(problems.held_out())) == (3, 1)
    assert {p.answer for p in problems.batch(0, 12)} == set(left) - {problems.held_out()[0].answer}


def test_dropping_all_training_problems_is_one_line(problems: ProblemSource) -> None:
    with pytest.raises(PapoError, match="all training problems are among the 6"):
        check(problems, Pool(*"012345"), "drop")


def test_dropping_all_held_out_problems_is_one_line(problems: ProblemSource) -> None:
    """An accuracy of nothing would be shown as a figure."""
    with pytest.raises(PapoError, match="all held-out problems are among the 2"):
        check(problems, Pool(*(p.answer for p in problems.held_out())), "drop")


def test_dropping_changes_the_fingerprint_that_a_checkpoint_keeps(problems: ProblemSource) -> None:
    before = problems.fingerprint
    check(problems, Pool(problems.batch(0, 1)[0].answer), "drop")
    assert problems.fingerprint != before


def test_kept_problems_are_listed_and_stay(problems: ProblemSource) -> None:
    assert "why not" in check(problems, Pool("1"), "keep")
    assert len(everything(problems)) == 6


def test_a_long_table_ends_and_long_texts_are_cut(problems: ProblemSource) -> None:
    bad = [BadReference(i, "x" * 200 + "\n9", "why") for i in range(50)]
    lines = references.table(bad, []).splitlines()
    assert len(lines) == 22 and lines[-1] == "and 30 more"
    assert max(map(len, lines)) < 100 and "x...x" in lines[1] and lines[1].split()[1].endswith("9")


def test_ranks_share_the_work_and_all_of_them_stop(
    problems: ProblemSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 finds nothing itself."""
    whole = problems.without_tokens()
    first = BadReference(whole[0].uid, whole[0].answer, "why not")
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    monkeypatch.setattr(collectives, "raise_together", lambda failure: None)
    monkeypatch.setattr(collectives, "gather_lists", lambda bad: [first, *bad])
    pool = Pool(first.answer)
    with pytest.raises(PapoError, match="1 of 6"):
        references.check(problems, pool, "error", lambda line: None)
    assert pool.asked == [p.uid for p in whole[1::2]]
