"""In which ways users' reward functions may be called, and what is made of what they return."""

from __future__ import annotations

import asyncio
import math
import re
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from papo.config import DataConfig
from papo.data.problems import ProblemSource
from papo.errors import PapoError
from papo.record.completions import completion_rows
from papo.record.jsonl import read_rows
from papo.record.metrics import MetricsWriter
from papo.record.telemetry import rollout_metrics
from papo.reward.functions import load_verifier
from papo.reward.judge import Judge, Task
from papo.reward.pool import RewardPool
from papo.types import Completion
from tests.trainer.test_metrics import scored
from tests.trainer.test_reward import config
from tests.trainer.tiny import build_tokenizer

MESSAGES = [{"role": "user", "content": "2 + 2?"}]
ROW = {"level": 3, "data_source": "sums", "extra_info": {"index": 7}}
TEXT = Task("it is 4", "4", ROW, False, "2 + 2?", (5, 6), "solution")


@pytest.fixture
def judged(monkeypatch):
    """``judged(function, task)``: the verdict of a module's `f`."""
    module = ModuleType("users_module")
    monkeypatch.setitem(sys.modules, "users_module", module)

    def verdict(function, task=TEXT):
        load_verifier.cache_clear()
        module.f = function
        return Judge("users_module:f", "none", 0.99).verdict(task)

    yield verdict
    load_verifier.cache_clear()


def test_a_plain_function_gets_text_answer_and_metadata(judged):
    seen = []
    judged(lambda a, b, c, d=0: seen.append((a, b, c, d)))
    assert seen == [("it is 4", "4", ROW, 0)]


def test_completions_ask_for_lists_as_trl_passes_them(judged):
    seen = []

    def trl(prompts, completions, solution, **kwargs):
        seen.append((prompts, completions, solution, kwargs))
        return [0.25]

    assert judged(trl)[:2] == (0.25, "ok")
    others = {name: [value] for name, value in ROW.items()} | {"completion_ids": [[5, 6]]}
    ((*given, more),) = seen
    assert given == [["2 + 2?"], ["it is 4"], ["4"]]
    assert all(more.pop(name)("a", 1.0) is None for name in ("log_extra", "log_metric"))
    assert more == others
    assert judged(lambda completions, level: [float(level[0])])[:2] == (3.0, "ok")


def test_rows_of_messages_give_messages(judged):
    seen = []

    def trl(prompts, completions):
        seen.append((prompts, completions))
        return [None]

    value, status, _ = judged(trl, TEXT._replace(prompt=MESSAGES))
    assert math.isnan(value) and status == "invalid"
    assert seen == [([MESSAGES], [[{"role": "assistant", "content": "it is 4"}]])]


def test_solution_str_and_ground_truth_are_passed_as_in_verl(judged):
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return {"score": 0.5, "acc": True}

    assert judged(compute_score)[:2] == (0.5, "ok")
    judged(compute_score, TEXT._replace(metadata={"level": 3}))
    assert seen[0] == ("sums", "it is 4", "4", {"index": 7})
    assert seen[1] == ("", "it is 4", "4", {"level": 3})


def test_coroutines_are_run(judged):
    async def plain(text, answer, metadata):
        await asyncio.sleep(0)
        return 0.5

    async def trl(completions, **kwargs):
        await asyncio.sleep(0)
        return [0.5]

    assert judged(plain)[:2] == judged(trl)[:2] == (0.5, "ok")


def test_coroutines_share_a_loop_as_the_connections_that_they_keep_ask(judged):
    loops = []

    async def plain(text, answer, metadata):
        loops.append(asyncio.get_running_loop())
        return 0.5

    assert judged(plain)[:2] == judged(plain)[:2] == (0.5, "ok")
    assert loops[0] is loops[1]


def test_the_documents_examples_score_a_row_whose_prompt_is_text(judged):
    page = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        names = {}
        exec(example, names)
        (function,) = (value for name, value in names.items() if name != "__builtins__")
        verdict = judged(function, TEXT._replace(answer_field="answer"))
        assert verdict.status == "ok" and verdict.value > 0.9, example


