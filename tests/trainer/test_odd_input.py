"""Configs, overrides and rows that nobody would write: each is taken, or refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from papo.config import ConfigError, DataConfig, LossConfig, TrainConfig, load_config
from papo.data.examples import read
from papo.errors import PapoError, printable, shown
from papo.policy.objective import objective_of
from papo_kernels.objective import KL_ESTIMATORS, RATIO_LEVELS, SURROGATES
from tests.trainer.tiny import MINIMAL

LONGEST = 500
BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
ODD = (
    *("\0", "\x1b[2J", "\x85", "\u2028", "\ufeff", "\t", "\n", "\r\n", "\\ud800", '"\\ud800"'),
    *('"\\0"', '"\\UFFFFFFFF"', "!!python/name:os.system ", "!!binary ", "!!set ", "!!int ", "! "),
    *("&a [*a]", "*a", "<<: ", "<<: *a", "? ", "- ", "---\n", "...\n", "%YAML 9.9\n", "=", "~"),
    *(".nan", "-.inf", "1e999", "0o17", "010", "1:30", "2024-01-01", "1_0", "0x", "on", "'", '"'),
    *("[", "]", "{", "}", "{a: ", "[" * 400, "{a: " * 400, "9" * 5000, "#", ",", ": ", "|\n", ">-"),
)


def outcome(call: Callable[[], Any]) -> str:
    """The one line of a refusal, "" for none."""
    try:
        call()
    except PapoError as error:
        line = str(error)
        assert line and line.isprintable() and len(line) <= LONGEST
        return line
    return ""


def mutated(text: str, chance: random.Random) -> bytes:
    """`text` with pieces cut out, doubled and put in, and bytes changed."""
    data = text.encode()
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((0, 1, 1, 5, 40)))
        odd = chance.choice(ODD).encode()
        piece = chance.choice((odd, odd, data[at:end] * 2, b"", bytes([chance.randrange(256)])))
        data = data[:at] + piece + data[end:]
    return data


# ---- configs ------------------------------------------------------------------------------------


def reads_back(path: Path, *overrides: str) -> TrainConfig:
    """A config that is taken can be written and read again, and its loss is one of the kernels'."""
    config = load_config(path, overrides)
    copy = path.with_name("copy.yaml")
    config.dump_yaml(copy)
    assert load_config(copy) == config
    objective_of(config.loss)
    return config


@pytest.mark.parametrize("seed", range(4))
def test_changed_configs_are_taken_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    chance, path, taken = random.Random(seed), tmp_path / "run.yaml", 0
    for _ in range(60):
        path.write_bytes(mutated(MINIMAL, chance))
        taken += not outcome(lambda: reads_back(path))
    assert 0 < taken < 60


def test_changed_overrides_are_taken_or_refused_in_one_line(tmp_path: Path) -> None:
    chance, path, taken = random.Random(0), tmp_path / "run.yaml", 0
    path.write_text(MINIMAL)
    known = ("optim.lr=1e-5", "data.params.x.y=1", "optim.betas=[0.9, 0.95]", "name=a", "steps=3")
    for _ in range(120):
        override = mutated(chance.choice(known), chance).decode("utf-8", "surrogateescape")
        taken += not outcome(lambda o=override: reads_back(path, o))
    assert 0 < taken < 120


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("!!binary aGk=", "line 2: not valid YAML: expected no tag, got '!!binary'"),
        ("!!python/object/apply:os.system [x]", "expected no tag, got '!!python/object/apply"),
        ("!!set {a}", "expected no tag, got '!!set'"),
        ("&a [*a]", "line 2: not valid YAML: an anchor holds itself"),
        ("*a", "found undefined alias 'a'"),
        ("on", "name=True: expected string"),
        (".nan", "name=nan: expected string"),
        ("\tx", "found character '\\t'"),
        ("a\x07", "line 2: not valid YAML: character '\\x07' in it"),
        ('"a\\0b"', "name='a\\x00b': expected a file name"),
        ('"\\ud800"', "name='\\ud800': expected text without half a surrogate pair"),
        ('"\\UFFFFFFFF"', "not valid YAML: "),
        ("[" * 5000, "nested more than 32 deep"),
        ("..", "name='..': expected a file name"),
        ("a/b", "name='a/b': expected a file name"),
        ("x" * 5000, "expected at most 60 characters"),
        ("9" * 5000, "expected at most 60 characters"),
        ("x\n---\na: 1", "expected a single document in the stream but found another document"),
        ("x\n1: 2", "line 3: not valid YAML: key '1': expected text, in quotes"),
        ("x\n? [a]\n: 1", "key 'a sequence': expected text"),
        ('x\n"a\\nb": 2', "a b=2: unknown key"),
        ('x\n"\\ud800": 2', "key '\\ud800': NUL or half a surrogate pair"),
        ("x\n" + BOMB, "not valid YAML: expected at most 10000 values"),
    ],
)
def test_odd_yaml(tmp_path: Path, name: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL.replace("name: test", f"name: {name}"))
    assert expected in outcome(lambda: load_config(path))


