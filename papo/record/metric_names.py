"""Every figure that a run writes: the one table of names, units and meanings.

`python -m papo.record.metric_names` prints docs/metrics.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """`unit` is empty for counts and plain numbers; shares are of 1."""

    unit: str
    meaning: str


VERIFIER_MEAN = "reward/mean/"  # and the verifier's name

METRICS: dict[str, Metric] = {
    "reward/mean": Metric("", "Mean reward of everything sampled, masked rows left out."),
    VERIFIER_MEAN + "<verifier>": Metric(
        "",
        "With several of `reward.verifier`: the mean of what this one gave, before its weight; "
        "None and numbers that are not finite are left out.",
    ),
    "reward/std": Metric("", "Standard deviation of the same rewards."),
    "reward/accuracy": Metric(
        "share", "Completions with a reward of `reward.success` or more, masked ones left out."
    ),
    "reward/zero_spread_groups": Metric(
        "share",
        "Groups whose rewards are all equal (largest minus smallest <= 1e-6): advantages 0, "
        "nothing learned.",
    ),
    "reward/errors": Metric(
        "", "Completions whose verifier, or one of several, raised: its part is 0."
    ),
    "reward/timeouts": Metric(
        "",
        "Completions whose verifier, or one of several, was killed at `reward.timeout_s`, and none "
        "raised: its part is 0.",
    ),
    "reward/invalid": Metric(
        "", "Completions whose verifiers all returned None or no finite number; masked."
    ),
    "response/length": Metric(
        "tokens", "Mean response length, the end-of-sequence token included."
    ),
    "response/truncated": Metric("share", "Completions that ran into `rollout.max_new_tokens`."),
    "rollout/rounds": Metric(
        "", "Sampling rounds of the step; above 1 with dynamic sampling alone."
    ),
    "entropy/mean": Metric(
        "nats",
        "Mean entropy of the policy at the sampling temperature, over the tokens that train.",
    ),
    "entropy/predicted_delta": Metric(
        "nats",
        "The step's entropy change to first order in the weights: the averaged gradient of the "
        "mean entropy times what AdamW did to the weights, summed over the step's updates "
        "(docs/method.md). Null where no update was applied, and with `metrics.predict_share` 0.",
    ),
    "entropy/predicted_delta_polarity": Metric(
        "nats times a constant",
        "The step's entropy change as polarity predicts it, passed through AdamW (docs/method.md): "
        "the sum over the step's updates. Compare its sign and trend, not its size, with the "
        "measured one. Null where no update was applied.",
    ),
    "entropy/predicted_delta_instant": Metric(
        "nats per unit step",
        "Polarity's prediction from this step's gradient alone, per unit of step in logit space: "
        "with `loss.surrogate: clip` the sum of token weight times w times polarity over all "
        "tokens of the step, 0 where clipped.",
    ),
    "entropy/gradient_norm": Metric(
        "nats per unit of weight",
        "Norm of the gradient of the mean entropy, at the steps that take it "
        "(`metrics.predict_every`); null where it is not finite, and then it predicts nothing.",
    ),
    "entropy/measured_delta": Metric(
        "nats",
        "Mean entropy after an update minus before it, over all its tokens (or "
        "`metrics.measure_tokens` of them), summed over the step's updates.",
    ),
    "entropy/prediction_correlation": Metric(
        "",
        "Spearman's rank correlation of `entropy/predicted_delta` and `entropy/measured_delta` "
        "over the last 50 measured steps; null before the 8th. `dH r` on screen.",
    ),
    "entropy/prediction_correlation_polarity": Metric(
        "",
        "The same of `entropy/predicted_delta_polarity`; `dH r` on screen where the one above is "
        "null.",
    ),
    "entropy/prediction_correlation_instant": Metric(
        "", "The same of `entropy/predicted_delta_instant`."
    ),
    "phase/phi": Metric("", "Phase used by this step, in [-1, 1]; above 0 asks for more entropy."),
    "phase/fast": Metric("nats", "Fast average of the mean entropy, this step included."),
    "phase/slow": Metric("nats", "Slow average of the mean entropy, this step included."),
    "phase/reference": Metric("nats", "Reference entropy H*."),
    "weighting/lambda_phi": Metric(
        "", "`weighting.strength` times the phase: how far the branches' weights move apart."
    ),
    "weighting/sigma": Metric("", "Running RMS of polarity used by this step."),
    "weighting/scale": Metric(
        "", "Pressure-conserving scale s used by this step; 1 without `weighting.conserve`."
    ),
    "polarity/expanding_share": Metric(
        "share",
        "Tokens of the step's first update that expand entropy (polarity above 0, outside the dead "
        "zone, not clipped).",
    ),
    "polarity/contracting_share": Metric(
        "share", "The same for tokens that contract it (polarity below 0)."
    ),
    "polarity/expanding_pressure_before": Metric(
        "share", "The expanding branch's part of the summed absolute advantage, unweighted."
    ),
    "polarity/contracting_pressure_before": Metric(
        "share", "The contracting branch's part of it, unweighted."
    ),
    "polarity/expanding_pressure_after": Metric(
        "share", "The expanding branch's part after weighting."
    ),
    "polarity/contracting_pressure_after": Metric(
        "share", "The contracting branch's part after weighting."
    ),
    "loss/policy": Metric(
        "", "The policy loss. On-policy it is near 0 by construction: see below."
    ),
    "loss/advantage_abs": Metric(
        "", "Mean absolute advantage per token; 0 means there is nothing to learn from."
    ),
    "loss/ratio": Metric("", "Mean importance ratio; 1 with one update per rollout."),
    "loss/clip_low": Metric("share", "Tokens on which the lower bound acted."),
    "loss/clip_high": Metric("share", "Tokens on which the upper bound acted."),
    "loss/clip_dual": Metric("share", "Tokens on which the dual clip acted."),
    "loss/sampler_kl": Metric(
        "nats",
        "KL from the sampler to the policy on sampled tokens (k3): how far sampling and training "
        "disagree.",
    ),
    "optim/grad_norm": Metric(
        "",
        "Gradient norm of the step's last update, before clipping; null where it is not finite.",
    ),
    "optim/lr": Metric("", "Learning rate of the step's last update."),
    "optim/skipped": Metric(
        "",
        "Updates of the step that were skipped: loss or gradient was not finite, or no token was "
        "left to train on.",
    ),
    "time/step": Metric("s", "The whole step, slowest rank (as all times)."),
    "time/gather": Metric("s", "Gathering partitioned weights for sampling, once a step."),
    "time/rollout": Metric("s", "Sampling."),
    "time/reward": Metric("s", "Waiting for verifiers."),
    "time/stats": Metric(
        "s",
        "Forward passes of the old and the reference policy, where something needs them; with "
        "`metrics.predict_share` also the forward and backward passes of the entropy's gradient.",
    ),
    "time/train": Metric(
        "s",
        "Forward, backward and optimizer; with `metrics.measure_tokens` or `model.dropout` also "
        "the pass that measures entropy before the step.",
    ),
    "time/measure": Metric("s", "Forward pass after the update for the measured entropy change."),
    "throughput/tokens_per_second": Metric(
        "tokens/s", "Sampled tokens of all ranks over the time of the step."
    ),
    "memory/peak_rss": Metric("GiB", "Peak resident memory of the largest rank so far."),
    "memory/peak_device": Metric(
        "GiB", "Peak accelerator memory of the largest rank so far; absent on a CPU."
    ),
    "eval/accuracy": Metric(
        "share",
        "Held-out problems: samples at temperature 1 with a reward of `reward.success` or more, "
        "masked ones left out, as in all that follow.",
    ),
    "eval/pass_at_k": Metric("share", "Held-out problems solved by at least one of the samples."),
    "eval/greedy": Metric("share", "Held-out problems solved by greedy decoding."),
    "eval/reward": Metric("", "Mean reward of the samples."),
    "eval/reward_greedy": Metric("", "Mean reward of greedy decoding."),
    "eval/invalid": Metric(
        "",
        "Held-out completions, samples and greedy ones, whose verifier returned None or no finite "
        "number.",
    ),
    "eval/truncated": Metric("share", "Held-out samples that ran into `rollout.max_new_tokens`."),
}


def documented_as(name: str) -> str:
    """The name in `METRICS` under which a figure is documented, if it is."""
    return VERIFIER_MEAN + "<verifier>" if name.startswith(VERIFIER_MEAN) else name


def reference_page() -> str:
    """The Markdown page of every name."""
    rows = [f"| `{name}` | {metric.unit} | {metric.meaning} |" for name, metric in METRICS.items()]
    return _PAGE.format(table="\n".join(rows))


_PAGE = """# Metrics

