"""Rewards: extraction, verifiers, and a pool that nothing a verifier does can stop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from papo.errors import PapoError
from papo.reward import judge, verifiers, workers
from papo.reward.functions import load_verifier
from papo.reward.judge import Judge, Task, Verdict
from papo.reward.pool import RewardPool
from papo.reward.processes import family
from papo.types import Completion, Problem

ROOT = Path(__file__).resolve().parents[2]


def config(**changes):
    values = {"workers": 2, "timeout_s": 20.0, "extract": "none", "threshold": 0.99}
    limits = {"memory_mib": 4096, "weights": None}
    return SimpleNamespace(**{**values, **limits, **changes})


def completion(text, answer="1", **metadata):
    return Completion(Problem(0, (), answer, metadata, (1,)), (1,), (0.0,), False, text)


def outcome(rewards):
    return [(r.value, r.status) for r in rewards]


SCRIPTED = "tests.trainer.scripted:scripted"
EQUALS = "tests.trainer.scripted:equals"


# Verifiers


def verdict(text, answer="1", *, verifier="exact", how="none", threshold=0.99, **metadata):
    value, status, _ = Judge(verifier, how, threshold).verdict(Task(text, answer, metadata))
    return value, status


def chain_sum():
    """Metadata as papo.data makes it."""
    import reasoning_gym

    params = {"max_terms": 3}
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=3, **params)[0]
    return {"dataset": "chain_sum", "params": params, "entry": entry}


def test_reasoning_gym_scores_the_extracted_answer():
    metadata = chain_sum()
    answer = metadata["entry"]["answer"]
    rule = {"verifier": "reasoning_gym", "how": "last_number", **metadata}
    assert verdict(f"I say {answer}", answer, **rule) == (1.0, "ok")
    assert verdict(f"I say {int(answer) + 1}", answer, **rule) == (0.0, "ok")


def test_reasoning_gyms_own_answer_is_held_against_its_own_scorer():
    """With the extraction that the completions get; where many answers are right it has none."""
    task = Task(None, "x", chain_sum())
    task = task._replace(answer=task.metadata["entry"]["answer"])
    for how in ("last_number", "boxed", "last_line", "none"):
        assert Judge("reasoning_gym", how, 0.99).verdict(task) == (1.0, "ok", "")
    backward = {"dataset": "spell_backward", "params": {}, "entry": {"answer": "abc"}}
    no_number = Judge("reasoning_gym", "last_number", 0.99).verdict(Task(None, "abc", backward))
    assert no_number == (0.0, "ok", "reward.extract=last_number finds nothing in it")
    open_ended = {**backward, "entry": {"answer": None}}
    assert Judge("reasoning_gym", "none", 0.99).verdict(Task(None, "", open_ended)).value == 1.0


def test_reasoning_gym_partial_credit_is_cut_at_the_threshold():
    metadata = {"dataset": "spell_backward", "params": {}, "entry": {"answer": "abc"}}
    rule = {"verifier": "reasoning_gym", **metadata}
    partial = verifiers._score_reasoning_gym("abd", "abc", metadata)
    assert 0.0 < partial < 0.99
    assert verdict("abd", "abc", **rule) == (0.0, "ok")
    assert verdict("abd", "abc", threshold=partial / 2, **rule) == (1.0, "ok")


@pytest.mark.parametrize(
    ("text", "how", "answer", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", "boxed", "0.5", 1.0),
        (r"so \boxed{\frac{1}{2}}", "boxed", r"$\frac{2}{4}$", 1.0),
        (r"so \boxed{\frac{1}{2}}", "boxed", r"\boxed{\frac{2}{4}}", 1.0),
        (r"so \boxed{\frac{1}{3}}", "boxed", "0.5", 0.0),
        (r"we get $x = 2\sqrt{2}$", "none", r"\sqrt{8}", 1.0),
        ("the answer is 12", "last_number", "12", 1.0),
        ("the answer is 13", "last_number", "12", 0.0),
    ],
)
def test_math_verify(text, how, answer, expected):
    assert verdict(text, answer, verifier="math_verify", how=how) == (expected, "ok")


def test_math_verify_works_off_the_main_thread():
    """math_verify's own SIGALRM timeouts would score 0 here."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(verdict("$2$", "2", verifier="math_verify"))
    )
    thread.start()
    thread.join()
    assert found == [(1.0, "ok")]


def test_exact():
    assert verdict(" yes ", "yes") == (1.0, "ok")
    assert verdict("yes.", "yes") == (0.0, "ok")
    assert verdict("no number", "1", how="last_number") == (0.0, "ok")


def test_users_function_is_not_thresholded():
    assert verdict("x", verifier=SCRIPTED, value=-0.25) == (-0.25, "ok")


