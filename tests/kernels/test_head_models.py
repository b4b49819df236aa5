"""What heads of real models have: tied embeddings, LoRA, filters, autocast, ZeRO-3's weight."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from papo_kernels import Compute, Head, KeepSet, LoRA, policy_loss, token_stats
from papo_kernels.head import keep as keep_module
from papo_kernels.head.keep import KeepMask
from tests.kernels.head_cases import (
    Traits,
    check_head_policy_loss,
    check_head_token_stats,
    make_head_case,
    make_keep,
)


def small(n=12, d=8, v=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).requires_grad_()
    weight = torch.randn(v, d, generator=g).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=g)


def test_tied_embeddings_receive_both_gradients(backend, device):
    """The same parameter as embedding and head: autograd adds the two."""
    embedding = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = torch.arange(12, device=device) * 3
    targets = tokens + 1
    results = []
    for held in (True, False):
        weight = embedding.clone().requires_grad_()
        hidden = torch.tanh(F.embedding(tokens, weight))
        weights = torch.full((12,), 1 / 12, device=device)
        inputs = (targets, weights * 3, weights)
        logits = hidden @ weight.t() if held else Head(weight)(hidden)
        out = policy_loss(logits, *inputs, compute=Compute(backend, chunk_bytes=900))
        out.loss.backward()
        results.append(weight.grad)
    torch.testing.assert_close(*results)


def test_small_sizes(backend, device):
    """V from 1 to 17 (one id: logp = H = 0), D = 1, one token, none."""
    for v in range(1, 18):
        check_head_token_stats(make_head_case(3, 1, v, device=device), backend=backend)
    one = make_head_case(4, 3, 1, device=device)
    stats = one.token_stats(one.leaves(), backend=backend)
    assert not stats.logp[:2].any() and not stats.entropy.any() and not stats.unit_polarity.any()
    hidden, weight, _ = (x.to(device) for x in small())
    leaf = weight.detach().requires_grad_()
    none = torch.empty(0, dtype=torch.int64, device=device)
    empty = torch.empty(0, device=device)
    logits, compute = Head(leaf)(hidden[:0]), Compute(backend)
    out = policy_loss(logits, none, empty, empty, compute=compute)
    out.loss.backward()
    assert out.loss.item() == 0.0 and out.logp.shape == (0,) and not leaf.grad.any()
    stats = token_stats(logits, none, compute=compute)
    assert stats.lse.shape == (0,)


def test_float16(backend, device):
    for loss in (False, True):
        traits = Traits(bias=True)
        case = make_head_case(9, 16, 50, traits, dtype=torch.float16, device=device, loss=loss)
        check = check_head_policy_loss if loss else check_head_token_stats
        check(case, backend=backend, chunk_bytes=2000)


def test_a_nan_hidden_state_spoils_its_own_row_only(backend, device):
    hidden, weight, targets = (x.to(device) for x in small())
    hidden = hidden.detach().clone()
    head = Head(weight)
    whole = token_stats(head(hidden), targets, compute=Compute(backend))
    hidden[4, 2] = torch.nan
    leaf = hidden.requires_grad_()
    stats = token_stats(head(leaf), targets, compute=Compute(backend, chunk_bytes=1000))
    others = torch.arange(12, device=device) != 4
    for a, b in zip(stats, whole, strict=True):
        assert a[4].isnan()
        torch.testing.assert_close(a[others], b[others])
    (dhidden,) = torch.autograd.grad(stats.logp[others].sum() + stats.logp[4], leaf)
    assert dhidden[4].isnan().all() and dhidden[others].isfinite().all()


def test_double_backward_is_refused(backend, device):
    hidden, weight, targets = (
        x.to(device).detach().requires_grad_(x.requires_grad) for x in small()
    )
    stats = token_stats(Head(weight)(hidden), targets, compute=Compute(backend))
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.grad(stats.logp.sum(), hidden, create_graph=True)


def test_upstream_gradients_of_every_kind(backend, device):
    """Each statistic alone, absent ones, zeros, an expanded scalar: their sum is the whole."""
    hidden, weight, targets = (x.to(device) for x in small())
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
    logits, compute = Head(leaves[1])(leaves[0]), Compute(backend, chunk_bytes=700)

    def grads(of):
        stats = token_stats(logits, targets, compute=compute)
        return torch.autograd.grad(of(stats), leaves)

    alone = [grads(lambda s, i=i: s[i].sum()) for i in range(3)]
    together = grads(lambda s: s.logp.sum() + s.entropy.sum() + s.unit_polarity.sum())
    for k in range(2):
        torch.testing.assert_close(alone[0][k] + alone[1][k] + alone[2][k], together[k])
    assert not any(g.any() for g in grads(lambda s: 0.0 * s.entropy.sum()))


def test_autocast_casts_as_linear_does():
    """float32 parameters under bfloat16 autocast: bfloat16 products, float32 gradients."""
    hidden, weight, targets = small()
    with torch.autocast("cpu", torch.bfloat16):
        stats = token_stats(Head(weight)(hidden), targets)
    half = token_stats(Head(weight.bfloat16())(hidden.bfloat16()), targets)
    assert torch.equal(stats.logp, half.logp) and stats.logp.dtype == torch.float32
    stats.logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32 and weight.grad.any()


def test_one_head_serves_calls_inside_and_outside_autocast():
    """A call's cast is its own: the head goes on holding the parameters, which a step changes."""
    hidden, weight, targets = small()
    g = torch.Generator().manual_seed(1)
    shapes = ((40,), (2, 8), (40, 2))
    bias, *factors = (torch.randn(s, generator=g).requires_grad_() for s in shapes)
    lora = LoRA(*factors, 0.5)
    head = Head(weight, bias, lora, softcap=6.0)
    leaves = (hidden, weight, bias, lora.a, lora.b)
    for _ in range(2):
        plain = token_stats(head(hidden), targets)
        with torch.autocast("cpu", torch.bfloat16):
            inside = [token_stats(head(hidden), targets) for _ in range(2)]
        cast = [x.detach().bfloat16() for x in leaves]
        half = Head(*cast[1:3], LoRA(*cast[3:], 0.5), softcap=6.0)(cast[0])
        assert torch.equal(inside[0].logp, token_stats(half, targets).logp)
        assert torch.equal(inside[0].logp, inside[1].logp)
        assert torch.equal(token_stats(head(hidden), targets).logp, plain.logp)
        assert not torch.equal(inside[0].logp, plain.logp)
        assert head.weight is weight and head.bias is bias and head.lora is lora
        grads = torch.autograd.grad(inside[1].logp.sum(), leaves)
        assert all(g.dtype == torch.float32 and g.any() for g in grads)
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(0.9)


