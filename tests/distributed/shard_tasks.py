"""What each rank does in test_shards: `python -m tests.distributed.shard_tasks`.

Every `run_*` checks one thing on all ranks; its traceback, or nothing, is printed for the test.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from papo_kernels import Compute, Head, Logits, policy_loss, token_stats
from tests.distributed.shard_cases import (
    LOSS,
    ROWS,
    SPLITS,
    VOCAB,
    counted,
    some_case,
    split_case,
)
from tests.kernels.head_cases import (
    Traits,
    check_head_policy_loss,
    check_head_token_stats,
    make_head_case,
)

# ---- the same results ---------------------------------------------------------------------------


def run_rule(split: str) -> None:
    """The tolerance rule of the whole head, on every rank, for whole and for small chunks."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for chunk_bytes in (None, 3000):
            traits = Traits(rank=2, temperature=0.8)
            check_head_token_stats(some_case(split, traits, dtype=dtype), chunk_bytes=chunk_bytes)
            case = some_case(split, traits, dtype=dtype, loss=True, **LOSS)
            check_head_policy_loss(case, chunk_bytes=chunk_bytes)


def run_uneven() -> None:
    run_rule("uneven")


def run_empty() -> None:
    run_rule("empty")


def run_padding() -> None:
    """A shard of nothing but padding rows (SkyRL 2259), ids that no shard but
    one holds, next to rows of padding (CCE 59)."""
    run_rule("padding")


def run_kept_and_capped() -> None:
    """Kept ids and the soft cap act on each shard's own columns."""
    traits = Traits(kept=15, softcap=6.0, logit_scale=0.5)
    for split in SPLITS[dist.get_world_size()]:
        check_head_token_stats(some_case(split, traits))
        check_head_policy_loss(some_case(split, traits, loss=True), chunk_bytes=3000)


def run_several_ids() -> None:
    """k ids a row, in whichever shards they lie, the statistics of whole rows, and a temperature
    for each."""
    for split in SPLITS[dist.get_world_size()]:
        case = some_case(split, Traits(softcap=6.0), dtype=torch.float64)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(VOCAB, (23, 5), generator=g)
        ids[case.tokens.targets < 0] = ids[2, 0] = -100
        upstream = [torch.randn(shape, generator=g) for shape in ((23, 5), (23,), (23, 5), (23,))]
        upstream = [x.double() for x in upstream]
        options = {
            "temperature": torch.linspace(0.5, 2.0, 23),
            "compute": Compute(full_stats=True, chunk_bytes=3000),
        }
        z = case.tokens.logits.requires_grad_()
        expected = token_stats(Logits(z, softcap=6.0), ids, **options)
        (dz,) = torch.autograd.grad(expected[:4], z, upstream)
        leaves = case.leaves()
        actual = token_stats(case.logits(leaves), ids, **options)
        names = ("hidden", "bias")
        grads = torch.autograd.grad(actual[:4], [leaves[name] for name in names], upstream)
        weight = case.parameters["weight"][:VOCAB]
        padded = torch.nn.functional.pad(dz.sum(0), (0, ROWS - VOCAB))
        for a, e in zip((*actual, *grads), (*expected, dz @ weight, padded), strict=True):
            torch.testing.assert_close(a, e)


def run_masked_shard() -> None:
    """The whole first shard masked by its bias: the identity of the merge, gradient 0."""
    case = make_head_case(23, 12, ROWS, Traits(bias=True, vocab_size=VOCAB), loss=True)
    case.parameters["bias"][:37] = -torch.inf
    targets = case.tokens.targets
    targets = torch.where((targets >= 0) & (targets < 37), targets + 40, targets)
    case = replace(case, tokens=replace(case.tokens, targets=targets, token_weight=None))
    logits = torch.where(torch.arange(VOCAB) < 37, -torch.inf, case.tokens.logits)
    case = replace(case, tokens=replace(case.tokens, logits=logits))
    check_head_token_stats(split_case(case))


def run_masked_everywhere() -> None:
    """A token whose every logit is -inf on every rank is NaN, as in the whole row."""
    case = some_case()
    case.parameters["bias"][:] = -torch.inf
    stats = case.token_stats(case.leaves())
    counted = case.tokens.targets >= 0
    assert stats.logp[counted].isnan().all() and stats.entropy[counted].isnan().all()
    assert not stats.logp[~counted].any()


def run_nan() -> None:
    """A NaN hidden state spoils its row on all ranks; a NaN weight of one shard every row."""
    case = some_case(loss=True)
    good = case.token_stats(case.leaves())
    case.parameters["hidden"][1, 3] = torch.nan
    others = torch.arange(23) != 1
    for result in (case.token_stats(case.leaves()), case.policy_loss(case.leaves())):
        assert result.logp[1].isnan() and result.entropy[1].isnan()
    stats = case.token_stats(case.leaves())
    torch.testing.assert_close(stats.logp[others], good.logp[others], equal_nan=True)
    case.parameters["weight"][5, 0] = torch.nan  # in rank 0's shard
    stats = case.token_stats(case.leaves())
    assert stats.unit_polarity[case.tokens.targets >= 0].isnan().all()


