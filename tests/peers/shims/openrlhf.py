"""OpenRLHF's policy loss, KL estimators and log-probs on papo_kernels."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
from torch import Tensor

from papo_kernels import LogProbs, Objective, policy_loss, token_stats


def _stub(name: str, *values: str) -> None:
    """A module that OpenRLHF imports where flash-attn is not installed; nothing here calls it."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(dict.fromkeys(values))
    sys.modules.setdefault(name, module)


_stub("flash_attn.bert_padding", "index_first_axis", "pad_input", "rearrange", "unpad_input")
_stub("flash_attn.utils.distributed", "all_gather")

from openrlhf.models import utils  # noqa: E402
from openrlhf.models.loss import PolicyLoss, aggregate_loss  # noqa: E402
from openrlhf.models.utils import masked_mean  # noqa: E402


def _ids(logp: Tensor) -> Tensor:
    """Which token a log-prob is of does not matter, as long as it is none that is ignored."""
    return torch.zeros_like(logp, dtype=torch.long)


def _correction(
    loss: PolicyLoss, old: Tensor, rollout: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors on tokens against the sampler's own log-probs, and which it has left out or cut."""
    ratio, by_sequence = (old - rollout).exp(), loss.is_correction_level == "seq"
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
    if loss.is_correction_gating == "ratio":
        figure = (
            masked_mean(old - rollout, mask, -1)[:, None] if by_sequence else old - rollout
        ).exp()
    else:
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        figure = kl if loss.is_correction_gating == "binary_kl" else (p - q).abs()
        figure = masked_mean(figure, mask, -1)[:, None] if by_sequence else figure
    low, high = loss.is_correction_threshold
    out = (figure < low) | (figure > high)
    if loss.is_correction_mode == "clip":
        return figure.clamp(low, high), out
    return torch.where(out, 0.0, ratio), out


def policy_loss_forward(
    self: PolicyLoss,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    rollout_log_probs: Tensor | None = None,
    **batch: Any,
) -> tuple[Tensor | None, ...]:
    """`PolicyLoss.forward`."""
    mask, gspo = action_mask.to(log_probs), self.policy_loss_type == "gspo"
    corrected = self.is_correction_level != "off"
    out = policy_loss(
        LogProbs(log_probs),
        _ids(log_probs),
        advantages,
        mask,
        old_logp=rollout_log_probs if gspo and corrected else old_log_probs,
        objective=Objective(
            self.clip_eps_low,
            self.clip_eps_high,
            self.dual_clip,
            ratio_level="sequence" if gspo else "token",
            log_ratio_limit=None if gspo else 20.0,
            reduce=False,
        ),
    )
    loss, sampler_kl, share = out.loss, None, None
    if corrected and not gspo:
        factor, left_out = _correction(self, old_log_probs, rollout_log_probs, mask)
        loss = loss * factor
        sampler_kl = masked_mean(rollout_log_probs - old_log_probs, mask)
        tokens = mask if left_out.shape == mask.shape else torch.ones_like(factor)
        share = masked_mean(left_out.float(), tokens)
    clipped = masked_mean(out.clipped.float(), mask)
    ppo_kl = masked_mean((old_log_probs - log_probs).detach(), mask)
    total = aggregate_loss(loss, mask, self.token_level_loss, **batch)
    return total, clipped, ppo_kl, sampler_kl, share


def _estimate(logp: Tensor, ref_logp: Tensor, estimator: str, limit: float | None) -> Tensor:
    """A policy loss whose advantages are 0 is its KL term."""
    objective = Objective(kl_coef=1.0, kl_estimator=estimator, kl_limit=limit, reduce=False)
    zero = torch.zeros_like(logp)
    out = policy_loss(
        LogProbs(logp), _ids(logp), zero, zero + 1, ref_logp=ref_logp, objective=objective
    )
    return out.loss


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """`compute_approx_kl`: unbiased, it has the gradient of k2, times the ratio off-policy."""
    logp, base = log_probs.float(), log_probs_base.float()
    if not unbiased_gradient:
        return _estimate(logp, base, kl_estimator, 10.0)
    if log_probs_old is None and kl_estimator != "k2":
        return _estimate(logp, base, kl_estimator + "+", 10.0)
    k2, ratio = _estimate(logp, base, "k2", None), 1.0
    if log_probs_old is not None:
        ratio = (logp - log_probs_old.float()).exp().clamp(max=utils.KL_IS_WEIGHT_CLIP).detach()
    return _estimate(logp, base, kl_estimator, 10.0).detach() + ratio * (k2 - k2.detach())


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """`log_probs_from_logits`."""
    return token_stats(logits, labels, temperature=temperature).logp


def compute_entropy(logits: Tensor) -> Tensor:
    """`compute_entropy`, whatever the tokens."""
    return token_stats(logits, _ids(logits[..., 0])).entropy


MODULES = ("openrlhf.models", "_openrlhf_")
FUNCTIONS = {
    "compute_approx_kl": compute_approx_kl,
    "log_probs_from_logits": log_probs_from_logits,
    "compute_entropy": compute_entropy,
}
METHODS = {"PolicyLoss.forward": policy_loss_forward}