@pytest.mark.parametrize("name", ["2024-01-01", "010", "1:30", "=", "'1e5'", "'on'", '"null"'])
def test_text_that_looks_like_something_else_is_read_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL.replace("name: test", f"name: {name}"))
    assert reads_back(path).name == name.strip("'\"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "got an empty document"),
        (b"null", "got an empty document"),
        (MINIMAL.encode("utf-16"), "byte 0xff at 0 is not UTF-8"),
        (b"\xef\xbb\xbf" + MINIMAL.encode(), ""),
        (b"x" * (2 << 20), "expected at most 1024 KiB"),
    ],
    ids=["empty", "null", "UTF-16", "byte-order mark", "large"],
)
def test_odd_files(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert expected in outcome(lambda: load_config(path))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/dev/zero", "is a pipe or a device: expected an ordinary file"),
        ("/", "is a folder: expected a file"),
        ("a\0b", r"--config a\x00b: cannot be read: embedded null byte"),
        ("\udc80x", r"--config \udc80x: cannot be read: no such file"),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_what_is_no_file(path: str, expected: str) -> None:
    assert expected in outcome(lambda: load_config(path))


def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    data = DataConfig(source="jsonl", train_path=str(tmp_path / "pipe"))
    for call in (lambda: load_config(tmp_path / "pipe"), lambda: list(read(data))):
        assert "is a pipe or a device" in outcome(call)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "steps=1" + "0" * 30,
            "steps=1000000000000000000000000000000: expected at most 1000000000",
        ),
        ("steps=" + "1" * 5000, "expected integer"),
        ("steps=.inf", "steps=inf: expected integer"),
        ("seed=18446744073709551616", "seed=18446744073709551616: expected less than"),
        ("reward.workers=5000", "reward.workers=5000: expected less than or equal to 1024"),
        ("optim.lr=1e60", "optim.lr=1e+60: expected a size from 1e-30 to 1e+30, which float32"),
        ("optim.eps=1e-60", "optim.eps=1e-60: expected a size from 1e-30"),
        ("data.system_prompt=Answer #1", "YAML takes a part of it for a comment: put the value in"),
        ("data.answer_pattern=#### (.*)", "YAML takes a part of it for a comment"),
        ("name=&a b", "YAML takes a part of it for an anchor"),
        ("loss.clip_low=1e-50", "loss.clip_low=1e-50: expected a size from"),
        ("loss.clip_high=1e300", "loss.clip_high=1e+300: expected a size from"),
        ("loss.kl_limit=1e60", "loss.kl_limit=1e+60: expected a size from"),
        ("loss.entropy_coef=-1e60", "loss.entropy_coef=-1e+60: expected a size from"),
        ("rollout.temperature=1e-300", "temperature=1e-300: expected greater than or equal to 1e-"),
        ("reward.weights=[.nan]", "reward.weights[0]=nan: expected a finite number"),
        ("data.params={a: [.nan]}", "data.params={'a': [nan]}: expected finite numbers"),
        ('data.system_prompt="a\\0"', "data.system_prompt='a\\x00': expected text without NUL"),
        (
            'output_dir="\\ud800"',
            "output_dir='\\ud800': expected text without NUL and without half",
        ),
        ("output_dir=" + "a" * 300, "expected a path whose parts have at most 240 bytes"),
        ("output_dir=~nobody-here/x", "expected a path in the home of a user that exists"),
        ("data.answer_pattern=" + "(" * 900, "not a regular expression"),
        ("a..b=1", "--set a..b=1: expected section.key=value"),
        (".".join("a" * 100) + "=1", "expected section.key=value"),
        ("\udc80=1", r"--set \udc80=1: expected section.key=value"),
        ("data.params={a: " + "[" * 100, "nested more than 32 deep"),
    ],
)
def test_odd_overrides(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    data = [] if override.startswith("data.params") else ["data={source: jsonl, train_path: x}"]
    assert expected in outcome(lambda: load_config(path, [*data, override]))


def test_infinity_is_no_clip_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "loss: {clip_high: .inf, negative_clip: [0.2, .inf]}\n")
    assert reads_back(path).loss.clip_high == float("inf")