# ---- LoRA ---------------------------------------------------------------------------------------


def test_a_lora_head_is_the_merged_head(backend, device):
    """Against W + scaling B A formed here, with every factor's gradient."""
    hidden, weight, targets = (x.to(device) for x in small())
    g = torch.Generator().manual_seed(2)
    a = torch.randn(3, 8, generator=g).to(device).requires_grad_()
    b = torch.randn(40, 3, generator=g).to(device).requires_grad_()
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_(), a, b)

    def total(stats):
        return stats.logp.sum() - 0.5 * stats.entropy.sum() + stats.unit_polarity.sum()

    merged = leaves[0] @ (leaves[1] + 0.7 * b @ a).t()
    compute = Compute(backend, chunk_bytes=900)
    expected = torch.autograd.grad(total(token_stats(merged, targets, compute=compute)), leaves)
    head = Head(leaves[1], lora=LoRA(a, b, 0.7))
    stats = token_stats(head(leaves[0]), targets, compute=compute)
    for x, y in zip(torch.autograd.grad(total(stats), leaves), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# ---- filters ------------------------------------------------------------------------------------


def top_k(z, k):
    return z >= z.topk(k, dim=1).values[:, -1:]


def top_p(z, p):
    probability, order = torch.softmax(z, 1).sort(1, descending=True)
    kept = probability.cumsum(1) - probability < p
    return torch.zeros_like(kept).scatter(1, order, kept)


def min_p(z, p):
    probability = torch.softmax(z, 1)
    return probability >= p * probability.amax(1, keepdim=True)


FILTERS = {
    "top_k": lambda z: top_k(z, 5),
    "top_p": lambda z: top_p(z, 0.8),
    "min_p": lambda z: min_p(z, 0.2),
}


@pytest.mark.parametrize("name", FILTERS)
def test_statistics_of_the_filtered_distribution(name, backend, device):
    """The trainer's logp must be that of the distribution the sampler drew from (trl #7221 kin: TRL
    #6789, prime-rl 3235, vllm 49577); a fused head had no way to say so."""
    hidden, weight, _ = (x.detach().to(device) for x in small(n=20))
    z = hidden @ weight.t()
    mask = FILTERS[name](z)
    assert 1 < mask.sum() < mask.numel()
    targets = torch.where(mask, z, -torch.inf).argmax(1)
    targets[1::2] = torch.where(mask, z, torch.inf).argmin(1)[1::2]
    keep = KeepSet(F.pad(mask.sum(1).cumsum(0), (1, 0)), mask.nonzero()[:, 1].contiguous())
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    masked = (leaves[0] @ leaves[1].t()).masked_fill(~mask, -torch.inf)
    compute = Compute(backend, chunk_bytes=2000)
    expected = token_stats(masked, targets, compute=compute)
    stats = token_stats(Head(leaves[1])(leaves[0], keep=keep), targets, compute=compute)
    for a, b in zip(stats, expected, strict=True):
        torch.testing.assert_close(a, b)
    total = [s.logp.sum() + s.entropy.sum() + s.unit_polarity.sum() for s in (stats, expected)]
    for a, b in zip(*(torch.autograd.grad(t, leaves) for t in total), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (stats.logp > token_stats(z, targets, compute=compute).logp).all()


@pytest.mark.parametrize("group", [1, 7, 10_000])
def test_masking_does_not_depend_on_the_grouping(monkeypatch, group):
    """Ids are handled in groups of rows; a row of more ids than a group is one by itself."""
    monkeypatch.setattr(keep_module, "_GROUP", group)
    g = torch.Generator().manual_seed(3)
    targets = torch.randint(30, (9,), generator=g)
    targets[4] = -100
    keep = make_keep(targets, 30, 6, g)
    mask = KeepMask(*keep, targets, 30)
    z = torch.randn(9, 30, generator=g)
    expected = torch.full_like(z, -torch.inf)
    for i in range(9):
        ids = keep.ids[keep.offsets[i] : keep.offsets[i + 1]]
        expected[i, ids] = z[i, ids]
    for rows in (slice(0, 9), slice(2, 7), torch.tensor([0, 3, 8]), torch.tensor([5])):
        chunk = torch.zeros(9, 37)[:, :30].copy_(z)[: len(z[rows])].copy_(z[rows])
        mask.apply(chunk, rows)
        assert torch.equal(chunk, expected[rows])
    shard = z[:, 11:19].clone()
    mask.apply(shard, slice(0, 9), first_column=11)
    assert torch.equal(shard, expected[:, 11:19])


def test_a_gpu_spoils_rows_whose_kept_ids_are_wrong():
    """Where values are not checked beforehand, a wrong row becomes NaN and writes nothing else."""
    targets = torch.tensor([3, 4, 5, -100])
    offsets, ids = torch.tensor([0, 2, 4, 6, 6]), torch.tensor([3, 9, 9, 8, 5, 77])
    z = torch.arange(40.0).view(4, 10)
    mask = KeepMask(offsets, ids, targets, 10, checked=True)
    mask._checked = False  # as on a GPU
    mask.apply(z, slice(0, 4))
    assert z[0, 3] == 3.0 and z[0].isfinite().sum() == 2
    assert z[1, 0].isnan() and z[2, 0].isnan()
    assert z[3].isneginf().all()


def test_a_filter_that_removed_the_sampled_id(backend, device):
    hidden, weight, targets = (x.detach().to(device) for x in small(n=3))
    offsets = torch.tensor([0, 2, 4, 6], device=device)
    ids = torch.stack([targets, (targets + 1) % 40], 1)
    ids[1, 0] = (targets[1] + 2) % 40
    keep = KeepSet(offsets, ids.view(-1))

    def call():
        logits = Head(weight)(hidden, keep=keep)
        return token_stats(logits, targets, compute=Compute(backend))

    if device == "cpu":
        with pytest.raises(ValueError, match=rf"id {int(targets[1])} of the token at .* 1 is not"):
            call()
        ids[1, 0] = 40
        with pytest.raises(
            ValueError, match=r"keep\.ids: expected values in \[0, 40\), got 40 .* 1"
        ):
            call()
    else:
        assert call().logp.isnan().tolist() == [False, True, False]


# ---- ZeRO-3 -------------------------------------------------------------------------------------


def test_a_weight_outside_its_gather():
    """ZeRO-3 leaves zero elements: said in forward, and in a backward that reads the weight again
    (trl 6372, 6859); the loss does not read it again."""
    hidden, weight, targets = small()
    gathered = weight.detach().clone()
    per_token = torch.ones(12)
    weight = torch.nn.Parameter(gathered.clone())
    weight.data = torch.empty(0)
    logits = Head(weight)(hidden)
    for call in (
        lambda: token_stats(logits, targets),
        lambda: policy_loss(logits, targets, per_token, per_token),
    ):
        with pytest.raises(ValueError, match=r"zero elements.*GatheredParameters"):
            call()
    weight.data = gathered
    stats = token_stats(logits, targets)
    out = policy_loss(logits, targets, per_token, per_token)
    weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"zero elements.*GatheredParameters"):
        stats.logp.sum().backward()
    (dhidden,) = torch.autograd.grad(out.loss, hidden)
    assert dhidden.any()


def test_a_head_is_made_of_parameters_that_are_filled_later():
    """Made outside every gather, called inside one after another: each call reads what the
    parameters hold then, the bias and the factors too."""
    hidden, weight, targets = small()
    g = torch.Generator().manual_seed(1)
    shapes = ((40,), (2, 8), (40, 2))
    values = [weight.detach(), *(torch.randn(shape, generator=g) for shape in shapes)]
    parameters = [torch.nn.Parameter(torch.empty(0)) for _ in values]
    weight, bias, a, b = parameters
    head = Head(weight, bias, LoRA(a, b), vocab_size=30)
    targets = targets.clamp(max=29)
    for factor in (1.0, 0.5):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = factor * value
        stats = token_stats(head(hidden), targets)
        z = F.linear(hidden, weight + b @ a, bias)[:, :30]
        torch.testing.assert_close(stats.logp, token_stats(z, targets).logp)
        grads = torch.autograd.grad(stats.logp.sum(), [hidden, *parameters])
        assert all(g.any() for g in grads) and grads[1].shape == (40, 8)
        for parameter in parameters:
            parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"zero elements.*GatheredParameters"):
        token_stats(head(hidden), targets)
