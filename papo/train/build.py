"""The policy of a run under DeepSpeed, made from the config, and the checks that come before it."""

from __future__ import annotations

import torch

from papo.config import TrainConfig
from papo.dist import collectives
from papo.dist.engine import Engine, local_device
from papo.errors import PapoError
from papo.model.load import load_causal_lm
from papo.model.recompute import recompute_activations
from papo.policy.module import Policy
from papo_kernels import Compute
from papo_kernels.backends import choose


def check_backend(name: str | None) -> None:
    """Refuse a kernel backend that cannot serve this rank's device, before anything is loaded.

    Raises:
        PapoError: it, or the one that PAPO_BACKEND names, cannot.
    """
    try:
        choose(name, local_device(), torch.float32)
    except (ValueError, RuntimeError, ImportError) as error:
        option = "" if name is None else f"loss.backend={name!r}: "
        raise PapoError(f"{option}{error}; without it the fastest that can is used") from error


def policy(config: TrainConfig) -> tuple[Policy, str]:
    """The model with its head and loss, not yet under an engine; a collective.

    Returns:
        The policy, and the `papo.model.weights.fingerprint` of its model.

    Raises:
        PapoError: the model does not load, or cannot recompute its activations.
    """
    with collectives.failing_together():
        causal_lm, digest = load_causal_lm(config.model)
    if config.model.activation_checkpointing:
        recompute_activations(causal_lm, dropout=config.model.dropout)
    chunk = config.loss.chunk_mib
    made = Policy(
        causal_lm,
        temperature=config.rollout.temperature,
        dropout=config.model.dropout,
        compute=Compute(config.loss.backend, None if chunk is None else chunk << 20),
        full_logits=config.loss.full_logits,
    )
    return made, digest


def engines(config: TrainConfig, trained: Policy) -> tuple[Engine, Engine | None]:
    """The policy's engine and, where the KL term is on, the frozen reference's; a collective."""
    ds_config = config.deepspeed_dict(collectives.world_size())
    engine = Engine(trained, ds_config, config.optim)
    if config.loss.kl_coef == 0.0:
        return engine, None
    reference, _ = policy(config)
    return engine, Engine(reference.requires_grad_(False), ds_config, None)
