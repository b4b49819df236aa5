"""Problems: generated and read, disjoint splits, the chat template, and an order that is a function
of the cursor.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.config import load_config
from papo.config.data_options import DataConfig
from papo.data.problems import ProblemSource
from papo.errors import PapoError
from tests.trainer.problems import jsonl, lines, numbered, text
from tests.trainer.tiny import build_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def sums(**options) -> DataConfig:
    return DataConfig(
        **{"source": "reasoning_gym", "dataset": "chain_sum", "params": ONE_DIGIT, **options}
    )


@pytest.mark.parametrize("split_seed", [0, 1, 2])
def test_train_and_held_out_share_no_text_in_a_tiny_space(tokenizer, split_seed):
    """Sums and differences of two digits: 200 problems in all."""
    source = ProblemSource(sums(split_seed=split_seed, train_size=5000), tokenizer, seed=0)
    train = source.batch(0, len(source))
    held_out = source.held_out()
    assert len(held_out) == 64 and len(train) == 136
    texts = [text(p) for p in (*train, *held_out)]
    assert len(set(texts)) == len(texts)
    assert {p.uid for p in train} | {p.uid for p in held_out} == set(range(200))


def test_split_depends_on_its_own_seed_alone(tokenizer):
    a = ProblemSource(sums(), tokenizer, seed=0)
    b = ProblemSource(sums(), tokenizer, seed=1)
    assert a.held_out() == b.held_out()
    assert [p.uid for p in a.batch(0, 136)] != [p.uid for p in b.batch(0, 136)]
    assert ProblemSource(sums(split_seed=1), tokenizer, seed=0).held_out() != a.held_out()


def test_held_out_does_not_depend_on_train_size(tokenizer):
    small = ProblemSource(sums(train_size=10), tokenizer, seed=0)
    assert len(small) == 10
    assert small.held_out() == ProblemSource(sums(), tokenizer, seed=0).held_out()


def test_each_epoch_has_every_problem_once_in_a_new_order(tokenizer):
    source = ProblemSource(sums(train_size=20), tokenizer, seed=0)
    first, second = ([p.uid for p in source.batch(start, 20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == sorted(set(first))
    assert first != second


@pytest.fixture(scope="module")
def untouched(tokenizer) -> ProblemSource:
    """Never asked for a batch: a copy of it is a source that has just been made."""
    return ProblemSource(sums(train_size=13), tokenizer, seed=5)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 17), min_size=1, max_size=8))
def test_order_depends_on_the_cursor_alone(untouched, cuts):
    """However a run was cut into batches and resumed, position k is the same problem."""
    whole = [p.uid for p in copy.copy(untouched).batch(0, sum(cuts))]
    source, cursor, pieces = copy.copy(untouched), 0, []
    for n in cuts:
        pieces += [p.uid for p in source.batch(cursor, n)]
        cursor += n
    assert pieces == whole
    resumed = copy.copy(untouched).batch(cursor - cuts[-1], cuts[-1])
    assert [p.uid for p in resumed] == whole[-cuts[-1] :]


def test_prompt_ids_are_the_chat_template_with_generation_prompt(tokenizer):
    config = sums(system_prompt="Be brief.", prompt_suffix=" Only the number.")
    problem = ProblemSource(config, tokenizer, seed=0).batch(0, 1)[0]
    question = problem.metadata["entry"]["question"]
    assert problem.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question + " Only the number."},
    )
    assert tokenizer.decode(problem.prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{question} Only the number.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_real_chat_template(smollm2_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    problem = ProblemSource(sums(train_size=1), tokenizer, seed=0).batch(0, 1)[0]
    assert tokenizer.decode(problem.prompt_ids).endswith(
        f"<|im_start|>user\n{problem.messages[-1]['content']}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokenizer_without_chat_template_gives_plain_text(caplog):
    plain = build_tokenizer(chat_template=None)
    with caplog.at_level(logging.WARNING, logger="papo.data"):
        problem = ProblemSource(sums(train_size=1), plain, seed=0).batch(0, 1)[0]
    assert plain.decode(problem.prompt_ids) == problem.messages[0]["content"]
    assert "no chat template" in caplog.text


def test_failing_chat_template_is_one_line():
    broken = build_tokenizer(chat_template="{{ raise_exception('system role not supported') }}")
    with pytest.raises(PapoError, match=r"chat template failed on .*: system role not supported"):
        ProblemSource(sums(), broken, seed=0)


def test_long_prompts_are_dropped_and_counted(tokenizer, tmp_path, caplog):
    records = [{"prompt": "a" * n, "answer": "x"} for n in (5, 6, 7, 400, 500)]
    with caplog.at_level(logging.WARNING, logger="papo.data"):
        source = ProblemSource(jsonl(tmp_path, *records, max_prompt_tokens=100), tokenizer, seed=0)
    assert source.dropped_long == 2
    assert len(source) + len(source.held_out()) == 3
    assert "2 prompts of more than data.max_prompt_tokens=100 tokens dropped" in caplog.text
    assert all(len(p.prompt_ids) <= 100 for p in source.batch(0, 2))


def test_reasoning_gym_scores_its_own_answer_after_json(tokenizer):
    import reasoning_gym

    for problem in ProblemSource(sums(train_size=20), tokenizer, seed=0).batch(0, 20):
        data = json.loads(json.dumps(problem.metadata))
        dataset = reasoning_gym.create_dataset(data["dataset"], **data["params"])
        assert dataset.score_answer(problem.answer, data["entry"]) == 1.0
        assert dataset.score_answer(problem.answer + "7", data["entry"]) < 0.99


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"dataset": "chainsum"},
            "data.dataset='chainsum': reasoning-gym has no such dataset; did you mean chain_sum",
        ),
        ({"dataset": "zzzzzzzz"}, "known: "),
        (
            {"params": {"max_term": 2}},
            "data.params.max_term=2: chain_sum has no such parameter; known: min_terms",
        ),
        ({"params": {"size": 9}}, "data.params.size=9: set data.train_size instead"),
        ({"params": {"seed": 9}}, "data.params.seed=9: set data.split_seed instead"),
        (
            {"params": {"min_terms": 9, "max_terms": 2}},
            "refused data.params=.*max_terms must be >= min_terms",
        ),
        (
            {"held_out_size": 200},
            "200 distinct problems .*data.held_out_size=200 leaves none to train on",
        ),
        (
            {"max_prompt_tokens": 3},
            "0 distinct problems of at most data.max_prompt_tokens=3 tokens",
        ),
    ],
)
def test_bad_dataset_options_are_one_line(tokenizer, options, expected):
    with pytest.raises(PapoError, match=expected) as caught:
        ProblemSource(sums(**options), tokenizer, seed=0)
    assert "\n" not in str(caught.value)


def test_jsonl_prompt_and_messages(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    config = jsonl(
        tmp_path,
        {"prompt": "What is 1 + 1?", "answer": 2, "level": "easy"},
        "",
        {"messages": chat, "answer": "three"},
        held_out_size=0,
        system_prompt="Be brief.",
        prompt_suffix="!",
    )
    source = ProblemSource(config, tokenizer, seed=0)
    by_answer = {p.answer: p for p in source.batch(0, 2)}
    assert by_answer["2"].messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?!"},
    )
    assert by_answer["2"].metadata == {"level": "easy"}
    # A system message of the problem's own stays.
    assert by_answer["three"].messages == (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q!"},
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object, got list"),
        ({"prompt": "a"}, "line 2: answer is missing: data.answer_field must be one of prompt"),
        ({"prompt": "a", "answer": None}, "line 2: answer=None: expected text or a finite number"),
        ({"prompt": "a", "answer": True}, "line 2: answer=True"),
        ('{"prompt": "a", "answer": NaN}', "line 2: answer=nan"),
        ({"answer": "a"}, r"line 2: expected either prompt or messages, got keys \['answer'\]"),
        (
            {"prompt": "a", "messages": [], "answer": "a"},
            "line 2: expected either prompt or messages",
        ),
        ({"prompt": " \n", "answer": "a"}, r"line 2: prompt=' \\n': .* white space alone"),
        ({"prompt": "\ud83d", "answer": "a"}, "line 2: prompt=.*half of a surrogate pair"),
        (f'{{"prompt": "a", "answer": 1{"0" * 5000}}}', "line 2: not JSON that can be read"),
        ({"messages": [], "answer": "a"}, r"line 2: messages=\[\]: expected text or a list"),
        (
            {"messages": [{"role": "user"}], "answer": "a"},
            "line 2: messages=.*expected text or a list",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "answer": "a"},
            "line 2: messages: the last message's role is 'assistant': expected user",
        ),
    ],
)
def test_bad_line_is_named(tokenizer, tmp_path, line, expected):
    good = {"prompt": "What is it?", "answer": "x"}
    with pytest.raises(PapoError, match=expected) as caught:
        ProblemSource(jsonl(tmp_path, good, line), tokenizer, seed=0)
    assert "train.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_too_small_files(tokenizer, tmp_path):
    config = DataConfig(source="jsonl", train_path=str(tmp_path / "none.jsonl"))
    with pytest.raises(PapoError, match=r"^data\.train_path='.*none\.jsonl': no such file$"):
        ProblemSource(config, tokenizer, seed=0)
    with pytest.raises(PapoError, match=r"3 distinct problems .*leaves none to train on"):
        ProblemSource(jsonl(tmp_path, *numbered(3), held_out_size=3), tokenizer, seed=0)


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        (
            "gsm8k",
            {"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\n#### 1,072"},
            "How many? Think step by step, and end with the answer as a number.",
            "1,072",
        ),
        (
            "mawps",
            {"input": "How many?", "target": 14.0},
            "How many? End with the answer as a number.",
            "14",
        ),
    ],
)
def test_shipped_configs_read_the_real_rows(tokenizer, tmp_path, name, row, prompt, answer):
    """From the path that the user gives."""
    path = lines(tmp_path / "rows.jsonl", row)
    overrides = [f"data.train_path={path}", "data.eval_path=null", "data.held_out_size=0"]
    evaluation = ["evaluation.before=false", "evaluation.after=false"]
    config = load_config(CONFIGS / f"{name}.yaml", [*overrides, *evaluation])
    (problem,) = ProblemSource(config.data, tokenizer, seed=0).batch(0, 1)
    assert problem.messages[-1]["content"] == prompt
    assert problem.answer == answer
