"""What a resumed run may change, and what is said where it changed more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from papo.config import TrainConfig
from papo.config.resume import FREE, differences, is_free
from papo.config.text import known_keys, sections_of

ROOT = Path(__file__).parents[2]


def config(**options: Any) -> TrainConfig:
    made: dict[str, Any] = {
        "name": "test",
        "steps": 3,
        "model": {"path": "somewhere"},
        "data": {"source": "reasoning_gym", "dataset": "chain_sum", "params": {"min_terms": 2}},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 8},
    }
    for name, value in options.items():
        both = isinstance(value, dict) and name in made
        made[name] = {**made[name], **value} if both else value
    return TrainConfig.model_validate(made)


def saved(of: TrainConfig) -> dict[str, Any]:
    """As a checkpoint gives it back."""
    return json.loads(json.dumps(of.model_dump(mode="json")))


SECTIONS = {name for name, _ in sections_of(TrainConfig)}
OPTIONS = [key for key in known_keys(TrainConfig) if key not in SECTIONS]


def test_the_same_options_are_no_difference() -> None:
    assert differences(saved(config()), config()) == []


def test_the_table_names_options_that_there_are() -> None:
    assert set(known_keys(TrainConfig)) >= FREE


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_is_free_or_compared(key: str) -> None:
    """Which of the two is the table's word; a run that went on with another value shows it."""
    before = saved(config())
    section, _, leaf = key.rpartition(".")
    where = before[section] if section else before
    where[leaf] = "another value"
    told = differences(before, config())
    if is_free(key, config()):
        assert told == []
    else:
        (line,) = [line for line in told if line.startswith(f"{key} ")]
        assert '"another value" -> ' in line


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        ({"seed": 1}, ["seed 0 -> 1"]),
        ({"optim": {"lr": 1e-5}}, ["optim.lr 1e-06 -> 1e-05"]),
        ({"data": {"params": {"min_terms": 3}}}, ["data.params.min_terms 2 -> 3"]),
        ({"data": {"params": {}}}, ["data.params.min_terms 2 -> absent"]),
        ({"data": {"system_prompt": "é\n" * 40}}, [None]),
        ({"loss": {"sapo_temperature": [1.0, 1.05]}}, []),
        ({"steps": 9, "output_dir": "elsewhere", "evaluation": {"every": 3}}, []),
        ({"model": {"path": "elsewhere"}, "deepspeed": {"zero_stage": 0}}, []),
        (
            {"method": "grpo", "rollout": {"temperature": 0.5}},
            [
                'method "papo" -> "grpo"',
                "rollout.temperature 1.0 -> 0.5",
                'loss.aggregation "token" -> "sequence"',
                "loss.clip_high 0.28 -> 0.2",
                "weighting.strength 0.5 -> 0.0",
            ],
        ),
    ],
)
def test_a_difference_is_the_option_and_both_values(now: dict, lines: list) -> None:
    told = differences(saved(config()), config(**now))
    if lines == [None]:
        (line,) = told
        assert line.startswith("data.system_prompt null -> ") and line.endswith("...")
        assert "\n" not in line and len(line) < 80
    else:
        assert told == lines


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_steps_are_free_where_the_learning_rate_does_not_depend_on_them(schedule: str) -> None:
    before = saved(config(optim={"schedule": schedule}))
    told = differences(before, config(optim={"schedule": schedule}, steps=9))
    if schedule == "constant":
        assert told == []
    else:
        (line,) = told
        assert line.startswith("steps 3 -> 9 (optim.schedule")


def test_a_dataset_is_free_as_a_folder_and_compared_as_a_name(tmp_path: Path) -> None:
    def of(dataset: str) -> TrainConfig:
        return config(data={"source": "huggingface", "dataset": dataset, "params": {}})

    assert differences(saved(of("someone/gsm8k")), of(str(tmp_path))) == []
    (line,) = differences(saved(of(str(tmp_path))), of("someone/gsm8k"))
    assert line.startswith("data.dataset ") and line.endswith('-> "someone/gsm8k"')


def test_what_an_older_checkpoint_lacks_is_its_default_and_what_is_unknown_is_told() -> None:
    """Options come and go from version to version."""
    before = saved(config())
    del before["phase"], before["loss"]["kl_coef"], before["checkpoint"]
    assert differences(before, config()) == []
    (line,) = differences(before, config(loss={"kl_coef": 0.1}))
    assert line == "loss.kl_coef 0.0 -> 0.1"
    before["loss"]["margin"] = 0.5
    assert differences(before, config()) == ["loss.margin 0.5 -> absent"]


def test_the_page_says_what_may_change() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    assert [key for key in (*sorted(FREE), "steps") if f"`{key}" not in page] == []
