"""A policy in this process, its batches and its gradients: what a trainer's step is made of, so
that a step can be taken alone and taken back."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from papo.config import load_config
from papo.data.problems import ProblemSource
from papo.model.load import eos_ids, load_causal_lm, load_tokenizer
from papo.policy.batch import Batcher, MicroBatch, TrainingSequence
from papo.policy.module import Policy
from papo.policy.objective import objective_of
from papo.policy.passes import loss_of, stats_of
from papo.record.telemetry import StageClock
from papo.reward.pool import RewardPool
from papo.rollout import HFSampler
from papo.train import experience
from papo.train.rounds import SamplingRounds
from papo_kernels import TokenStats

Vector = list[Tensor]  # one tensor per parameter, of its shape

# Which config a task is, and what the study changes of it.
TASKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "chain_sum": ("configs/smollm2-arithmetic.yaml", ("rollout.max_new_tokens=16",)),
    "mawps": (
        "configs/mawps.yaml",
        ("rollout.max_new_tokens=24", "rollout.prompts_per_step=4"),
    ),
}
# Rows of the padded batches are multiples of it, as in the trainer on a CPU.
_WIDTHS = 32


@dataclass(frozen=True)
class Batch:
    """The completions of a step.

    Attributes:
        sequences: with token weights.
        micro: all of them in one forward pass.
        reward: mean over the completions.
        seconds: that sampling took.
    """

    sequences: list[TrainingSequence]
    micro: MicroBatch
    reward: float
    seconds: float

    def parts(self) -> tuple[list[TrainingSequence], ...]:
        """Two completions of the first prompt, its others, two of each other prompt, the rest.

        The first and the second are a quarter of the batch, and so are the first and the third.
        """
        seen: dict[int, int] = {}
        parts: tuple[list[TrainingSequence], ...] = ([], [], [], [])
        for sequence in self.sequences:
            place = seen.get(sequence.group, 0)
            seen[sequence.group] = place + 1
            first = sequence.group == self.sequences[0].group
            parts[(0 if first else 2) + (place not in (0, 4))].append(sequence)
        return parts

    @property
    def tokens(self) -> int:
        """Response tokens."""
        return len(self.micro.targets)


@dataclass
class Side:
    """The policy in one compute dtype.

    Attributes:
        parameters: what it computes with, in a fixed order.
    """

    policy: Policy
    parameters: Vector = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.policy.causal_lm.parameters())
        self.policy.train(True)

    def stats(self, micro: MicroBatch) -> TokenStats:
        """Float32 [N] each."""
        return stats_of(self.policy, micro)

    def take_gradient(self) -> Vector:
        """What `backward` has left, in float32; 0 from then on."""
        taken = []
        for parameter in self.parameters:
            assert parameter.grad is not None
            taken.append(parameter.grad.detach().float())
            parameter.grad = None
        return taken


class Workbench:
    """Batches of a task, and gradients at the weights that the model has come with.

    Args:
        task: a key of `TASKS`.
        seed: of problems and samples.
        overrides: further options of the config, `section.key=value`.
        bf16: have a bfloat16 side too.

    Attributes:
        names: of the parameters.
        float32, bfloat16: the sides; the masters are the former's weights.
    """

    def __init__(
        self, task: str, seed: int, overrides: Sequence[str] = (), *, bf16: bool = False
    ) -> None:
        path, changes = TASKS[task]
        options = ["method=grpo", "model.dtype=fp32", f"seed={seed}", *changes, *overrides]
        self.config = load_config(path, options)
        self._tokenizer = load_tokenizer(self.config.model)
        causal_lm, _ = load_causal_lm(self.config.model)
        temperature = self.config.rollout.temperature
        self.float32 = Side(Policy(causal_lm, temperature=temperature))
        self.names = [name for name, _ in causal_lm.named_parameters()]
        self._kept = [p.detach().clone() for p in self.float32.parameters]
        self.bfloat16: Side | None = None
        if bf16:
            twin = copy.deepcopy(causal_lm).bfloat16()
            self.bfloat16 = Side(Policy(twin, temperature=temperature))
        eos = eos_ids(causal_lm, self._tokenizer)
        pad = eos[0] if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        self._sampler = HFSampler(self._tokenizer, eos, pad, skip_special_tokens=True)
        self._problems = ProblemSource(self.config.data, self._tokenizer, seed)
        rows = self.config.optim.max_row_tokens
        self._batcher = Batcher(pad, rows, torch.device("cpu"), _WIDTHS)
        self._objective = objective_of(self.config.loss)
        reward = self.config.reward
        chosen = reward.chosen(self.config.data.source)
        self._rewards = RewardPool(reward, chosen, self.config.data.answer_field)

    def __enter__(self) -> Workbench:
        self._rewards.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rewards.__exit__(kind, error, trace)

    def batches(self) -> Iterator[Batch]:
        """Batches with something to learn from, without end, the same ones for the same seed."""
        step, clock = 0, StageClock()
        while True:
            begin = time.perf_counter()
            self.float32.policy.causal_lm.eval()
            cursor = step * self.config.rollout.prompts_per_step
            parts = (self._problems, self._sampler, self._rewards, self.float32.policy.causal_lm)
            groups = SamplingRounds(self.config, *parts, clock, step, cursor).next()
            self.float32.policy.train(True)
            step += 1
            if all(group.zero_spread for group in groups):
                continue
            sequences = experience.to_sequences(groups)
            weighted = experience.with_token_weights(sequences, self.config.loss)
            rewards = [r.value for group in groups for r in group.rewards]
            yield Batch(
                weighted,
                self.micro(weighted),
                sum(rewards) / len(rewards),
                time.perf_counter() - begin,
            )

    def micro(self, sequences: Sequence[TrainingSequence]) -> MicroBatch:
        """All of them in one forward pass."""
        return self._batcher.batch(sequences)

    def policy_gradient(self, micro: MicroBatch, side: Side) -> Vector:
        """Of the policy loss."""
        loss_of(side.policy, micro, self._objective, None).loss.backward()
        return side.take_gradient()

    def entropy_gradient(self, sequences: Sequence[TrainingSequence], side: Side) -> Vector:
        """Of the sum of the tokens' entropies."""
        stats_of(side.policy, self.micro(sequences), gradient=True).entropy.sum().backward()
        return side.take_gradient()

    @contextlib.contextmanager
    def moved(self, by: Iterator[Tensor] | Vector, factor: float) -> Iterator[None]:
        """Weights moved by `factor` times a vector inside, on both sides; put back at the end."""
        with torch.no_grad():
            for parameter, change in zip(self.float32.parameters, by, strict=True):
                parameter.add_(change, alpha=factor)
            self._round()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, kept in zip(self.float32.parameters, self._kept, strict=True):
                    parameter.copy_(kept)
                self._round()

    def _round(self) -> None:
        if self.bfloat16 is not None:
            for low, master in zip(self.bfloat16.parameters, self.float32.parameters, strict=True):
                low.copy_(master)


def dot(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape."""
    return float((a * b).sum())


def use_threads() -> None:
    """As many as OMP_NUM_THREADS says, where it says so."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