Made by `python -m papo.record.metric_names > docs/metrics.md` from its table; do not edit.

Every step writes one row to `metrics.jsonl` in the run's folder, and the same names to TensorBoard
(`tensorboard --logdir runs`). An evaluation writes a row of its own, with the step after which it
ran. Figures cover all ranks. A figure that is not finite is written as null, and so is a mean or a
share of nothing, such as `reward/mean` where no completion has a reward.

| name | unit | meaning |
|---|---|---|
{table}

## The loss is 0

That is what a healthy on-policy run shows. Advantages are centered within each group and the ratio
is 1, so the loss's value is minus the token mean of the advantages, near 0, while its gradient is
not. Look at `optim/grad_norm`, `loss/advantage_abs` and `reward/mean` instead. Nothing is learned
only where `loss/advantage_abs` and `optim/grad_norm` are 0 as well. `reward/zero_spread_groups` is
then 1, because every group was solved completely or not at all. Choose easier or harder problems,
or set `dynamic_sampling.enabled`.

## Completions

`completions.jsonl` holds every sampled completion once: `step`, `group` (index of the prompt in the
step), `uid` of the problem, `prompt`, `answer` (the reference), `text`, `length` in tokens,
`truncated`, `reward` (null where masked), `rewards` (what each verifier gave, by its name),
`status` (`ok`, `error`, `timeout`, `invalid`) and `advantage`.
"""


if __name__ == "__main__":
    print(reference_page(), end="")
