"""The `data` section of a run's options, and which of them belong to which source."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import regex
from pydantic import Field, model_validator

from papo.config.section import NonNegative, PathText, Positive, Section, Seed, refuse
from papo.errors import shown

FieldPath = Annotated[str, Field(min_length=1, max_length=256)]
_FILES = ("jsonl", "parquet")
# Under any other source these options would silently do nothing.
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
# Arguments of apply_chat_template that are no variables of the template.
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
    """Problems: where they come from, how they are split, and how they become prompts."""

    source: Literal["reasoning_gym", "jsonl", "parquet", "huggingface"]
    """`reasoning_gym` generates problems; `jsonl` reads a file of JSON lines or one JSON array,
    `parquet` a Parquet file, `huggingface` a dataset of the library `datasets` (docs/data.md)."""
    dataset: PathText | None = None
    """Name of a reasoning-gym dataset; for `source: huggingface` a folder (written by
    `save_to_disk`, or of data files) or a hub id."""
    params: dict[str, Any] = Field(default={})
    """The dataset's own parameters, for `source: reasoning_gym`."""
    dataset_config: str | None = None
    """Name of the dataset's config, which the hub calls a subset, for `source: huggingface`."""
    train_split: Annotated[str, Field(min_length=1)] = "train"
    """Split to train on, for `source: huggingface`."""
    eval_split: Annotated[str, Field(min_length=1)] | None = None
    """Held-out split, for `source: huggingface`; without it `held_out_size` problems are split off
    `train_split`."""
    train_path: PathText | None = None
    """Training file, for `source: jsonl` and `parquet`."""
    eval_path: PathText | None = None
    """Held-out file, for `source: jsonl` and `parquet`; without it `held_out_size` problems are
    split off `train_path`."""
    prompt_field: FieldPath | None = None
    """Field of a row that holds the prompt: text, or a list of {role, content} messages. Dots lead
    into nested fields. By default `prompt` or `messages`, whichever the row has."""
    answer_field: FieldPath = "answer"
    """Field of a row that holds the reference answer, such as `reward_model.ground_truth`."""
    answer_pattern: Annotated[str, Field(max_length=1000)] | None = None
    """Regular expression with one group, such as `#### (.*)`. It is searched for in the answer, for
    5 seconds at most, and the group is the reference."""
    train_size: Positive = 1000
    """Distinct training problems to generate, for `source: reasoning_gym`; fewer if the dataset has
    fewer."""
    held_out_size: NonNegative | None = None
    """Problems kept for the evaluation and never trained on. By default 64 that are generated or
    split off, or all of `eval_path` or `eval_split`. A number takes that many of these, the same
    ones in every run; the others are not trained on either."""
    split_seed: Seed = 0
    """Seed of the generated problems and of the split. It is separate from `seed`, so that runs
    with different seeds share the held-out set."""
    system_prompt: str | None = None
    """System message put before every prompt that has none."""
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
            self.source in _FILES and not self.train_path,
            f"data.train_path is missing: data.source={self.source} needs a file of problems",
        )
        for name, sources in _SOURCES_OF.items():
            value = getattr(self, name)
            refuse(
                self.source not in sources and value != type(self).model_fields[name].default,
                f"data.{name}={shown(value)}: expected data.source {' or '.join(sources)}, got "
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
        key = f"data.answer_pattern={shown(self.answer_pattern)}"
        try:
            groups = regex.compile(self.answer_pattern).groups
        except (regex.error, RecursionError, ValueError, OverflowError) as error:
            raise ValueError(f"{key}: not a regular expression: {error}") from error
        refuse(groups != 1, f"{key}: expected one group, the reference answer, got {groups}")
