"""Parts 2 and 3: steps taken alone from the same weights, predicted and measured.

A row a batch, appended to `isolated-<task>.jsonl`; a run that was cut short goes on after its last
one. The batches that come before are the same ones every time, and are computed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.validity.records import Records
from experiments.validity.scores import batch_scores, step_length
from experiments.validity.workbench import Batch, Side, Vector, Workbench, dot, use_threads
from papo.model.attention import shared_prompts
from papo.model.load import decoder_of
from papo_kernels import TokenStats

OTHERS = 8
DETAILED = 24  # batches with every size, bfloat16 and tokens
BATCHES = {"chain_sum": 100, "mawps": 40}
SEED = 1
DECAY = 0.8  # of the averaged gradients
SIZES = {
    "sgd": (0.001, 0.004, 0.016),
    "adam": (1e-6, 4e-6, 1.6e-5),
    "sign": (1e-6, 4e-6, 1.6e-5),
}
MAIN = {kind: sizes[1] for kind, sizes in SIZES.items()}
BF16_SIZES = (4e-6, 1.6e-5)
BLOCKS = (1, 4, 8, 15)
EVERY = (16, 256)
TRUE_CHANGE, SHARED_CHANGE = 0.02, 0.1  # nats along which log-probs are differentiated


@dataclass
class Others:
    """Means over the batches that come before.

    Attributes:
        square: of the squared policy gradient.
        square_bf16: the same of the bfloat16 side.
        entropy: gradient of the mean entropy.
        another: the last batch's.
        quarter, prompt: running averages of those of a quarter, not yet bias-corrected.
    """

    square: Vector = field(default_factory=list)
    square_bf16: Vector = field(default_factory=list)
    entropy: Vector = field(default_factory=list)
    another: Vector = field(default_factory=list)
    quarter: Vector = field(default_factory=list)
    prompt: Vector = field(default_factory=list)

    def take(self, bench: Workbench, batch: Batch) -> None:
        """Another of the batches that come before."""
        share = 1.0 / OTHERS
        gradient = bench.policy_gradient(batch.micro, bench.float32)
        self.square = _added(self.square, (g.square_() for g in gradient), share)
        if bench.bfloat16 is not None:
            gradient = bench.policy_gradient(batch.micro, bench.bfloat16)
            self.square_bf16 = _added(self.square_bf16, (g.square_() for g in gradient), share)
        parts = EntropyGradients.of(bench, batch)
        self.another = parts.own
        self.entropy = _added(self.entropy, parts.own, share)
        for average in (*self.quarter, *self.prompt):
            average.mul_(DECAY)
        self.quarter = _added(self.quarter, parts.quarter, 1.0 - DECAY)
        self.prompt = _added(self.prompt, parts.prompt, 1.0 - DECAY)


def _added(total: Vector, vector: Iterable[Tensor], factor: float) -> Vector:
    if not total:
        return [x * factor for x in vector]
    return [t.add_(x, alpha=factor) for t, x in zip(total, vector, strict=True)]


@dataclass
class EntropyGradients:
    """Gradients of the mean entropy.

    Attributes:
        own: over all of a batch's tokens.
        quarter: over two completions of each prompt.
        prompt: over all completions of one prompt.
        seconds: that each took.
    """

    own: Vector
    quarter: Vector
    prompt: Vector
    seconds: dict[str, float]

    @classmethod
    def of(cls, bench: Workbench, batch: Batch) -> EntropyGradients:
        """In as many passes as `Batch.parts` has, so that every completion is in one of them."""
        sums, seconds, counts = [], [], []
        for part in batch.parts():
            begin = time.perf_counter()
            sums.append(bench.entropy_gradient(part, bench.float32))
            seconds.append(time.perf_counter() - begin)
            counts.append(sum(len(s.response_ids) for s in part))
        both, first, each, rest = sums
        quarter = [(a + b) / (counts[0] + counts[2]) for a, b in zip(both, each, strict=True)]
        prompt = [a.add_(b) for a, b in zip(both, first, strict=True)]
        rest = [r.add_(e).add_(p) for r, e, p in zip(rest, each, prompt, strict=True)]
        return cls(
            [r.div_(sum(counts)) for r in rest],
            quarter,
            [p.div_(counts[0] + counts[1]) for p in prompt],
            {
                "own": sum(seconds),
                "own quarter": seconds[0] + seconds[2],
                "own prompt": seconds[0] + seconds[1],
            },
        )


def divisors(kind: str, gradient: Vector, square: Vector) -> Iterator[Tensor]:
    """What `sgd` and `adam` divide the gradient by, a tensor at a time."""
    for g, v in zip(gradient, square, strict=True):
        if kind == "sgd":
            yield torch.ones(())
        else:
            yield ((v * OTHERS + g.square()) / (OTHERS + 1)).sqrt() + 1e-8


def scaled(kind: str, gradient: Vector, square: Vector) -> Iterator[Tensor]:
    """What a step of size 1 subtracts from the weights, a tensor at a time."""
    if kind == "sign":
        yield from (g.sign() for g in gradient)
    else:
        pairs = zip(gradient, divisors(kind, gradient, square), strict=True)
        yield from (g / d for g, d in pairs)


def block_of(name: str) -> int:
    """Number of a parameter's block, -1 where it is in none."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


