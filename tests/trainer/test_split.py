"""Which problems are the same, what of them is dropped, and on which side of the split they are."""

from __future__ import annotations

import logging

import pytest

from papo.data.problems import ProblemSource
from papo.errors import PapoError
from tests.trainer.problems import jsonl, kept, lines, numbered, text
from tests.trainer.tiny import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_jsonl_split_is_disjoint_and_ignores_the_order_of_lines(tokenizer, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = ProblemSource(jsonl(tmp_path / "a", *numbered(30), held_out_size=10), tokenizer, seed=0)
    b = ProblemSource(
        jsonl(tmp_path / "b", *numbered(30)[::-1], held_out_size=10), tokenizer, seed=0
    )
    assert [text(p) for p in a.held_out()] == [text(p) for p in b.held_out()]
    assert not {text(p) for p in a.held_out()} & {text(p) for p in a.batch(0, 20)}
    assert len(a) == 20


@pytest.mark.parametrize(
    "prompts",
    [
        ("Simplify $x²$.", "Simplify $x2$."),
        ("Is A the same as a?", "is a the same as A?"),
        ("Turn it by 90 degrees:\n1 2\n3 4", "Turn it by 90 degrees:\n1 2 3 4"),
        ("What is it?", "What  is it?", "What is it? "),
        ("café", "cafe\u0301"),
    ],
    ids=["superscript", "case", "newlines in a grid", "white space", "composition"],
)
def test_only_equal_prompts_are_equal(tokenizer, tmp_path, prompts):
    records = [{"prompt": p, "answer": str(i)} for i, p in enumerate(prompts)]
    source = ProblemSource(jsonl(tmp_path, *records, held_out_size=0), tokenizer, seed=0)
    assert sorted(p.answer for p in kept(source)) == [r["answer"] for r in records]
    assert source.dropped_equal == source.other_answers == 0


def test_same_user_text_under_another_system_message_is_another_problem(tokenizer, tmp_path):
    user = {"role": "user", "content": "Which day is it?"}
    records = [
        {"messages": [{"role": "system", "content": f"Answer in {language}."}, user], "answer": day}
        for language, day in (("English", "Monday"), ("German", "Montag"), ("French", "lundi"))
    ]
    source = ProblemSource(jsonl(tmp_path, *records), tokenizer, seed=0)
    assert sorted(p.answer for p in kept(source)) == ["Monday", "Montag", "lundi"]


def test_equal_rows_are_dropped_and_counted_on_the_screen(tokenizer, tmp_path, caplog):
    records = [*numbered(4), *numbered(3), {"prompt": "What is 0 + 1?", "answer": 1, "level": 2}]
    with caplog.at_level(logging.INFO, logger="papo.data"):
        source = ProblemSource(jsonl(tmp_path, *records), tokenizer, seed=0)
    assert source.dropped_equal == 3
    assert sorted(p.answer for p in kept(source)) == ["1", "1", "2", "3", "4"]
    assert "train.jsonl': 3 rows that equal an earlier one dropped" in caplog.text
    assert f"problems: {len(source)} to train on, {len(source.held_out())} held out" in caplog.text


def test_one_prompt_with_two_answers_is_kept_said_and_never_split(tokenizer, tmp_path, caplog):
    """As 26 rows of college_math, whose questions miss the figure that tells them apart."""
    records = [
        {"prompt": f"Find the angles of triangle {i}.", "answer": answer, "id": f"{i}{answer}"}
        for i in range(6)
        for answer in ("25,100,55", "36,36,108")
    ]
    for size in range(2, 11):
        caplog.clear()
        config = jsonl(tmp_path, *records, held_out_size=size)
        with caplog.at_level(logging.WARNING, logger="papo.data"):
            source = ProblemSource(config, tokenizer, seed=0)
        held_out, train = source.held_out(), source.batch(0, len(source))
        assert len(held_out) == size // 2 * 2 and len(held_out) + len(train) == 12
        assert not {text(p) for p in held_out} & {text(p) for p in train}
        assert source.other_answers == 6 and source.dropped_equal == 0
    assert (
        "6 rows repeat a prompt with another answer, all are kept; the first is "
        "'Find the angles of triangle 0.': '25,100,55' and '36,36,108'"
    ) in caplog.text


def test_prompts_of_too_many_rows_to_hold_any_out_are_refused(tokenizer, tmp_path):
    """An evaluation of no problem would show an accuracy of 0."""
    records = [{"prompt": f"p{i}", "answer": a} for i in range(6) for a in "abcde"]
    with pytest.raises(PapoError, match=r"data.held_out_size=3: every prompt of .* has more rows"):
        ProblemSource(jsonl(tmp_path, *records, held_out_size=3), tokenizer, seed=0)


def test_rows_that_share_the_answer_but_not_its_solution_are_two(tokenizer, tmp_path):
    records = [{"prompt": "a", "answer": f"{way} #### 4"} for way in ("2+2", "2*2")]
    options = {"answer_pattern": "#### (.*)", "held_out_size": 0}
    source = ProblemSource(jsonl(tmp_path, *records, **options), tokenizer, seed=0)
    assert (len(source), source.dropped_equal, source.other_answers) == (2, 0, 0)


def test_rows_that_differ_in_a_tool_call_alone_are_two(tokenizer, tmp_path):
    records = [
        {
            "prompt": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": None, "tool_calls": [{"arguments": number}]},
                {"role": "tool", "content": "4", "name": "sum"},
                {"role": "user", "content": "So?"},
            ],
            "answer": "4",
        }
        for number in (1, 2)
    ]
    source = ProblemSource(jsonl(tmp_path, *records, held_out_size=0), tokenizer, seed=0)
    assert len(source) == 2
    assert [m["tool_calls"][0]["arguments"] for p in kept(source) for m in p.messages[1:2]] in (
        [1, 2],
        [2, 1],
    )
    assert kept(source)[0].messages[2] == {"role": "tool", "content": "4", "name": "sum"}


