"""A whole run's options: every section, the rules that tie sections together, and the config that
DeepSpeed gets.

Importing it imports neither torch nor deepspeed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from papo.config.data import DataConfig
from papo.config.options import (
    AdvantageConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    DynamicSamplingConfig,
    EvaluationConfig,
    HealthConfig,
    LossConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    RolloutConfig,
    WeightingConfig,
)
from papo.config.parse import ConfigError, yaml_text
from papo.config.presets import PRESETS
from papo.config.reward import RewardConfig
from papo.config.section import PathText, Positive, Section, Seed, refuse
from papo.config.text import explain, merged, read_options, sections_of
from papo.errors import shown, shown_path
from papo.outputs import replace_file

LONGEST_NAME = 60


def _file_name(value: str) -> str:
    if value in (".", "..") or "/" in value or not value.isprintable():
        raise PydanticCustomError("name", "a file name: printable, without /")
    return value


class TrainConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME), AfterValidator(_file_name)]
    """Name of the run."""
    output_dir: PathText = ""
    """Folder of the run; empty stands for `runs/<name>`."""
    method: Literal["papo", "grpo", "dapo"] = "papo"
    """Preset: defaults for what you do not set yourself (table at the end). `grpo` and `dapo`
    follow the published methods; `papo` takes DAPO's loss and a strength that is this project's
    choice."""
    steps: Positive
    """Rollouts, each with `optim.updates_per_rollout` updates."""
    seed: Seed = 0
    """Seed of sampling and of the order of the problems."""
    resume: Annotated[PathText, Field(min_length=1)] = "never"
    """`never`; `auto` for the newest checkpoint of `output_dir`, or the start where there is none;
    or a checkpoint's folder."""
    resume_anyway: bool = False
    """Resume although options that change what is trained, the problems or the model are not the
    checkpoint's."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig
    advantage: AdvantageConfig = AdvantageConfig()
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    loss: LossConfig = LossConfig()
    weighting: WeightingConfig = WeightingConfig()
    phase: PhaseConfig = PhaseConfig()
    optim: OptimConfig = OptimConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: Any) -> Any:
        """Lay the method's preset under what was written, and derive what follows from other
        options."""
        if not isinstance(raw, Mapping):
            return raw
        method = raw.get("method", "papo")
        preset = PRESETS.get(method, {}) if isinstance(method, str) else {}
        sections = dict(sections_of(cls))
        # A section whose options are all commented out.
        written = {k: {} if v is None and k in sections else v for k, v in raw.items()}
        filled = merged(preset, written)
        if filled.get("output_dir", "") == "":
            filled["output_dir"] = f"runs/{filled.get('name')!s:.{LONGEST_NAME}}"
        advantage, rollout = filled.get("advantage"), filled.get("rollout")
        if isinstance(advantage, dict) and isinstance(rollout, Mapping):
            limit = rollout.get("max_new_tokens")
            if (
                advantage.get("overlong") == "soft"
                and not advantage.get("overlong_buffer")
                and isinstance(limit, int)
            ):
                advantage["overlong_buffer"] = max(1, limit // 5)
        return filled

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        data, rollout, advantage, optim = self.data, self.rollout, self.advantage, self.optim
        verifier, chosen = shown(self.reward.verifier), self.reward.chosen(data.source)
        refuse(
            "reasoning_gym" in chosen and data.source != "reasoning_gym",
            f"reward.verifier={verifier}: reasoning_gym expects data.source=reasoning_gym, got "
            f"{data.source!r}; use math_verify",
        )
        twice = next((name for name in chosen if chosen.count(name) > 1), None)
        refuse(
            twice is not None,
            f"reward.verifier={verifier}: expected different ones, and {shown(twice)} is there "
            "twice",
        )
        refuse(
            data.held_out_size == 0 and self.evaluation.wanted,
            "data.held_out_size=0: expected > 0 while evaluation.before, .after or .every is on",
        )
        refuse(
            advantage.overlong == "soft" and advantage.overlong_buffer > rollout.max_new_tokens,
            f"advantage.overlong_buffer={advantage.overlong_buffer}: expected at most "
            f"rollout.max_new_tokens={rollout.max_new_tokens}",
        )
        refuse(
            optim.updates_per_rollout > rollout.prompts_per_step,
            f"optim.updates_per_rollout={optim.updates_per_rollout}: expected at most "
            f"rollout.prompts_per_step={rollout.prompts_per_step}, since a group is never split",
        )
        refuse(
            self.model.attn_implementation == "flash_attention_2" and optim.max_row_tokens > 0,
            f"optim.max_row_tokens={optim.max_row_tokens}: expected 0 with "
            "model.attn_implementation=flash_attention_2, which takes no mask for shared prompts",
        )
        refuse(
            self.weighting.polarity == "shared" and not self.metrics.predict_share,
            f"metrics.predict_share={self.metrics.predict_share}: expected > 0 with "
            "weighting.polarity=shared, which is taken along the gradient that this share gives",
        )
        return self

    def sampler_kl_bound(self, update: int) -> float:
        """`loss.max_sampler_kl` as a number; infinity where there is no bound.

        Args:
            update: number of the update within its step; only at 0 are the weights the sampler's.
        """
        bound = self.loss.max_sampler_kl
        if update > 0 or bound == "none" or (bound == "auto" and self.model.dropout):
            return math.inf
        return 20.0 * self.sampler_kl_noise if bound == "auto" else bound

    @property
    def sampler_kl_noise(self) -> float:
        """Largest `loss/sampler_kl` (nats) that rounding alone explains.

        The rounding error of a log-prob grows with 1 / temperature, and its KL with the square.
        """
        noise = 1e-3 if self.model.dtype == "bf16" else 5e-5
        return noise / min(1.0, self.rollout.temperature) ** 2

    def dump_yaml(self, path: str | Path) -> None:
        """Write every option with its value; `load_config` reads it back to an equal config.

        Raises:
            OSError: the file cannot be written; an earlier one is still there.
        """
        replace_file(Path(path), yaml_text(self.model_dump(mode="json")).encode())

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of ranks that the prompts do not divide over.

        Raises:
            ConfigError: `rollout.prompts_per_step` is not divisible by `world_size`.
        """
        prompts = self.rollout.prompts_per_step
        if prompts % world_size:
            below = prompts - prompts % world_size
            above = below + world_size
            nearest = f"{below} or {above}" if below else str(above)
            raise ConfigError(
                f"rollout.prompts_per_step={prompts}: expected a multiple of the {world_size} "
                f"ranks (a group stays whole on its rank), for example {nearest}"
            )

    def deepspeed_dict(self, world_size: int) -> dict[str, Any]:
        """DeepSpeed's own config for this run.

        The trainer accumulates gradients itself and marks the last micro-batch, so DeepSpeed is
        told 1 step of accumulation.

        Args:
            world_size: number of ranks.

        Raises:
            ConfigError: see `check_world_size`.
        """
        self.check_world_size(world_size)
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.optim.max_grad_norm,
            "bf16": {"enabled": self.model.dtype == "bf16"},
            "zero_optimization": self._zero(),
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def _zero(self) -> dict[str, Any]:
        import torch

        # On a CPU nothing overlaps with communication: small buckets cost no time and keep the peak
        # of memory low.
        bucket = 50_000_000 if torch.cuda.is_available() else 5_000_000
        # Without ZeRO DeepSpeed would sum bfloat16 gradients in bfloat16.
        stage = self.deepspeed.zero_stage or int(self.model.dtype == "bf16")
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
        if self.deepspeed.offload_optimizer == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if stage != 3:
            return {**zero, "allgather_bucket_size": bucket}
        if self.deepspeed.offload_param == "cpu":
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            **zero,
            # The step makes a float32 copy of the gradients of one sub-group at a time.
            "sub_group_size": 20_000_000,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        }


def load_config(
    path: str | Path, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a YAML file and apply `a.b=value` overrides, each value read as YAML.

    Args:
        given: options that replace those of the file and of the overrides.

    Raises:
        ConfigError: the file cannot be read, or an option is unknown, missing or out of bounds; the
            line names the first such option and counts the others.
    """
    options = {**read_options(path, overrides), **(given or {})}
    try:
        return TrainConfig.model_validate(options)
    except ValidationError as error:
        raise ConfigError(f"{shown_path(path)}: {explain(error.errors(), TrainConfig)}") from None
