"""What a resumed run may change, and what is said where it changed more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from papo.cli import config_from
from papo.config import ConfigError, DataConfig, TrainConfig
from papo.config.resume import FREE, differences, is_free
from papo.config.text import known_keys, sections_of
from papo.data.problems import ProblemSource
from papo.errors import PapoError
from papo.model.weights import fingerprint
from papo.train.resume import Origin
from tests.distributed.saved import without_tensors
from tests.trainer.tiny import CHAT_TEMPLATE, MINIMAL, build_tokenizer, small_llama

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


@pytest.mark.parametrize(
    ("polarity", "strength"), [("local", 0.5), ("shared", 0.5), ("shared", 0.0)]
)
def test_what_predicts_is_free_where_no_weight_depends_on_it(
    polarity: str, strength: float
) -> None:
    weighting = {"source": "rollout", "polarity": polarity, "strength": strength}
    changed = {"predict_share": 0.5, "predict_every": 2, "predict_decay": 0.9}
    told = differences(
        saved(config(weighting=weighting)), config(weighting=weighting, metrics=changed)
    )
    if polarity == "local" or not strength:
        assert told == []
    else:
        assert {line.split()[0] for line in told} == {f"metrics.{name}" for name in changed}
        assert len(told) == len(changed)
        assert all(line.endswith("(weighting.polarity=shared depends on it)") for line in told)


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


def test_a_dataset_in_the_home_folder_is_a_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows").mkdir()
    home = config(data={"source": "huggingface", "dataset": "~/rows", "params": {}})
    assert is_free("data.dataset", home)


def test_what_an_older_checkpoint_lacks_is_its_default_and_what_is_unknown_is_told() -> None:
    """Options come and go from version to version."""
    before = saved(config())
    del before["phase"], before["loss"]["kl_coef"], before["checkpoint"]
    assert differences(before, config()) == []
    (line,) = differences(before, config(loss={"kl_coef": 0.1}))
    assert line == "loss.kl_coef 0.0 -> 0.1"
    before["loss"]["margin"] = 0.5
    assert differences(before, config()) == ["loss.margin 0.5 -> absent"]


# ---- a checkpoint of another training -----------------------------------------------------------


def checks(origin: Origin) -> dict[str, Callable[[], None]]:
    """Each check of something else than the checkpoint below was made with."""
    return {
        "seed 0 -> 1": lambda: origin.check_config(config(seed=1)),
        "training problems": lambda: origin.check_problems("p2"),
        "model.path": lambda: origin.check_model("m2"),
    }


def origin(folder: Path, anyway: bool, said: list[str]) -> Origin:
    meta = {"config": saved(config()), "problems": "p", "model": "m"}
    made = without_tensors(folder / "step-00000001", **meta)
    return Origin.of(made, anyway, said.append)


@pytest.mark.parametrize("what", ["seed 0 -> 1", "training problems", "model.path"])
def test_another_training_is_refused_in_one_line_or_said(tmp_path: Path, what: str) -> None:
    said: list[str] = []
    with pytest.raises(PapoError) as caught:
        checks(origin(tmp_path, False, said))[what]()
    told = str(caught.value)
    assert "\n" not in told and told.startswith("resume: ") and what in told
    assert str(tmp_path) in told and told.endswith("--resume-anyway") and not said
    checks(origin(tmp_path, True, said))[what]()
    (line,) = said
    assert line.startswith("--resume-anyway: ") and what in line


def test_the_same_training_goes_on_and_says_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    same = origin(tmp_path, False, said)
    same.check_config(config(steps=9, name="longer"))
    same.check_problems("p")
    same.check_model("m")
    for check in checks(Origin.of(None, False, said.append)).values():  # from the start
        check()
    assert not said


def test_many_differences_are_five_and_a_count(tmp_path: Path) -> None:
    other = config(method="grpo", seed=1, rollout={"top_k": 5, "temperature": 0.5})
    with pytest.raises(PapoError, match=r"rollout.top_k 0 -> 5.* and 2 more; ") as caught:
        origin(tmp_path, False, []).check_config(other)
    assert str(caught.value).count(" -> ") == 5


def test_a_model_is_known_by_its_weights_and_not_by_its_folder() -> None:
    one, same = (small_llama(0, vocab_size=16) for _ in range(2))
    assert fingerprint(one) == fingerprint(same) != fingerprint(small_llama(1, vocab_size=16))
    with torch.no_grad():
        largest = same.lm_head.weight.argmax()
        same.lm_head.weight.view(-1)[largest] *= 1.001
    assert fingerprint(one) != fingerprint(same)
    assert fingerprint(one) != fingerprint(one.to(torch.bfloat16))


def test_a_model_is_known_by_what_its_files_say_it_computes() -> None:
    """And by weights that are the same numbers in another order."""
    one = small_llama(0, vocab_size=16)
    for name, value in (("hidden_act", "relu"), ("rms_norm_eps", 1e-2)):
        other = small_llama(0, vocab_size=16)
        setattr(other.config, name, value)
        assert fingerprint(one) != fingerprint(other), name
    other = small_llama(0, vocab_size=16)
    other.generation_config.eos_token_id = [0, 5]
    assert fingerprint(one) != fingerprint(other)
    other = small_llama(0, vocab_size=16)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    assert fingerprint(one) != fingerprint(other)


def test_dropout_depends_on_how_a_batch_is_cut() -> None:
    for key in ("optim.micro_batch_size", "optim.max_row_tokens"):
        section, name = key.split(".")
        other = {section: {name: 3}}
        assert differences(saved(config()), config(**other)) == []
        dropped = {"model": {"path": "m", "dropout": True}}
        (line,) = differences(saved(config(**dropped)), config(**dropped, **other))
        assert line.startswith(f"{key} ") and line.endswith("(model.dropout depends on it)")


def test_zeros_of_either_sign_are_the_same_weights() -> None:
    one, same = (small_llama(0, vocab_size=16) for _ in range(2))
    with torch.no_grad():
        one.model.norm.weight.zero_()
        same.model.norm.weight.fill_(-0.0)
    assert fingerprint(one) == fingerprint(same)


def test_problems_are_known_by_their_tokens_and_metadata_too(tmp_path: Path) -> None:
    """Another tokenizer's ids are other prompts; a verifier may read what is in the metadata."""

    def of(tokenizer: Any, **row: Any) -> str:
        path = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"p{i}", "answer": "1", **row} for i in range(3)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        data = DataConfig(source="jsonl", train_path=str(path), held_out_size=1)
        return ProblemSource(data, tokenizer, seed=0).fingerprint

    tokenizer = build_tokenizer()
    assert of(tokenizer) == of(build_tokenizer())
    assert of(tokenizer, level=1) != of(tokenizer, level=2)
    other = build_tokenizer(CHAT_TEMPLATE.replace("assistant", "model"))
    assert of(tokenizer) != of(other)


@pytest.mark.parametrize("arguments", [[], ["--resume", "never"], ["--resume"]])
def test_resume_anyway_needs_something_to_resume(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    argv = ["--config", str(path), *arguments]
    assert not config_from(argv).resume_anyway
    for anyway in (["--resume-anyway"], ["--set", "resume_anyway=true"]):
        if arguments == ["--resume"]:
            assert config_from([*argv, *anyway]).resume_anyway
        else:
            with pytest.raises(ConfigError, match=r"^resume_anyway=true: expected --resume auto"):
                config_from([*argv, *anyway])


def test_the_page_says_what_may_change() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    assert [key for key in (*sorted(FREE), "steps") if f"`{key}" not in page] == []