def test_options_of_the_prompt_do_not_change_the_split(tokenizer, tmp_path):
    """So that runs with other instructions share the held-out problems."""
    options = ({}, {"prompt_suffix": " Think."}, {"system_prompt": "Be brief."})
    answers = [
        [p.answer for p in ProblemSource(config, tokenizer, seed=0).held_out()]
        for config in (jsonl(tmp_path, *numbered(30), held_out_size=10, **o) for o in options)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_system_prompt_that_a_row_brings_itself_is_the_same_prompt(tokenizer, tmp_path):
    """Same tokens, hence never on both sides of the split."""
    user = {"role": "user", "content": "Q"}
    own = [{"role": "system", "content": "Be brief."}, user]
    records = [{"messages": own, "answer": "x"}, {"prompt": "Q", "answer": "x"}, *numbered(3)]
    config = jsonl(tmp_path, *records, system_prompt="Be brief.")
    source = ProblemSource(config, tokenizer, seed=0)
    assert source.dropped_equal == 1 and len(kept(source)) == 4


@pytest.mark.parametrize("size", [0, 3, 5, 9])
def test_held_out_size_limits_the_eval_file(tokenizer, tmp_path, size):
    """The same ones in every order of the lines; the others are not trained on either."""
    chosen = []
    for order in (1, -1):
        held_out = lines(tmp_path / "eval.jsonl", *numbered(5)[::order])
        config = jsonl(tmp_path, *numbered(12), eval_path=held_out, held_out_size=size)
        source = ProblemSource(config, tokenizer, seed=0)
        trained = {p.answer for p in source.batch(0, len(source))}
        assert source.dropped_held_out == 5 and trained == {str(i + 1) for i in range(5, 12)}
        chosen.append({p.answer for p in source.held_out()})
    assert chosen[0] == chosen[1] and len(chosen[0]) == min(size, 5)


def test_jsonl_eval_file_is_never_trained_on(tokenizer, tmp_path, caplog):
    held_out = lines(tmp_path / "eval.jsonl", *numbered(5))
    with caplog.at_level(logging.WARNING, logger="papo.data"):
        source = ProblemSource(
            jsonl(tmp_path, *numbered(12), eval_path=held_out, held_out_size=None),
            tokenizer,
            seed=0,
        )
    assert len(source.held_out()) == 5 and len(source) == 7
    assert not {text(p) for p in source.held_out()} & {text(p) for p in source.batch(0, 7)}
    assert "5 training problems are also in" in caplog.text