def run_same_bits() -> None:
    """Outputs and the gradients of hidden and lora.a do not differ by a bit between ranks."""
    case = some_case(traits=Traits(rank=2), loss=True, **LOSS)
    leaves = case.leaves()
    out = case.policy_loss(leaves, chunk_bytes=3000)
    out.loss.backward()
    values = [*out[:-1], leaves["hidden"].grad, leaves["lora_a"].grad]
    mine = torch.cat([x.detach().reshape(-1) for x in values])
    everyone = mine.new_empty(dist.get_world_size() * len(mine))
    dist.all_gather_into_tensor(everyone, mine)
    for other in everyone.view(-1, len(mine)):
        assert torch.equal(other, mine)


def run_tied() -> None:
    """A shard that is embedding and head receives both gradients; hidden is replicated."""
    case = split_case(make_head_case(23, 12, ROWS, Traits(vocab_size=VOCAB)))
    rank, targets = dist.get_rank(), case.tokens.targets
    tokens = targets.clamp(min=0)
    whole = case.parameters["weight"].nan_to_num(0.0)
    first = sum(case.split[:rank])
    rows = slice(first, first + case.split[rank])

    def lookup(weight: Tensor, start: int) -> Tensor:
        local = tokens - start
        inside = (local >= 0) & (local < len(weight))
        return torch.where(inside[:, None], weight[torch.where(inside, local, 0)], 0.0)

    unsplit = whole.clone().requires_grad_()
    hidden = torch.tanh(lookup(unsplit, 0))
    whole_head = Head(unsplit, vocab_size=VOCAB)
    token_stats(whole_head(hidden), targets).logp.sum().backward()
    shard = whole[rows].clone().requires_grad_()
    found = lookup(shard, first)
    total = found.detach().clone()
    dist.all_reduce(total)
    hidden = torch.tanh(found + (total - found).detach())
    head = Head(shard, vocab_size=VOCAB, group="world")
    stats = token_stats(head(hidden), targets)
    stats.logp.sum().backward()
    torch.testing.assert_close(shard.grad, unsplit.grad[rows], rtol=1e-4, atol=1e-5)


# ---- what it costs ------------------------------------------------------------------------------


def run_collectives() -> None:
    """One exchange, one gather per chunk, one all-reduce; none in the backward of the loss."""
    case = some_case(traits=Traits(rank=2), loss=True)
    leaves = case.leaves()
    hidden = leaves["hidden"]
    with counted() as calls:
        out = case.policy_loss(leaves)
    assert calls == {"all_gather_into_tensor": 2, "all_reduce": 1}, calls
    with counted() as calls:
        torch.autograd.grad(out.loss, hidden)
    assert not calls, calls
    active = int(((case.tokens.targets >= 0) & (case.tokens.token_weight != 0)).sum())
    with counted() as calls:
        replace(case, told=True).policy_loss(leaves, chunk_bytes=1)
    assert calls == {"all_gather_into_tensor": active, "all_reduce": 1}, (calls, active)
    for chunk_bytes in (None, 1):
        with counted() as calls:
            stats = case.token_stats(leaves, chunk_bytes=chunk_bytes)
        assert calls == {"all_gather_into_tensor": 2}, calls
        with counted() as calls:
            torch.autograd.grad(stats.logp.sum(), [hidden, leaves["lora_a"]])
        assert calls == {"all_reduce": 1}, calls


def run_workspaces() -> None:
    """Ranks with workspaces of their own (another device, another chunk_bytes) take the smallest,
    so that their chunks, and with them their collectives, agree."""
    check_head_policy_loss(some_case(loss=True), chunk_bytes=2000 + 9000 * dist.get_rank())


def run_no_grad() -> None:
    """No all-reduce under no_grad or for frozen hidden states, and the same values."""
    case = some_case(loss=True)
    expected = case.policy_loss(case.leaves())
    leaves = case.leaves()
    with torch.no_grad(), counted() as calls:
        out = case.policy_loss(leaves)
        stats = case.token_stats(leaves)
    assert calls == {"all_gather_into_tensor": 4}, calls
    assert not out.loss.requires_grad and not stats.logp.requires_grad
    torch.testing.assert_close(list(out), [x.detach() for x in expected])
    leaves["hidden"].requires_grad_(False)
    with counted() as calls:
        loss = case.policy_loss(leaves).loss
    assert calls == {"all_gather_into_tensor": 2}, calls
    loss.backward()
    assert leaves["weight"].grad.any()