def test_an_override_of_an_alias_changes_one_place(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    data = "data: {source: reasoning_gym, dataset: chain_sum, params: &p {a: 1}, "
    path.write_text(
        MINIMAL.replace("data: {source: reasoning_gym, dataset: chain_sum}", data).replace(
            "params: &p {a: 1}, ", "params: &p {a: 1}, chat_template_args: *p}"
        )
    )
    config = load_config(path, ["data.params.a=2"])
    assert config.data.params == {"a": 2} and config.data.chat_template_args == {"a": 1}


NUMBERS = st.floats() | st.sampled_from([0.0, 0.2, 1.0, 1.05, 3.0, 1e30, 3.5e38, 1e-46])
PAIRS = st.tuples(NUMBERS, NUMBERS)


@settings(max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "surrogate": st.sampled_from(SURROGATES),
            "ratio_level": st.sampled_from(RATIO_LEVELS),
            "kl_estimator": st.sampled_from(KL_ESTIMATORS),
            **{n: NUMBERS for n in ("clip_low", "clip_high", "kl_coef", "entropy_coef")},
            **{n: NUMBERS for n in ("dual_clip", "log_ratio_limit", "ratio_cap", "kl_limit")},
            **{n: PAIRS for n in ("negative_clip", "sapo_temperature", "gppo_scale")},
        },
    )
)
def test_a_loss_that_the_config_takes_is_one_of_the_kernels(options: dict[str, Any]) -> None:
    try:
        loss = LossConfig(**options)
    except ValidationError:
        return
    objective_of(loss)


# ---- rows ---------------------------------------------------------------------------------------

ROW = '{"prompt": "What?", "answer": "1", "more": {"a": [1, 2.5, null, true], "b": "\\u00e9"}}\n'


def rows(path: Path, content: bytes | str, **options: Any) -> None:
    """Read a file of rows; what they hold reaches verifiers and completions.jsonl."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for example in read(DataConfig(source="jsonl", train_path=str(path), **options)):
        json.dumps([example.messages, example.answer], ensure_ascii=False).encode()
        pickle.dumps(example)


@pytest.mark.parametrize("seed", range(2))
def test_changed_rows_are_taken_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    chance, taken = random.Random(seed), 0
    for _ in range(300):
        content = ROW.encode() + mutated(ROW, chance)
        taken += not outcome(lambda c=content: rows(tmp_path / "x.jsonl", c))
    assert 0 < taken < 300


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("[" * 3000, "line 2: not JSON"),
        ('{"prompt": "a", "answer": 1, "x": ' + "[" * 100 + "]" * 100 + "}", "x: nested more than"),
        ('{"prompt": "a", "answer": "\\ud800"}', "line 2: answer='\\ud800': half of a surrogate"),
        ('{"prompt": "a", "answer": 1, "x": ["\\ud800"]}', "line 2: x='\\ud800': half of a"),
        ('{"prompt": "a", "answer": 1, "\\ud800": 1}', "key '\\ud800': half of a surrogate pair"),
        ('{"prompt": "a", "answer": 1, "answer": 2}', "key 'answer' is given twice"),
        ('{"prompt": "a", "answer": 1e999}', "answer=inf: expected text or a finite number"),
        ('{"prompt": "a", "answer": %s}' % ("9" * 5000), "not JSON that can be read"),
        ('{"prompt": "a", "answer": {"x": "%s"}}' % ("y" * 10**5), "expected text or a finite"),
        ('{"prompt": "a\\u0000", "answer": "\\u0000", "x": 1e999}', ""),
        ('"' + "x" * 10**5, "line 2: not JSON"),
        ("null", "expected an object, got NoneType"),
    ],
)
def test_odd_rows(tmp_path: Path, row: str, expected: str) -> None:
    assert expected in outcome(lambda: rows(tmp_path / "x.jsonl", ROW + row + "\n"))


def test_an_index_of_many_digits_is_no_index(tmp_path: Path) -> None:
    row = '{"prompt": "a", "answer": [1]}\n'
    line = outcome(lambda: rows(tmp_path / "x", row, answer_field="answer." + "1" * 200))
    assert "is missing: data.answer_field must be one of" in line


def test_an_answer_pattern_that_never_ends_is_stopped(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("papo.data.examples._PATTERN_SECONDS", 0.05)
    row = json.dumps({"prompt": "a", "answer": "a" * 60 + "b"})
    options = {"answer_pattern": "^((?:a|aa)+)$"}
    line = outcome(lambda: rows(tmp_path / "x.jsonl", row, **options))
    assert "data.answer_pattern='^((?:a|aa)+)$' searches it for more than 0.05 s; write" in line


# ---- text ---------------------------------------------------------------------------------------


def test_any_value_is_shown_on_one_short_line() -> None:
    nested: list[Any] = []
    for _ in range(20_000):
        nested = [nested]
    for value in (nested, 10**6000, "\ud800\n" * 1000, {"\x1b": "\u202e"}, b"\0" * 1000):
        text = shown(value)
        assert text.isprintable() and len(text) <= 80
    assert shown(nested) == "<list>"
    assert printable("a\nb\x1b") == r"a b\x1b"


def test_an_error_is_one_printable_line_that_keeps_its_end() -> None:
    line = str(PapoError("x=" + "\x1b" * 10**6 + ": expected\nless"))
    assert len(line) == LONGEST and line.isprintable() and line.endswith(": expected less")
    assert str(PapoError(line)) == line
    assert str(pickle.loads(pickle.dumps(ConfigError(line)))) == line
