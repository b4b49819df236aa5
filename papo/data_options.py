"""The sections of a run's options that concern problems, their rewards and the evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from papo.options import NonNegative, Positive, PositiveFloat, Section, refuse


class DataConfig(Section):
    """Problems: where they come from, how they are split and turned into prompts."""

    source: Literal["reasoning_gym", "jsonl"]
    """`reasoning_gym` generates problems; `jsonl` reads lines of `{prompt or messages, answer}`."""
    dataset: str | None = None
    """reasoning-gym's name of the dataset, for `source: reasoning_gym`."""
    params: dict[str, Any] = Field(default={})
    """The dataset's own parameters, for `source: reasoning_gym`."""
    train_path: str | None = None
    """Training file, for `source: jsonl`."""
    eval_path: str | None = None
    """Held-out file, for `source: jsonl`, used whole; without it `held_out_size` problems are split
    off `train_path`."""
    train_size: Positive = 1000
    """Distinct training problems to generate, for `source: reasoning_gym`; fewer where the dataset
    has fewer."""
    held_out_size: NonNegative = 64
    """Problems kept out of training for the evaluation."""
    split_seed: NonNegative = 0
    """Seed of the problems and of the split; apart from `seed`, so that runs with other seeds share
    the held-out set."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    prompt_suffix: str = ""
    """Text appended to every user message."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are dropped and counted."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        refuse(
            self.source == "reasoning_gym" and not self.dataset,
            "data.dataset is missing: data.source=reasoning_gym needs a dataset name such as "
            "chain_sum",
        )
        refuse(
            self.source == "jsonl" and not self.train_path,
            "data.train_path is missing: data.source=jsonl needs a file of "
            "{prompt or messages, answer} lines",
        )
        return self


class RewardConfig(Section):
    """Verifiable rewards, computed in worker processes that can be killed."""

    verifier: Annotated[
        str, Field(pattern=r"^(auto|reasoning_gym|math_verify|exact|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
    ] = "auto"
    """`auto` (the data source's own), `reasoning_gym`, `math_verify`, `exact` (docs/rewards.md says
    what is equal to each), or your own
    `package.module:function` called as (answer text, reference answer, metadata) and returning a
    float, or None to mask the completion."""
    extract: Literal["last_number", "boxed", "last_line", "none"] = "none"
    """Which part of a completion the verifier sees; a completion without such a part scores 0."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Built-in verifiers: the reward is 1 where the score exceeds this, else 0 (reasoning-gym gives
    partial credit). What your own function returns is the reward."""
    success: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Reward from which a completion counts as right in `reward/accuracy`, held-out accuracy and
    pass@k. It changes no reward. Lower it where your own function gives less than 1 for a right
    answer."""
    on_bad_reference: Literal["error", "drop", "keep"] = "error"
    """Where a reference answer cannot be read, or would not score 1 as a completion, by a built-in
    verifier: stop before the model is loaded, drop the problem, or keep it. All are listed."""
    timeout_s: PositiveFloat = 5.0
    """Seconds a completion may take before its worker is killed and it scores 0."""
    workers: Positive = 2
    """Worker processes per rank."""


class EvaluationConfig(Section):
    """Accuracy and mean reward on the held-out problems."""

    before: bool = True
    """Evaluate before the first step."""
    after: bool = True
    """Evaluate after the last step."""
    every: NonNegative = 0
    """Steps between evaluations in the run; 0 is off."""
    samples: Positive = 8
    """Completions per problem for the sampled accuracy and pass@k."""
    greedy: bool = True
    """Also decode greedily."""
    batch_size: NonNegative = 64
    """Sequences per generate call and rank; 0 samples all at once."""

    @property
    def wanted(self) -> bool:
        """Whether the run evaluates at all."""
        return self.before or self.after or self.every > 0
