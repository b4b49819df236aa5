"""What a resumed run may change: the options of its checkpoint beside those that it has now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from papo.config.schema import TrainConfig
from papo.config.text import sections_of

# Options and whole sections that a resumed run may change. Every other option is compared.
FREE = frozenset(
    {
        # The run and what it leaves.
        *("name", "output_dir", "resume", "resume_anyway"),
        *("checkpoint", "evaluation", "health", "metrics", "reward.success"),
        # Where things are, and which problems are left out: the model's weights and the problems
        # are compared themselves.
        *("model.path", "data.train_path", "data.eval_path", "reward.on_bad_reference"),
        # Memory and speed, by which figures differ in rounding at most.
        *("deepspeed", "model.attn_implementation", "model.activation_checkpointing"),
        "rollout.batch_size",
        *("loss.backend", "loss.full_logits", "loss.chunk_mib", "reward.workers"),
        # Checks and limits, which stop something or let it pass.
        *("model.probe", "loss.max_sampler_kl", "reward.timeout_s", "reward.memory_mib"),
    }
)
_PREDICTS = "metrics.predict_"
_SHOWN_CHARACTERS = 40


def differences(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """The options that change what is trained and are not those of a checkpoint, as `key old ->
    new`.

    Args:
        saved: the checkpoint's options, `TrainConfig.model_dump(mode="json")`. One that it lacks
            counts as its default; one that is unknown here is a difference.
        config: the options now.
    """
    now = _flat(config.model_dump(mode="json"))
    before = {**_defaults(TrainConfig), **_flat(saved)}
    pairs = {key: (_text(before, key), _text(now, key)) for key in {**now, **before}}
    return [
        f"{key} {_short(old)} -> {_short(new)}{_why(key)}"
        for key, (old, new) in pairs.items()
        if old != new and not is_free(key, config)
    ]


def is_free(key: str, config: TrainConfig) -> bool:
    """Whether a resumed run with this config may have another value of a dotted key."""
    if key == "steps":  # more of them, or fewer
        return config.optim.schedule == "constant"
    if key in ("optim.micro_batch_size", "optim.max_row_tokens"):  # passes, each with masks
        return not config.model.dropout
    if key == "data.dataset":  # a path, like data.train_path
        folder = Path(config.data.dataset or "").expanduser()
        return config.data.source == "huggingface" and folder.is_dir()
    if key.startswith(_PREDICTS):
        return config.weighting.polarity != "shared" or config.weighting.strength == 0.0
    parts = key.split(".")
    return any(".".join(parts[:n]) in FREE for n in range(1, len(parts) + 1))


def _why(key: str) -> str:
    whys = {
        "steps": " (optim.schedule makes the learning rate depend on it)",
        "optim.micro_batch_size": " (model.dropout depends on it)",
        "optim.max_row_tokens": " (model.dropout depends on it)",
    }
    if key.startswith(_PREDICTS):
        return " (weighting.polarity=shared depends on it)"
    return whys.get(key, "")


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, mappings inside mappings included."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _defaults(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Defaults by dotted key, of the options that have one."""
    nested = dict(sections_of(model))
    defaults: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in nested:
            defaults |= _defaults(nested[name], f"{prefix}{name}.")
        elif not field.is_required() and not isinstance(field.default, Mapping):
            defaults[prefix + name] = field.default
    return defaults


def _text(options: Mapping[str, Any], key: str) -> str:
    """A value as JSON writes it, which is one line."""
    return json.dumps(options[key], sort_keys=True) if key in options else "absent"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
