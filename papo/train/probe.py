"""Checks, before anything expensive, that sampling and training see the model's own log-probs.

The sampler pads on the left, computes a prompt once and goes on from a cache; training pads on the
right and lets completions share their prompt's row. An architecture that does not support one of
these silently gives other numbers, and a run on them finishes without having learned anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from papo.dist import collectives
from papo.errors import PapoError, first_line
from papo.model.limits import positions_of
from papo.policy.batch import MicroBatch, TrainingSequence, collate
from papo.policy.passes import ForwardEngine, evaluating, stats_of
from papo.policy.update import sampler_kl
from papo.record.progress import Progress
from papo.rollout import HFSampler, SamplingParams
from papo.types import Completion, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from papo.config import TrainConfig
    from papo.dist.engine import Engine

# Two prompts, so that one is padded, with two completions each, so that rows are shared.
_PROMPT_TOKENS = (24, 4)
_COPIES = 2
_NEW_TOKENS = 6
# The longer prompt exceeds an attention window of up to this many tokens; more would cost too much.
_LONGEST_WINDOW = 64
# Difference of log-probs that rounding explains, as a multiple of the largest logit. With SmolLM2 a
# correct path stays below 0.003 in bfloat16 and 4e-7 in float32. In both, a token that sees another
# completion, or has another position, makes it 0.01 or more.
_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-15}
_ANYWAY = "take another model, or set model.probe=false to go on anyway"


@dataclass(frozen=True)
class Sampled:
    """Completions of random prompts, with the model's own log-probs of their tokens.

    Attributes:
        completions: sampled as rollouts are.
        logp: float32 [len(response)] each (nats), from a pass without padding, cache or other rows.
        limit: largest difference (nats) that rounding explains.
    """

    completions: Sequence[Completion]
    logp: Sequence[Tensor]
    limit: float

    def difference(self, logp: Sequence[Tensor]) -> float:
        """How far `logp` is from the model's own (nats): the mean over the tokens of the worst
        completion.

        The mean leaves out the worst token, which rounding may have sent to another expert.
        """
        pairs = zip(logp, self.logp, strict=True)
        gaps = [(a.cpu() - b.cpu()).abs().sort().values for a, b in pairs]
        return max(float(gap[: max(1, len(gap) - 1)].mean()) for gap in gaps)

    def fault(self, logp: Callable[[], Sequence[Tensor]]) -> str:
        """Why what `logp` returns is not the model's own; empty if it is."""
        try:
            nats = self.difference(logp())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture may raise anything on inputs it does not know
            return _named(error)
        if nats <= self.limit:
            return ""
        return f"log-probs {nats:.2g} nats off the model's own (rounding: up to {self.limit:.2g})"


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def check(
    engine: Engine,
    sampler: HFSampler,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int,
    config: TrainConfig,
    progress: Progress,
) -> int:
    """Compare the log-probs of sampling and training with the model's own; a collective.

    Args:
        sampler: its `prefills` is set to False if the model does not support it.
        progress: shows a line where completions cannot share rows.

    Returns:
        The largest number of tokens in a row: `optim.max_row_tokens`, or the model's positions
        where they are fewer; 0 if completions of this model cannot share a row.

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
    # A model may look up positions in a table by a token's place in its row.
    positions = positions_of(causal_lm.config) or sys.maxsize
    row_tokens = min(config.optim.max_row_tokens, positions)
    fault = trained(sharing=True) if row_tokens else ""
    if fault:
        progress.say(
            f"completions do not share their prompt's row, as with optim.max_row_tokens=0: in "
            f"{type(causal_lm).__name__} {fault}"
        )
    return 0 if fault else row_tokens


def _of_any_rank(fault: str) -> str:
    """A fault that some rank has, empty if none has one: rounding may differ; a collective."""
    return max(collectives.gather_objects(fault))


def _problems(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
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
    model: PreTrainedModel, sampler: HFSampler, problems: Sequence[Problem], temperature: float
) -> tuple[Sampled | None, str]:
    """Completions, and why their log-probs are not the model's own; empty if they are."""
    params = SamplingParams(_NEW_TOKENS, temperature)
    try:
        completions = sampler.sample(model, problems, _COPIES, params, range(len(problems)))
        rows = [_alone(model, c, temperature) for c in completions]
    except Exception as error:  # as in Sampled.fault
        return None, _named(error)
    largest = max(float(scale) for _, scale in rows)
    limit = largest * _ROUNDING[next(model.parameters()).dtype]
    sampled = Sampled(completions, [logp for logp, _ in rows], limit)
    return sampled, sampled.fault(lambda: [torch.tensor(c.sampler_logp) for c in completions])


@torch.inference_mode()
def _alone(
    model: PreTrainedModel, completion: Completion, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of a completion's tokens from the model's own logits, and the largest logit's
    size."""
    prompt, response = completion.problem.prompt_ids, completion.response_ids
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + response], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logits /= temperature
    logp = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return logp, logits.abs().max()


def _trained(
    engine: Engine, completions: Sequence[Completion], pad_id: int, sharing: bool
) -> list[Tensor]:
    """Log-probs of the completions' tokens as training computes them.

    In a shared row a longer completion stands between two that were sampled: it shifts the second
    one, which must not see it.
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


def rows_fault(engine: ForwardEngine, shared: MicroBatch, apart: MicroBatch, noise: float) -> str:
    """Why completions cannot share rows, empty if they can; a collective.

    The probe's own sequences are short. A window that they do not fill shows here, and so does
    anything else that a model does only from some length on.

    Args:
        shared, apart: the same completions with and without shared rows.
        noise: KL to the sampler (nats) that rounding explains.
    """
    live = shared.live  # the same tokens in the same order in both
    sums = {"tokens": live.sum()}
    with evaluating(engine):
        for name, batch in (("together", shared), ("alone", apart)):
            logp = stats_of(engine, batch).logp
            sums[name] = sampler_kl(batch.sampler_logp, logp, live).sum()
    total = collectives.sum_named(sums)
    together, alone = (total[name] / max(1.0, total["tokens"]) for name in ("together", "alone"))
    if not together > noise + 4.0 * alone:
        return ""
    return f"loss/sampler_kl is {together:.2g} in shared rows and {alone:.2g} in rows of their own"


def check_sampler_kl(kl: float, bound: float) -> None:
    """Refuse an update on other log-probs than the sampler's, though the weights are the same.

    Args:
        kl: `loss/sampler_kl` over all ranks, of an update before which the weights are still the
            sampler's.
        bound: `TrainConfig.sampler_kl_bound`.

    Raises:
        PapoError: `kl` exceeds `bound`; NaN does not.
    """
    if kl > bound:
        raise PapoError(
            f"loss/sampler_kl={kl:.3g}: expected at most {bound:.3g} before the weights change; "
            "training sees other log-probs than sampling, likely because of "
            "model.attn_implementation, an attention window or padding that one of them ignores, "
            "or dropout; loss.max_sampler_kl sets the bound"
        )
