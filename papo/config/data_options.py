"""The sections of a run's options that concern problems, their rewards and the evaluation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from papo.config.options import NonNegative, Positive, Section, refuse

# Options that would be without effect under another source, unseen.
_FILES = ("jsonl", "parquet")
_SOURCES_OF = {
    "dataset": ("reasoning_gym", "huggingface"),
    "params": ("reasoning_gym",),
    "train_path": _FILES,
    "eval_path": _FILES,
    "dataset_config": ("huggingface",),
    "train_split": ("huggingface",),
    "eval_split": ("huggingface",),
    "train_size": ("reasoning_gym",),
    "prompt_field": (*_FILES, "huggingface"),
    "answer_field": (*_FILES, "huggingface"),
    "answer_pattern": (*_FILES, "huggingface"),
}
_TEMPLATE_TAKEN = {
    "chat_template",
    "messages",
    "conversation",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}


class DataConfig(Section):
    """Problems: where they come from, how they are split and turned into prompts."""

    source: Literal["reasoning_gym", "jsonl", "parquet", "huggingface"]
    """`reasoning_gym` generates problems; `jsonl` reads a file of JSON lines or one JSON array,
    `parquet` a Parquet file, `huggingface` a dataset of the library `datasets` (docs/data.md)."""
    dataset: str | None = None
    """reasoning-gym's name of the dataset; for `source: huggingface` a folder (of
    `save_to_disk`, or of data files) or a hub id."""
    params: dict[str, Any] = Field(default={})
    """The dataset's own parameters, for `source: reasoning_gym`."""
    dataset_config: str | None = None
    """Name of the dataset's config (the hub calls it subset), for `source: huggingface`."""
    train_split: Annotated[str, Field(min_length=1)] = "train"
    """Split to train on, for `source: huggingface`."""
    eval_split: Annotated[str, Field(min_length=1)] | None = None
    """Held-out split, for `source: huggingface`; without it `held_out_size` problems are split off
    `train_split`."""
    train_path: str | None = None
    """Training file, for `source: jsonl` and `parquet`."""
    eval_path: str | None = None
    """Held-out file, for `source: jsonl` and `parquet`; without it `held_out_size` problems are
    split off `train_path`."""
    prompt_field: Annotated[str, Field(min_length=1)] | None = None
    """Field of a row with the prompt: text, or a list of {role, content} messages. Dots lead into
    nested fields. None is `prompt` or `messages`, whichever the row has."""
    answer_field: Annotated[str, Field(min_length=1)] = "answer"
    """Field of a row with the reference answer, such as `reward_model.ground_truth`."""
    answer_pattern: str | None = None
    """Regular expression with one group, which is searched for in the answer and holds the
    reference, such as `#### (.*)`."""
    train_size: Positive = 1000
    """Distinct training problems to generate, for `source: reasoning_gym`; fewer where the dataset
    has fewer."""
    held_out_size: NonNegative | None = None
    """Problems kept for the evaluation, never trained on. None is 64 that are generated or split
    off, or all of `eval_path` or `eval_split`; a number takes as many of these, the same ones in
    every run, and trains on none of the others either."""
    split_seed: NonNegative = 0
    """Seed of the problems and of the split; apart from `seed`, so that runs with other seeds share
    the held-out set."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    prompt_suffix: str = ""
    """Text appended to the last user message."""
    chat_template_args: dict[str, Any] = Field(default={})
    """Variables of the chat template, such as `enable_thinking: false`."""
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
            self.source == "huggingface" and not self.dataset,
            "data.dataset is missing: data.source=huggingface needs a folder or a hub id such as "
            "openai/gsm8k",
        )
        refuse(
            self.source in ("jsonl", "parquet") and not self.train_path,
            f"data.train_path is missing: data.source={self.source} needs a file of problems",
        )
        for name, sources in _SOURCES_OF.items():
            value = getattr(self, name)
            refuse(
                self.source not in sources and value != type(self).model_fields[name].default,
                f"data.{name}={value!r}: expected data.source {' or '.join(sources)}, got "
                f"{self.source}",
            )
        self._check_pattern()
        taken = _TEMPLATE_TAKEN.intersection(self.chat_template_args)
        refuse(
            bool(taken), f"data.chat_template_args.{min(taken, default='')}: papo sets it itself"
        )
        return self

    def _check_pattern(self) -> None:
        if self.answer_pattern is None:
            return
        key = f"data.answer_pattern={self.answer_pattern!r}"
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"{key}: not a regular expression: {error}") from error
        refuse(groups != 1, f"{key}: expected one group, the reference answer, got {groups}")


class RewardConfig(Section):
    """Verifiable rewards, computed in worker processes that can be killed."""

    verifier: Annotated[
        str, Field(pattern=r"^(auto|reasoning_gym|math_verify|exact|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
    ] = "auto"
    """`auto` (the data source's own), `reasoning_gym`, `math_verify`, `exact` (docs/rewards.md says
    what is equal to each), or your own `package.module:function` called as (answer text, reference
    answer, metadata) and returning a float, or None to mask the completion."""
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
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = 5.0
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