class Isolated:
    """The measurements of a batch.

    Args:
        bench: at the weights that every step starts from.
        others: of the batches before.
    """

    def __init__(self, bench: Workbench, others: Others) -> None:
        self._bench = bench
        self._others = others
        self._blocks = [block_of(name) for name in bench.names]

    def row(self, batch: Batch, *, detailed: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A batch's record, and its tokens' (empty unless `detailed`)."""
        bench, side = self._bench, self._bench.float32
        begin = time.perf_counter()
        gradient = bench.policy_gradient(batch.micro, side)
        policy_seconds = time.perf_counter() - begin
        parts = EntropyGradients.of(bench, batch)
        begin = time.perf_counter()
        base = side.stats(batch.micro)
        pass_seconds = time.perf_counter() - begin
        averaged = self._with_own(self._others.quarter, parts.quarter)
        named = {
            "own": parts.own,
            "own quarter": parts.quarter,
            "own prompt": parts.prompt,
            "another": self._others.another,
            "others": self._others.entropy,
            "averaged": averaged,
            "averaged prompts": self._with_own(self._others.prompt, parts.prompt),
        }
        scores = batch_scores(base, batch.micro)
        length = step_length(self._logits(batch), batch.micro)
        row: dict[str, Any] = {
            "tokens": batch.tokens,
            "reward": batch.reward,
            "scores": scores,
            "polarity over step length": sum(scores["polarity"]) / length,
            "first_order": {k: self._first_order(k, gradient, named) for k in SIZES},
            "cosine": {k: _cosine(v, parts.own) for k, v in named.items() if k != "own"},
            "seconds": {
                "sampling": batch.seconds,
                "policy gradient": policy_seconds,
                "pass": pass_seconds,
                **parts.seconds,
            },
        }
        row["measured"], tokens = self._measured(batch, gradient, base, detailed)
        if detailed:
            tokens |= self._tokens(batch, base, gradient, parts.own, averaged)
            self._add_bf16(row, batch, averaged)
        return row, tokens

    def _with_own(self, average: Vector, part: Vector) -> Vector:
        """A running average with this batch's part, bias-corrected."""
        correction = 1.0 - DECAY ** (OTHERS + 1)
        return [
            (a * DECAY + x * (1.0 - DECAY)) / correction for a, x in zip(average, part, strict=True)
        ]

    def _logits(self, batch: Batch) -> Tensor:
        """Float32 [N, V] of the response tokens, divided by the temperature."""
        causal_lm = self._bench.float32.policy.causal_lm
        with torch.no_grad():
            hidden = _hidden(self._bench.float32, batch)
            logits: Tensor = causal_lm.get_output_embeddings()(hidden)
        return logits / self._bench.config.rollout.temperature

    def _first_order(
        self, kind: str, gradient: Vector, named: Mapping[str, Vector]
    ) -> dict[str, float]:
        """Products with a step of size 1, by name, and parts of that of `others`."""
        total = dict.fromkeys(named, 0.0)
        total |= {f"others, last {k} blocks": 0.0 for k in BLOCKS}
        total |= {f"others, every {k}th": 0.0 for k in EVERY}
        last = max(self._blocks)
        for i, step in enumerate(scaled(kind, gradient, self._others.square)):
            for name, vector in named.items():
                total[name] -= dot(step, vector[i])
            others, flat = self._others.entropy[i], step.flatten()
            for k in BLOCKS:
                if self._blocks[i] > last - k:
                    total[f"others, last {k} blocks"] -= dot(step, others)
            for k in EVERY:
                total[f"others, every {k}th"] -= dot(flat[::k], others.flatten()[::k])
        return total

    def _measured(
        self, batch: Batch, gradient: Vector, base: TokenStats, detailed: bool
    ) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
        """Changes of the mean entropy by kind and size; with `detailed`, also of each token's."""
        measured: dict[str, dict[str, float]] = {}
        tokens: dict[str, Tensor] = {}
        for kind, sizes in SIZES.items():
            step = list(scaled(kind, gradient, self._others.square))
            measured[kind] = {}
            for size in sizes if detailed else (MAIN[kind],):
                with self._bench.moved(step, -size):
                    after = self._bench.float32.stats(batch.micro)
                change = after.entropy.double() - base.entropy.double()
                measured[kind][repr(size)] = float(change.mean())
                if detailed and size == MAIN[kind] and kind != "sign":
                    tokens[f"measured {kind}"] = change.float()
        return measured, tokens

    def _tokens(
        self, batch: Batch, base: TokenStats, gradient: Vector, own: Vector, averaged: Vector
    ) -> dict[str, Tensor]:
        """What part 3 has of each token."""
        micro = batch.micro
        pull = micro.advantages * micro.token_weight
        found = {
            "advantage": micro.advantages,
            "weight": micro.token_weight,
            "logp": base.logp,
            "entropy": base.entropy,
            "unit_polarity": base.unit_polarity,
            "position": torch.cat(
                [torch.arange(len(s.response_ids)).float() for s in batch.sequences]
            ),
        }
        for kind in ("sgd", "adam"):
            along = self._preconditioned(kind, gradient, own)
            per_unit = sum(dot(a, b) for a, b in zip(along, own, strict=True))
            size = TRUE_CHANGE / per_unit
            up, down = (self._logp_moved(batch, along, s) for s in (size, -size))
            found[f"true {kind}"] = pull * (up - down) / (2.0 * size)
            along = self._preconditioned(kind, gradient, averaged)
            per_unit = sum(dot(a, b) for a, b in zip(along, averaged, strict=True))
            size = SHARED_CHANGE / per_unit
            up = self._logp_moved(batch, along, size)
            found[f"shared {kind}"] = pull * (up - base.logp) / size
        return found

    def _preconditioned(self, kind: str, gradient: Vector, vector: Vector) -> Vector:
        """A vector divided as a step divides the gradient."""
        divided = divisors(kind, gradient, self._others.square)
        return [x / d for x, d in zip(vector, divided, strict=True)]

    def _logp_moved(self, batch: Batch, along: Vector, size: float) -> Tensor:
        with self._bench.moved(along, size):
            return self._bench.float32.stats(batch.micro).logp

    def _rounded(self, step: Vector, size: float) -> Vector:
        """What a step of a size does to the bfloat16 weights, over its size."""
        masters = zip(self._bench.float32.parameters, step, strict=True)
        return [
            (p.bfloat16().float() - p.sub(x, alpha=size).bfloat16().float()) / size
            for p, x in masters
        ]

    def _add_bf16(self, row: dict[str, Any], batch: Batch, averaged: Vector) -> None:
        """What the trainer's bfloat16 makes of an Adam step."""
        bench, side = self._bench, self._bench.bfloat16
        assert side is not None
        base = side.stats(batch.micro)
        gradient = bench.policy_gradient(batch.micro, side)
        own = [g / batch.tokens for g in bench.entropy_gradient(batch.sequences, side)]
        step = list(scaled("adam", gradient, self._others.square_bf16))
        named = {"own": own, "others": self._others.entropy, "averaged": averaged}
        with torch.no_grad():
            low = self._rounded(step, BF16_SIZES[0])
        row["first_order"]["adam-bf16"] = {
            **{name: _product(step, vector) for name, vector in named.items()},
            **{f"{name}, rounded": _product(low, vector) for name, vector in named.items()},
        }
        row["measured"]["adam-bf16"] = {}
        for size in BF16_SIZES:
            with bench.moved(step, -size):
                after = side.stats(batch.micro)
            change = (after.entropy.double() - base.entropy.double()).mean()
            row["measured"]["adam-bf16"][repr(size)] = float(change)


def _product(step: Vector, vector: Vector) -> float:
    """First-order change of what `vector` is the gradient of, for a step of size 1."""
    return -sum(dot(a, b) for a, b in zip(step, vector, strict=True))


def _hidden(side: Side, batch: Batch) -> Tensor:
    """Hidden states that predict the response tokens, [N, D]."""
    micro = batch.micro
    with shared_prompts(micro.segment_ids, micro.position_ids):
        hidden: Tensor = decoder_of(side.policy.causal_lm)(
            input_ids=micro.input_ids,
            attention_mask=micro.attention_mask,
            position_ids=micro.position_ids,
            use_cache=False,
        ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, micro.logit_index)


def _cosine(a: Vector, b: Vector) -> float:
    products = [(dot(x, y), dot(x, x), dot(y, y)) for x, y in zip(a, b, strict=True)]
    between, left, right = (sum(column) for column in zip(*products, strict=True))
    return between / (left * right) ** 0.5


def others_of(bench: Workbench, batches: Iterator[Batch]) -> Others:
    """From the batches that come first."""
    others = Others()
    for batch in islice(batches, OTHERS):
        others.take(bench, batch)
    return others


def settings(bench: Workbench) -> dict[str, Any]:
    """What decides a row, beside the code."""
    return {
        "config": bench.config.model_dump(mode="json"),
        "others": OTHERS,
        "decay": DECAY,
        "sizes": SIZES,
        "bf16_sizes": BF16_SIZES,
        "changes": [TRUE_CHANGE, SHARED_CHANGE],
    }


def main(folder: Path, task: str, overrides: list[str]) -> None:
    """Measure what is missing of a task's batches.

    Raises:
        PapoError: an option is wrong, or the records are of other settings.
    """
    use_threads()
    tokens_folder = folder / f"tokens-{task}"
    with Workbench(task, SEED, overrides, bf16=True) as bench:
        records = Records(folder / f"isolated-{task}.jsonl", settings(bench))
        tokens_folder.mkdir(exist_ok=True)
        batches = bench.batches()
        study = Isolated(bench, others_of(bench, batches))
        for i, batch in enumerate(islice(batches, BATCHES[task])):
            if i in records.done:
                continue
            row, tokens = study.row(batch, detailed=i < DETAILED)
            if tokens:
                torch.save(tokens, tokens_folder / f"{i:04d}.pt")
            records.append(i, [row])
            print(f"{task} {i + 1}/{BATCHES[task]}", flush=True)
