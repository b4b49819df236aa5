"""Checks, before anything expensive, that all ways to the policy's log-probs agree.

The sampler pads on the left, computes a prompt once and goes on from a cache; training pads on the
right and lets completions share their prompt's row. An architecture that does not support one of
these gives other numbers without a word, and a run on them ends well and learns nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from papo.dist import collectives
from papo.errors import PapoError, first_line
from papo.policy.batch import MicroBatch, TrainingSequence, collate
from papo.policy.objective import evaluating, sampler_kl, stats_of
from papo.rollout import HFSampler, SamplingParams
from papo.types import Completion, Problem

# Two prompts, so that one is padded, of two completions each, so that rows are shared.
_PROMPT_TOKENS = (24, 4)
_COPIES = 2
_NEW_TOKENS = 6
# A window up to this is exceeded by the longer prompt; a longer one would cost too much.
_LONGEST_WINDOW = 64
# Difference of log-probs that rounding explains, as a multiple of the largest logit. Right paths of
# SmolLM2 stay below 0.003 of it in bfloat16 and 4e-7 in float32; in both, another completion or
# another position in sight makes 0.01 and more.
_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-15}
_ANYWAY = "take another model, or model.probe=false to go on all the same"


@dataclass(frozen=True)
class Sampled:
    """Completions of random prompts, with what the model itself says of them.

    Attributes:
        completions: sampled as rollouts are.
        logp: float32 [len(response)] each, from one pass without padding, cache or batch mates.
        limit: largest difference (nats) that rounding explains.
    """

    completions: Sequence[Completion]
    logp: Sequence[Tensor]
    limit: float

    def difference(self, logp: Sequence[Tensor]) -> float:
        """How far `logp` is from the model's own: the worst completion's mean over its tokens.

        But for its worst token, which rounding may have sent to another expert of a mixture.
        """
        pairs = zip(logp, self.logp, strict=True)
        gaps = [(a.cpu() - b.cpu()).abs().sort().values for a, b in pairs]
        return max(float(gap[: max(1, len(gap) - 1)].mean()) for gap in gaps)

    def fault(self, logp: Callable[[], Sequence[Tensor]]) -> str:
        """Why what `logp` returns is not the model's own, empty where it is."""
        try:
            nats = self.difference(logp())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture makes of inputs it was not made for
            return f"{type(error).__name__}: {first_line(error)}"
        if nats <= self.limit:
            return ""
        return f"log-probs {nats:.2g} nats off the model's own (rounding: up to {self.limit:.2g})"


def check(
    engine: Any,
    sampler: HFSampler,
    tokenizer: Any,
    pad_id: int,
    config: Any,
    say: Callable[[str], None],
) -> int:
    """Compare the ways to the log-probs; a collective that all ranks run alike.

    Args:
        sampler: its `prefills` is switched off where the model cannot have it.
        config: the whole config.
        say: takes a line for the user.

    Returns:
        The most tokens of a row: `optim.max_row_tokens`, or the model's positions where they are
        fewer; 0 where completions of this model cannot share a row.

    Raises:
        PapoError: sampling or training would see other log-probs than the model's own.
    """
    causal_lm = engine.policy.causal_lm
    whose = f"model.path={config.model.path!r}: {type(causal_lm).__name__}"
    problems = _problems(causal_lm.config, tokenizer)
    with engine.inference_model() as model:
        for prefills in (True, False):
            sampler.prefills = prefills
            sampled, fault = _sample(model, sampler, problems, config.rollout.temperature)
            fault = _of_any_rank(fault)
            if not fault:
                break
    if fault or sampled is None:
        raise PapoError(
            f"{whose} cannot be sampled in batches: {fault}; likely its padding on the left or "
            f"its cache; {_ANYWAY}"
        )

    def trained(*, sharing: bool) -> str:
        with evaluating(engine):
            fault = sampled.fault(lambda: _trained(engine, sampled.completions, pad_id, sharing))
        return _of_any_rank(fault)

    fault = trained(sharing=False)
    if fault:
        raise PapoError(
            f"{whose} cannot be trained in batches: {fault}; likely its padding on the right, "
            f"model.attn_implementation={config.model.attn_implementation}, or logits that are "
            f"not its head's alone; {_ANYWAY}"
        )
    # A model may have a table of so many positions, by a row's place in it.
    places = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    row_tokens: int = min(config.optim.max_row_tokens, places or sys.maxsize)
    fault = trained(sharing=True) if row_tokens else ""
    if fault:
        say(
            f"completions do not share their prompt's row, as with optim.max_row_tokens=0: in "
            f"{type(causal_lm).__name__} {fault}"
        )
    return 0 if fault else row_tokens


def _of_any_rank(fault: str) -> str:
    """One rank's fault is everyone's: rounding may differ between them; a collective."""
    return max(collectives.gather_objects(fault))