def run_scaled_and_kept() -> None:
    """The upstream scalar, and a graph that is kept."""
    case = some_case(loss=True)
    leaves = case.leaves()
    loss = case.policy_loss(leaves).loss
    grads = [
        torch.autograd.grad(f * loss, [leaves["hidden"], leaves["weight"]], retain_graph=f != 1.0)
        for f in (-2.0, 1.0)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, -2.0 * b)


def run_subgroup() -> None:
    """Two groups of half the ranks, each with the whole head of its own."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world < 4:
        return
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    seed = rank // 2
    case = make_head_case(11, 8, ROWS, Traits(vocab_size=VOCAB), seed=seed, loss=True)
    check_head_policy_loss(split_case(case, "uneven", groups[seed]))


# ---- the same errors ----------------------------------------------------------------------------


def refused(kind: type, message: str, call: Any) -> None:
    with pytest.raises(kind, match=message):
        call()
    dist.barrier()  # every rank got here: none waits in a collective


def run_errors() -> None:
    """What one rank refuses every rank refuses, naming it."""
    case, rank = some_case(), dist.get_rank()
    shard, targets = case.shards(case.leaves()), case.tokens.targets
    hidden, weight = shard["hidden"].detach(), shard["weight"].detach()

    def head(weight: Any = weight, **more: Any) -> Head:
        return Head(weight, vocab_size=VOCAB, group=dist.group.WORLD, **more)

    def stats(of: Head, targets: Any = targets, backend: str | None = None) -> Any:
        return token_stats(of(hidden), targets, compute=Compute(backend))

    other = weight.double() if rank == 1 else weight
    refused(
        TypeError,
        "weight: expected torch.float32 like hidden.*on rank 1",
        lambda: stats(head(other)),
    )
    other = weight[:, :5] if rank == 1 else weight
    refused(
        ValueError, r"hidden: expected shape \[\.\.\., 5\].*on rank 1", lambda: stats(head(other))
    )
    other = weight.new_empty(0) if rank == 0 else weight
    refused(ValueError, "zero elements.*on rank 0", lambda: stats(head(other)))
    refused(
        ValueError,
        r"softcap: expected None or a number in \[1e-18, 1e\+18\], got 0.0$",
        lambda: stats(head(softcap=0.0)),
    )
    other = targets.clone()
    other[2] = VOCAB
    refused(
        ValueError,
        r"targets: expected values in \[0, 80\) .*, got 80",
        lambda: stats(head(), targets=other),
    )
    bias = torch.zeros(3) if rank == 1 else None
    refused(
        ValueError, r"bias: expected shape .*on rank 1 of the group", lambda: stats(head(bias=bias))
    )
    backend = "cuda" if rank == 1 else None
    refused(
        ValueError,
        "backend: 'cuda' cannot serve.*on rank 1",
        lambda: stats(head(), backend=backend),
    )
    weights = torch.ones(targets.shape)
    advantages = weights[1:] if rank == 1 else weights
    refused(
        ValueError,
        "advantages: expected shape .*on rank 1",
        lambda: policy_loss(head()(hidden), targets, advantages, weights),
    )


def run_disagreement() -> None:
    """Arguments that must be the same on every rank and are not."""
    case, rank = some_case(), dist.get_rank()
    shard, targets = case.shards(case.leaves()), case.tokens.targets
    hidden, weight = shard["hidden"].detach(), shard["weight"].detach()

    def stats(hidden: Any = hidden, targets: Any = targets, **more: Any) -> Any:
        return token_stats(Head(weight, group=dist.group.WORLD, **more)(hidden), targets)

    refused(
        ValueError,
        "number of tokens: expected the same",
        lambda: stats(hidden[rank:], targets[rank:]),
    )
    refused(ValueError, r"vocab_size: .* got \[70, 71", lambda: stats(vocab_size=70 + rank))
    other = targets + (rank == 1) * (targets == 3)
    other[1] = rank
    refused(
        ValueError, "sum of targets: expected the same on every rank", lambda: stats(targets=other)
    )
    refused(
        ValueError,
        r"vocab_size: .* \(rows of weight on all ranks\), got 101",
        lambda: stats(vocab_size=101),
    )
    refused(
        ValueError, r"vocab_size: expected a value in \[1, .*, got -5", lambda: stats(vocab_size=-5)
    )
    wrong = [1] * dist.get_world_size()
    if all(rows != 1 for rows in case.split):
        refused(ValueError, "shards: expected", lambda: stats(shards=wrong))


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    results = {}
    for name in sorted(x for x in globals() if x.startswith("run_") and x != "run_rule"):
        try:
            globals()[name]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
            # The others may wait for this rank: say which task it was and end all of them.
            break
    print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
