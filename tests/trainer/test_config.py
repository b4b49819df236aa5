"""Options: presets, overrides, one-line refusals, the saved file, the reference page and
DeepSpeed's dict.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from papo.config import (
    PRESETS,
    ConfigError,
    LossConfig,
    RewardConfig,
    TrainConfig,
    load_config,
)
from papo.config.page import reference_page
from papo.config.text import known_keys, sections_of
from papo.policy.objective import objective_of
from papo_kernels import Objective
from papo_kernels.objective import SURROGATES
from tests.trainer.tiny import MINIMAL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"

    def load(*overrides: str, text: str = MINIMAL) -> TrainConfig:
        path.write_text(text)
        return load_config(path, overrides)

    return load


def refusal(load, *overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, text=text)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_config_imports_neither_torch_nor_deepspeed():
    code = (
        "import sys, papo.config, papo.types; "
        "print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "optim.lrr=1: unknown key; did you mean optim.lr?"),
        ("lr=1", "lr=1: unknown key; did you mean optim.lr?"),
        (
            "optim.zero_stage=2",
            "optim.zero_stage=2: unknown key; did you mean deepspeed.zero_stage?",
        ),
        ("weightng.strength=0.5", "unknown key; did you mean weighting?"),
        ("checkpoint.qqqqqq=2", "checkpoint.qqqqqq=2: unknown key; known here: every, keep"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(load, override, expected):
    assert expected in refusal(load, override)


@pytest.mark.parametrize("value", ["1", "1.0", "1.5", "-0.1", ".nan"])
def test_lambda_outside_0_to_1_is_refused(load, value):
    line = refusal(load, f"weighting.strength={value}")
    assert "weighting.strength=" in line and "expected" in line


def test_one_completion_per_prompt_is_refused(load):
    """A group of one has no spread, and its unbiased std is NaN."""
    line = refusal(load, "rollout.completions_per_prompt=1")
    assert "rollout.completions_per_prompt=1: expected greater than or equal to 2" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=0", "steps=0: expected greater than 0"),
        ("steps=true", "steps=True: expected integer"),
        ("steps=ten", "steps='ten': expected integer"),
        ("optim.lr=.nan", "optim.lr=nan: expected a finite number"),
        ("optim.lr=.inf", "optim.lr=inf: expected a finite number"),
        ("optim.betas=[0.9, 1.0]", "optim.betas[1]=1.0: expected less than 1"),
        ("optim.betas=[0.9]", "optim.betas[1] is missing"),
        ("rollout.temperature=0", "rollout.temperature=0: expected greater than or equal to 1e-18"),
        ("rollout.top_p=0", "rollout.top_p=0: expected greater than 0"),
        ("loss.dual_clip=1", "loss.dual_clip=1: expected greater than 1"),
        ("loss.dual_clip=.inf", "loss.dual_clip=inf: expected a finite number"),
        ("loss.surrogate=ppo", "loss.surrogate='ppo': expected 'clip', 'cispo', 'sapo'"),
        ("loss.negative_clip=[0.2]", "loss.negative_clip[1] is missing"),
        ("loss.negative_clip=[1.2, 0.2]", "loss.negative_clip[0]=1.2: expected less than or equal"),
        ("loss.log_ratio_limit=0", "loss.log_ratio_limit=0: expected greater than 0"),
        ("loss.ratio_cap=20", "loss.ratio_cap=20.0: expected loss.surrogate dppo_tv or dppo_kl"),
        ("loss.sapo_temperature=[1, 2]", "expected loss.surrogate sapo, got clip"),
        (
            "loss={surrogate: cispo, dual_clip: 3}",
            "loss.dual_clip=3.0: expected loss.surrogate clip",
        ),
        (
            "loss={surrogate: dppo_kl, ratio_level: sequence}",
            "loss.ratio_level='sequence': expected 'token' with loss.surrogate=dppo_kl",
        ),
        ("loss.entropy_coef=.nan", "loss.entropy_coef=nan: expected a finite number"),
        ("optim.lr=1e", "optim.lr='1e': expected number"),
        ("loss.backend=gpu", "loss.backend='gpu': expected 'reference', 'cpu', 'triton' or 'cuda'"),
        ("method=ppo", "method='ppo': expected 'papo', 'grpo' or 'dapo'"),
        ("phase.target=-1", "phase.target=-1: expected 'warmup' or greater than 0"),
        (
            "phase.fast_decay=0.95",
            "phase.fast_decay=0.95: expected less than phase.slow_decay=0.95",
        ),
        (
            "weighting.polarity=shared",
            "weighting.polarity='shared': expected weighting.source=rollout, got 'update'",
        ),
        ("weighting.polarity=global", "weighting.polarity='global': expected 'local' or 'shared'"),
        ("reward.verifier=sympy", "reward.verifier='sympy': expected `auto`"),
        ("data.source=jsonl", "data.train_path is missing"),
        ("data.dataset=null", "data.dataset is missing"),
        ("loss.aggregation=constant", "loss.constant_length is missing"),
        ("data.held_out_size=0", "data.held_out_size=0: expected > 0 while evaluation"),
        ("optim.updates_per_rollout=5", "expected at most rollout.prompts_per_step=4"),
        ("model.attn_implementation=flash_attention_2", "optim.max_row_tokens=2048: expected 0"),
        (
            "metrics.predict_share=1.5",
            "metrics.predict_share=1.5: expected less than or equal to 1",
        ),
        ("metrics.predict_share=-0.1", "expected greater than or equal to 0"),
        ("metrics.predict_share=.nan", "metrics.predict_share=nan: expected less than or equal"),
        ("metrics.predict_every=0", "metrics.predict_every=0: expected greater than 0"),
        ("metrics.predict_decay=0.995", "predict_decay=0.995: expected less than or equal to 0.99"),
        ("rollout=3", "rollout=3: expected a section with keys"),
        ("model={}", "model.path is missing: "),
    ],
)
def test_bad_value_names_key_value_and_expectation(load, override, expected):
    assert expected in refusal(load, override)


def test_shared_polarity_without_the_gradient_that_it_is_taken_along_is_refused(load):
    shared = ["weighting={polarity: shared, source: rollout}"]
    assert load(*shared).weighting.polarity == "shared"
    line = refusal(load, *shared, "metrics.predict_share=0")
    assert "metrics.predict_share=0.0: expected > 0 with weighting.polarity=shared" in line


def test_soft_overlong_buffer_longer_than_the_limit_is_refused(load):
    line = refusal(load, "advantage.overlong=soft", "advantage.overlong_buffer=25")
    assert "advantage.overlong_buffer=25: expected at most rollout.max_new_tokens=24" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage=4: expected less than or equal to 3"),
        (["deepspeed.zero_stage=0", "deepspeed.offload_optimizer=cpu"], "offload_optimizer='cpu'"),
        (["deepspeed.zero_stage=2", "deepspeed.offload_param=cpu"], "offload_param='cpu'"),
    ],
)
def test_impossible_deepspeed_options_are_refused(load, overrides, expected):
    assert expected in refusal(load, *overrides)


def test_verifier_of_another_source_is_refused(load):
    source = "data={source: jsonl, train_path: x.jsonl}"
    why = "reasoning_gym expects data.source=reasoning_gym, got 'jsonl'"
    line = refusal(load, source, "reward.verifier=reasoning_gym")
    assert f"reward.verifier='reasoning_gym': {why}" in line
    line = refusal(load, source, "reward.verifier=[my_rewards:f, reasoning_gym]")
    assert f"reward.verifier=['my_rewards:f', 'reasoning_gym']: {why}" in line


def test_auto_is_the_data_sources_own_verifier():
    reward = RewardConfig(verifier=["exact", "auto"])
    assert reward.chosen("jsonl") == ["exact", "math_verify"]
    assert reward.chosen("reasoning_gym") == ["exact", "reasoning_gym"]


@pytest.mark.parametrize(
    "names", ["[exact, exact]", "[my:f, exact, my:f]", "[auto, reasoning_gym]"]
)
def test_a_verifier_that_is_named_twice_is_refused(load, names):
    line = refusal(load, f"reward.verifier={names}")
    assert "reward.verifier=[" in line and "is there twice" in line


def test_several_errors_are_still_one_line(load):
    assert "(and 1 more)" in refusal(load, "steps=0", "optim.lr=-1")


def test_missing_file_and_bad_yaml_say_where(tmp_path, load):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    assert "run.yaml line 3: not valid YAML" in refusal(load, text="name: a\nsteps: 3\n: [\n")
    assert "key 'steps' is given twice" in refusal(load, text=MINIMAL + "steps: 4\n")
    assert "expected a mapping of options, got list" in refusal(load, text="- a\n")


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", "name.x=1", "steps=[1"])
def test_malformed_override_is_refused(load, override):
    assert f"--set {override}" in refusal(load, override)


def test_overrides_are_yaml_and_reach_into_parameters(load):
    config = load(
        "optim.lr=3e-5",
        "optim.betas=[0.9, 0.95]",
        "data.params.max_terms=2",
        "name=x",
        "loss.dual_clip=3",
    )
    assert config.optim.lr == 3e-5
    assert config.optim.betas == (0.9, 0.95)
    assert config.data.params == {"max_terms": 2}
    assert config.output_dir == "runs/x"
    assert config.loss.dual_clip == 3.0


def test_every_option_of_the_objective_reaches_it(load):
    """Under its own name, from another value than its default."""
    values = {
        "clip_low": 0.1,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "negative_clip": (0.3, 0.4),
        "ratio_level": "sequence",
        "log_ratio_limit": 20.0,
        "kl_estimator": "k1+",
        "kl_ratio": True,
        "kl_limit": 10.0,
    }
    of_others = {
        "dppo_tv": {"ratio_cap": 20.0},
        "sapo": {"sapo_temperature": (1.0, 2.0)},
        "ce_gppo": {"gppo_scale": (0.5, 1.0)},
    }
    assert objective_of(LossConfig(**values)) == Objective(**values)
    for surrogate, options in of_others.items():
        given = {"surrogate": surrogate, **options}
        assert objective_of(LossConfig(**given)) == Objective(**given)
        values |= given
    assert {field.name for field in fields(Objective)} == {*values, "reduce"}
    assert objective_of(LossConfig()) == Objective()
    assert load("loss.sapo_temperature=[1, 2]", "loss.surrogate=sapo").loss == LossConfig(
        surrogate="sapo", sapo_temperature=(1.0, 2.0), clip_high=0.28
    )


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_what_the_objective_refuses_is_refused_when_the_config_is_read(surrogate):
    options = {"dual_clip": 3.0, "ratio_cap": 20.0, "ratio_level": "sequence"}
    options["negative_clip"] = (0.1, 0.1)
    for name, value in options.items():
        try:
            Objective(surrogate=surrogate, **{name: value})
        except ValueError:
            with pytest.raises(ValueError, match=f"loss.{name}="):
                LossConfig(surrogate=surrogate, **{name: value})
        else:
            objective_of(LossConfig(surrogate=surrogate, **{name: value}))


@pytest.mark.parametrize("name", ["7b", "2nd-try", "0x", "1.5B-x", "2024_runs"])
def test_text_that_begins_like_a_number_is_text(name, load):
    assert load(f"name={name}").name == name


def test_numbers_in_scientific_notation_are_numbers(load):
    assert load(text=MINIMAL + "optim: {lr: 1e-5, eps: 1E-10}\n").optim.lr == 1e-5


def test_user_verifier_is_accepted(load):
    assert (
        load("reward.verifier=my_rewards.maths:score").reward.verifier == "my_rewards.maths:score"
    )


@pytest.mark.parametrize("method", list(PRESETS))
def test_method_sets_its_defaults(load, method):
    config = load(f"method={method}")
    for section, values in PRESETS[method].items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value


def test_what_the_user_writes_wins_over_the_preset(load):
    config = load("method=dapo", "loss.clip_high=0.3", "dynamic_sampling.enabled=false")
    assert config.loss.clip_high == 0.3
    assert not config.dynamic_sampling.enabled
    assert config.loss.clip_low == 0.2 and config.advantage.overlong == "soft"


def test_baselines_have_no_polarity_weighting(load):
    assert load("method=grpo").weighting.strength == 0.0
    assert load("method=dapo").weighting.strength == 0.0
    assert load("method=papo").weighting.strength > 0.0


def test_soft_overlong_buffer_defaults_to_a_fifth_of_the_limit(load):
    assert load("method=dapo").advantage.overlong_buffer == 4
    assert load("method=dapo", "advantage.overlong_buffer=7").advantage.overlong_buffer == 7


def test_saved_config_reads_back_equal(load, tmp_path):
    config = load(
        "method=dapo", "phase.target=1.5", "optim.lr=1e-5", "data.params={a: [1, 2], b: x}"
    )
    config.dump_yaml(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert set(known_keys(TrainConfig)) == {
        *saved,
        *(f"{name}.{key}" for name, _ in sections_of(TrainConfig) for key in saved[name]),
    }


def test_config_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().optim.lr = 1.0


def test_every_option_is_documented():
    models = [TrainConfig, *(section for _, section in sections_of(TrainConfig))]
    nested = dict(sections_of(TrainConfig))
    bare = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.description and name not in nested
    ]
    assert bare == []


def test_reference_page_is_current():
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == reference_page(TrainConfig, PRESETS), (
        "run: python -m papo.config > docs/config.md"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load(path):
    config = load_config(path)
    if config.data.source == "jsonl" and config.data.train_path.startswith("configs/"):
        assert (ROOT / config.data.train_path).is_file()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_deepspeed_dict_is_accepted_by_deepspeed(load, stage, dtype):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load(
        f"deepspeed.zero_stage={stage}", f"model.dtype={dtype}", "optim.max_grad_norm=0.5"
    )
    parsed = DeepSpeedConfig(config.deepspeed_dict(world_size=1))
    assert parsed.zero_config.stage == (1 if stage == 0 and dtype == "bf16" else stage)
    assert parsed.bfloat16_config.enabled == (dtype == "bf16")
    assert parsed.gradient_clipping == 0.5
    assert parsed.gradient_accumulation_steps == 1


def test_deepspeed_dict_offloads(load):
    zero = load("deepspeed.offload_optimizer=cpu", "deepspeed.offload_param=cpu").deepspeed_dict(1)[
        "zero_optimization"
    ]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert zero["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_prompts_divide_over_the_ranks(load, world_size):
    load().check_world_size(world_size)


@pytest.mark.parametrize(("world_size", "nearest"), [(3, "3 or 6"), (8, "for example 8")])
def test_prompts_that_do_not_divide_over_the_ranks_are_refused(load, world_size, nearest):
    with pytest.raises(
        ConfigError, match=rf"rollout\.prompts_per_step=4: .*{world_size} ranks.*{nearest}"
    ):
        load().deepspeed_dict(world_size)