def _problems(config: Any, tokenizer: Any) -> list[Problem]:
    """Prompts of random ordinary tokens, the same on every rank."""
    text = config.get_text_config()
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(min(len(tokenizer), text.vocab_size)) if i not in special]
    names = ("sliding_window", "attention_chunk_size")
    windows = [getattr(text, name, None) for name in names]
    beyond = max((w for w in windows if isinstance(w, int) and w <= _LONGEST_WINDOW), default=0)
    generator = torch.Generator().manual_seed(0)
    lengths = (beyond + _PROMPT_TOKENS[0], *_PROMPT_TOKENS[1:])
    drawn = [torch.randint(len(ordinary), (n,), generator=generator).tolist() for n in lengths]
    prompts = [tuple(ordinary[i] for i in ids) for ids in drawn]
    return [Problem(i, (), "", {}, prompt) for i, prompt in enumerate(prompts)]


def _sample(
    model: Any, sampler: HFSampler, problems: Sequence[Problem], temperature: float
) -> tuple[Sampled | None, str]:
    """Completions, and why their log-probs are not the model's own."""
    params = SamplingParams(_NEW_TOKENS, temperature)
    try:
        completions = sampler.sample(model, problems, _COPIES, params, seed=0)
        rows = [_alone(model, c, temperature) for c in completions]
    except Exception as error:  # as above
        return None, f"{type(error).__name__}: {first_line(error)}"
    largest = max(float(scale) for _, scale in rows)
    limit = largest * _ROUNDING[next(model.parameters()).dtype]
    sampled = Sampled(completions, [logp for logp, _ in rows], limit)
    return sampled, sampled.fault(lambda: [torch.tensor(c.sampler_logp) for c in completions])


@torch.inference_mode()
def _alone(model: Any, completion: Completion, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a completion's tokens from the model's own logits, and the largest."""
    prompt, response = completion.problem.prompt_ids, completion.response_ids
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + response], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logits /= temperature
    logp = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return logp, logits.abs().max()


def _trained(
    engine: Any, completions: Sequence[Completion], pad_id: int, sharing: bool
) -> list[Tensor]:
    """Log-probabilities of the completions' tokens on the way that training takes.

    Where rows are shared, a longer completion stands between two of a prompt: it displaces the
    second, which must not see it.
    """
    longest = max((c.problem.prompt_ids for c in completions), key=len)
    rows: list[tuple[Completion | None, TrainingSequence]] = []
    for completion in completions:
        ids = completion.problem.prompt_ids, completion.response_ids
        made = TrainingSequence(*ids, completion.sampler_logp, advantage=0.0, weight=0.0, group=0)
        rows.append((completion, made))
        if sharing:
            between = replace(made, response_ids=longest[::-1], sampler_logp=(0.0,) * len(longest))
            rows.append((None, between))
    sequences = [sequence for _, sequence in rows]
    batch = collate(sequences, pad_id=pad_id, max_row_tokens=sys.maxsize if sharing else 0)
    logp = stats_of(engine, batch.to(engine.device)).logp
    parts = logp.split([len(s.response_ids) for s in sequences])
    return [part for part, (real, _) in zip(parts, rows, strict=True) if real is not None]


def rows_fault(engine: Any, shared: MicroBatch, apart: MicroBatch, noise: float) -> str:
    """Why completions cannot share rows, empty where they can; a collective.

    The probe's own sequences are short: a window that they do not fill, or whatever else a model
    does at some length alone, shows here.

    Args:
        shared, apart: the same completions with and without shared rows.
        noise: KL to the sampler (nats) that rounding explains.
    """
    live = shared.token_weight > 0  # the same tokens in the same order in both
    sums = [live.double().sum()]
    with evaluating(engine):
        for batch in (shared, apart):
            logp = stats_of(engine, batch).logp
            sums.append(sampler_kl(batch.sampler_logp, logp, live).sum())
    tokens, *kls = collectives.all_sum(torch.stack(sums)).tolist()
    together, alone = (kl / max(1.0, tokens) for kl in kls)
    if not together > noise + 4.0 * alone:
        return ""
    return f"loss/sampler_kl is {together:.2g} in shared rows and {alone:.2g} in rows of their own"


def check_sampler_kl(kl: float, bound: float) -> None:
    """Refuse an update on other log-probs than the sampler's, though the weights are the same.

    Args:
        kl: `loss/sampler_kl` of an update before which nothing has changed since the rollout, over
            all ranks.
        bound: `TrainConfig.sampler_kl_bound`.

    Raises:
        PapoError: `kl` is beyond it; NaN is not.
    """
    if kl > bound:
        raise PapoError(
            f"loss/sampler_kl={kl:.3g}: expected at most {bound:.3g} before the weights change; "
            "training sees other log-probs than sampling, likely because of "
            "model.attn_implementation, an attention window or padding that one of them ignores, "
            "or dropout; loss.max_sampler_kl sets the bound"
        )