@pytest.mark.parametrize("text", ["none", "nan", "inf", "huge"])
def test_no_verdict_is_a_masked_row(text):
    """What float32 cannot hold is an infinity to the advantages."""
    value, status = verdict(text, verifier=SCRIPTED)
    assert math.isnan(value)
    assert status == "invalid"


def test_nan_from_a_built_in_verifier_is_a_masked_row(monkeypatch):
    monkeypatch.setitem(verifiers.BUILT_IN, "exact", lambda text, answer, metadata: math.nan)
    load_verifier.cache_clear()
    value, status = verdict("x")
    load_verifier.cache_clear()
    assert math.isnan(value)
    assert status == "invalid"


@pytest.mark.parametrize("text", ["raise", "cancel", "leave", "not a number"])
def test_exception_scores_zero(text):
    assert verdict(text, verifier=SCRIPTED) == (0.0, "error")


@pytest.mark.parametrize(
    ("name", "mentions"),
    [
        ("exakt", "exact"),
        ("no_such_module:f", "no_such_module"),
        ("math:no_such_function", "no_such_function"),
        ("math:pi", "float"),
        (":f", "package.module:function"),
    ],
)
def test_unknown_verifier_is_one_line(name, mentions):
    with pytest.raises(PapoError, match=mentions) as caught:
        load_verifier(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


# The pool


@pytest.fixture(scope="module")
def pool():
    with RewardPool(config(), [SCRIPTED]) as shared:
        yield shared


@pytest.fixture(scope="module")
def both():
    """Two verifiers, the second of which counts half."""
    with RewardPool(config(weights=[1.0, 0.5]), [SCRIPTED, "exact"]) as shared:
        yield shared


def test_rewards_keep_the_order_of_the_completions(pool):
    batch = [completion("x", value=float(i)) for i in range(64)]
    assert outcome(pool.score(batch)) == [(float(i), "ok") for i in range(64)]


def test_empty_batch(pool):
    assert pool.score([]) == []


def test_failures_cost_only_their_own_completion(pool, caplog):
    before = pool.counts.copy()
    texts = ["x", "raise", "die", "none", "leave", "x"]
    with caplog.at_level(logging.WARNING, logger="papo.reward"):
        rewards = pool.score([completion(t, answer="forty", value=1.0) for t in texts])
    assert [r.status for r in rewards] == ["ok", "error", "error", "invalid", "error", "ok"]
    assert [r.value for r in rewards if r.status != "invalid"] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert math.isnan(rewards[3].value)
    assert pool.counts - before == {"ok": 2, "error": 3, "invalid": 1}
    assert "NeedsTwoArguments" in caplog.text
    assert "exit code 7" in caplog.text
    assert "'forty'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="papo.reward"):
        pool.score([completion("raise") for _ in range(5)])
    assert [r.message for r in caplog.records] == ["rewards not scored normally: 5 more error"]


def references(*answers):
    return [Problem(i, (), answer, {"value": 1.0}, (1,)) for i, answer in enumerate(answers)]


def test_bad_references_come_with_their_reasons(pool, monkeypatch):
    """In the workers, where what a reference makes of its verifier ends nothing but its own task.
    They are no completions: they are in no count."""
    monkeypatch.setattr(Judge, "is_built_in", True)
    before = pool.counts.copy()
    bad = pool.bad_references(references("x", "raise", "die", "none", "x"))
    assert [(b.uid, b.answer) for b in bad] == [(1, "raise"), (2, "die"), (3, "none")]
    assert ["NeedsTwoArguments" in bad[0].why, "exit code 7" in bad[1].why] == [True, True]
    assert pool.counts == before


def test_a_reference_is_compared_with_something_else_too(monkeypatch):
    """One that sympy cannot evaluate equals its own text at once and hangs on all others."""
    compared = []
    monkeypatch.setattr(judge, "compare_math", compared.append)
    assert Judge("math_verify", "none", 0.99).verdict(Task(None, "4", {})).value == 1.0
    assert compared == ["4"]


def test_equal_references_are_read_once(pool, monkeypatch):
    """By a verifier that compares texts; reasoning-gym's has an entry for every problem."""
    asked = []

    def answered(tasks, seconds):
        asked.append(len(tasks))
        return {key: Verdict(float(t.answer == "5"), "ok") for key, (_, t) in tasks.items()}

    monkeypatch.setattr(pool._workers, "run", answered)
    for name in ("exact", "reasoning_gym"):
        monkeypatch.setattr(pool, "_judges", [replace(pool._judges[0], verifier=name)])
        bad = pool.bad_references(references("5", "x", "5", "x"))
        assert [(b.uid, b.answer) for b in bad] == [(1, "x"), (3, "x")]
    assert asked == [2, 4]


def test_only_built_in_verifiers_are_asked_about_references(pool, both):
    assert not pool.knows_references and pool.bad_references(references("raise")) == []
    assert both.knows_references
    (bad,) = both.bad_references(references("die", "1", ""))
    assert (bad.uid, bad.why) == (2, "it is empty")


def test_a_users_function_gets_the_thinking_too_unless_it_asks_for_a_part():
    text = "<think> 4 </think> 5"
    for how, seen in (("none", text), ("last_line", "5"), ("last_number", "5")):
        assert verdict(text, verifier=EQUALS, how=how, seen=seen) == (
            1.0,
            "ok",
        )
    assert verdict(" 1,234 ", verifier=EQUALS, seen="1,234") == (1.0, "ok")


def test_a_prompt_that_opens_the_thinking_is_known_to_the_workers(both, monkeypatch):
    batch = [completion("1"), completion("2</think>1"), completion("1</think>2")]
    for thinks, expected in ((False, [1.0, 1.0, 0.0]), (True, [0.0, 1.0, 0.0])):
        monkeypatch.setattr(both, "thinks", thinks)
        assert [r.parts["exact"] for r in both.score(batch)] == expected


def test_the_reward_is_the_weighted_sum_of_what_is_a_number(both):
    """A verifier that fails counts 0 and costs the other's value nothing; one that returns None is
    left out."""
    before = both.counts.copy()
    texts = ["x", "1", "none", "raise", "die", "huge"]
    rewards = both.score([completion(t, answer="1", value=2.0) for t in texts[:2]])
    assert outcome(rewards) == [(2.0, "ok"), (2.5, "ok")]
    assert rewards[1].parts == {SCRIPTED: 2.0, "exact": 1.0}
    rewards = both.score([completion(t, answer=t) for t in texts[2:]])
    assert outcome(rewards) == [(0.5, "ok"), (0.5, "error"), (0.5, "error"), (0.5, "ok")]
    assert math.isnan(rewards[0].parts[SCRIPTED]) and rewards[1].parts[SCRIPTED] == 0.0
    assert both.counts - before == {"ok": 8, "error": 2, "invalid": 2}


def test_unpicklable_metadata_is_an_error(pool):
    rewards = pool.score([completion("x", value=lambda: 0), completion("x", value=1.0)])
    assert outcome(rewards) == [(0.0, "error"), (1.0, "ok")]


def test_works_off_the_main_thread(pool):
    found = []
    thread = threading.Thread(target=lambda: found.extend(pool.score([completion("x", value=1.0)])))
    thread.start()
    thread.join()
    assert outcome(found) == [(1.0, "ok")]


def test_workers_do_not_import_torch(pool):
    assert outcome(pool.score([completion("is torch loaded")] * 4)) == [(0.0, "ok")] * 4


@pytest.mark.parametrize(
    "imports",
    ["import papo.reward.pool", "import papo.reward.worker"],
)
def test_what_workers_import_does_not_import_torch(imports):
    code = f"import sys; {imports}; assert 'papo' in sys.modules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_hung_verifiers_are_killed_and_leave_every_worker_alive(tmp_path, monkeypatch):
    """More hung verifiers than workers, some stuck in C code."""
    rules = config(timeout_s=0.3)
    with RewardPool(rules, [SCRIPTED]) as pool:
        rewards = pool.score([completion(t) for t in ("hang", "hang in C", "hang", "hang in C")])
        assert outcome(rewards) == [(0.0, "timeout")] * 4
        assert pool.counts == {"timeout": 4}
        monkeypatch.setattr(Judge, "is_built_in", True)
        (bad,) = pool.bad_references(references("hang", "x"))
        assert (bad.uid, bad.why) == (0, "no verdict within 0.3 s")
        rules.timeout_s = 20.0
        a, b = tmp_path / "a", tmp_path / "b"
        rewards = pool.score([completion(f"meet {a} {b}"), completion(f"meet {b} {a}")])
        assert outcome(rewards) == [(1.0, "ok")] * 2


def members(pool):
    """The processes of a pool's workers."""
    return [pid for worker in pool._workers._workers for pid in family(worker._marker)]


def test_killed_idle_worker_is_replaced(pool):
    pool.score([completion("x")] * 4)
    for pid in members(pool):
        with contextlib.suppress(ProcessLookupError):  # one's end is the end of the others
            os.kill(pid, signal.SIGKILL)
    assert outcome(pool.score([completion("x", value=1.0)] * 3)) == [(1.0, "ok")] * 3


def test_workers_that_cannot_start_stop_the_run(monkeypatch):
    monkeypatch.setattr(workers, "_MAIN", "raise SystemExit(3)")
    with RewardPool(config(workers=1), ["exact"]) as pool, pytest.raises(PapoError) as caught:
        pool.score([completion("x")])
    assert "failed to start 3 times in a row: the worker died with exit code 3" in str(caught.value)
