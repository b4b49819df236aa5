"""verl's policy losses and KL estimators on papo_kernels, from log-probs.

To use one, register it: ``register_policy_loss("papo")(policy_loss_of("clip"))``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.torch_functional import masked_mean

from papo_kernels import LogProbs, Objective, policy_loss
from papo_kernels.types import CLIPPED_DUAL, INSIDE

_KL = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def objective_of(surrogate: str, config: Any) -> Objective:
    """What the options of verl's actor are called here."""
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    options: dict[str, Any] = dict(surrogate=surrogate, clip_low=low, clip_high=high)
    if surrogate == "clip":
        options.update(dual_clip=config.get("clip_ratio_c", 3.0))
    elif surrogate == "gspo":
        return Objective(low, high, ratio_level="sequence_token", reduce=False)
    elif surrogate == "sapo":
        options.update(sapo_temperature=(config.tau_pos, config.tau_neg))
    elif surrogate.startswith("dppo"):
        options.update(ratio_cap=config.get("clip_ratio_c", 20.0))
    return Objective(**options, log_ratio_limit=20.0, reduce=False)


def policy_loss_of(surrogate: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """One of verl's policy losses."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask = response_mask.to(log_prob)
        out = policy_loss(
            LogProbs(log_prob),
            torch.zeros_like(log_prob, dtype=torch.long),  # which tokens they are does not matter
            advantages,
            mask if rollout_is_weights is None else mask * rollout_is_weights,
            old_logp=old_log_prob,
            objective=objective_of(surrogate, config),
        )
        mode = "seq-mean-token-mean" if surrogate == "sapo" else loss_agg_mode
        total = agg_loss(out.loss, response_mask, mode, **config.global_batch_info)
        inside, dual = out.clip_side == INSIDE, out.clip_side == CLIPPED_DUAL
        if surrogate.startswith("dppo"):
            dual = inside & (out.ratio > config.get("clip_ratio_c", 20.0))
        metrics = {
            "actor/pg_clipfrac": ~inside & ~dual,
            "actor/ppo_kl": (old_log_prob - log_prob).detach(),
            "actor/pg_clipfrac_lower": dual,
        }
        return total, {
            name: masked_mean(x.to(log_prob), response_mask).item() for name, x in metrics.items()
        }

    return loss


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """verl's `kl_penalty`: a policy loss whose advantages are 0."""
    name, plus = kl_penalty.removesuffix("+"), kl_penalty[-1] == "+"
    estimator = _KL.get(name, name)
    objective = Objective(
        kl_coef=1.0,
        kl_estimator=estimator + "+" * (plus and estimator != "k2"),
        kl_limit=10.0 if estimator == "k3" else None,
        reduce=False,
    )
    ones = torch.ones_like(logprob)
    ids = torch.zeros_like(logprob, dtype=torch.long)
    out = policy_loss(
        LogProbs(logprob), ids, ones - 1, ones, ref_logp=ref_logprob, objective=objective
    )
    return out.loss


MODULES = ("verl.trainer.ppo",)
FUNCTIONS = {"compute_policy_loss_vanilla": policy_loss_of("clip"), "kl_penalty": kl_penalty}
METHODS: dict[str, Callable[..., Any]] = {}