@pytest.mark.parametrize(
    "error",
    [ValueError("a\x1b[2J\u202e\nb"), ValueError("\ud800"), ValueError(r"\frac 'x'"), ValueError()],
)
def test_an_exceptions_text_is_one_printable_line(judged, error):
    def raises(text, answer, metadata):
        raise error

    why = judged(raises).why
    assert why.isprintable() and why.encode() and why.startswith("ValueError")
    if "frac" in str(error):
        assert why == r"ValueError: \frac 'x'"  # as it was written


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda completions, topic: [1.0], "it needs topic, and the row has level, data_source"),
        (lambda completions: 1.0, "expected a list of one number or None"),
        (lambda completions: [1.0, 1.0], "expected a list of one number or None"),
        (lambda solution_str, ground_truth: {}, "KeyError"),
        (lambda **kwargs: [1.0], r"its parameters are \(kwargs\)"),
        (lambda text: 1.0, r"its parameters are \(text\): expected \(text, answer, metadata\), or"),
        (lambda text, answer, metadata, *, more: 1.0, r"\(text, answer, metadata, more\)"),
        (lambda text, answer, metadata: "1", "the verifier returned str, expected a number"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_why(judged, function, why):
    verdict = judged(function)
    assert verdict[:2] == (0.0, "error")
    assert re.search(why, verdict.why)


@pytest.mark.parametrize(
    "value",
    [
        *(True, 1, 1.0, Decimal("1"), Fraction(2, 2), np.float32(1), np.int64(1), np.bool_(True)),
        *(np.ones(()), torch.ones(()), torch.ones(1), torch.tensor(True)),
    ],
)
def test_whatever_is_a_number_is_a_reward(judged, value):
    verdict = judged(lambda text, answer, metadata: value)
    assert verdict == (1.0, "ok", "") and type(verdict.value) is float


def test_a_function_that_fits_no_way_is_refused():
    with pytest.raises(PapoError) as caught:
        load_verifier("os.path:basename")
    assert "reward.verifier='os.path:basename': its parameters are (p): expected" in str(
        caught.value
    )


def test_a_function_without_a_signature_is_called_plainly(judged):
    assert judged(max).status == "error"  # text and a dict do not compare, which it says itself


def test_the_workers_get_rows_as_their_prompts_were(tmp_path):
    """From a file's rows to what a function sees."""
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "say 1", "solution": 1}\n'
        '{"prompt": [{"role": "user", "content": "say 2"}], "solution": 2}\n'
    )
    data = DataConfig(
        source="jsonl", train_path=str(path), answer_field="solution", held_out_size=0
    )
    problems = ProblemSource(data, build_tokenizer(), seed=0).batch(0, 2)
    with RewardPool(config(workers=1), ["tests.trainer.scripted:trl"], "solution") as pool:
        rewards = pool.score([Completion(p, (7,), (0.0,), False, p.answer) for p in problems])
    assert [(r.value, r.status) for r in rewards] == [(1.0, "ok")] * 2


def test_each_of_several_verifiers_has_a_mean_and_its_values_in_the_rows(tmp_path: Path) -> None:
    (group,) = scored([[1.0, 2.0]])
    parts = [{"exact": 1.0, "a:f": math.nan}, {"exact": 0.0, "a:f": math.nan}]
    rewards = tuple(replace(r, parts=p) for r, p in zip(group.rewards, parts, strict=True))
    figures = rollout_metrics([replace(group, rewards=rewards)], 1, 1.0)
    assert figures["reward/mean/exact"] == 0.5 and math.isnan(figures["reward/mean/a:f"])
    rows = completion_rows([replace(group, rewards=rewards)])
    assert [r["rewards"] for r in rows] == [
        {"exact": 1.0, "a:f": None},
        {"exact": 0.0, "a:f": None},
    ]
    writer = MetricsWriter(tmp_path, tensorboard=True, enabled=True)
    writer.write(1, figures)
    writer.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["reward/mean/exact"] == 0.5 and row["reward/mean/a:f"] is None
    alone = tuple(replace(r, parts={"exact": r.value}) for r in group.rewards)
    assert rollout_metrics([replace(group, rewards=alone)], 1, 1.0).keys() == (
        figures.keys() - {"reward/mean/exact", "reward/mean/a:f"}
    )
