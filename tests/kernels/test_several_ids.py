"""k target ids a row, and `FullTokenStats`, of held logits and of heads."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from papo_kernels import Compute, Head, KeepSet, Logits, LoRA, policy_loss, token_stats

N, V, K = 7, 97, 4
OPTIONS = {"plain": {}, "capped": {"softcap": 5.0}, "padded": {"vocab_size": 61}}


def ids_of(columns: int = 61) -> Tensor:
    """Ids that a row repeats, a row and a place that are ignored, and one likely id."""
    ids = torch.randint(columns, (N, K), generator=torch.Generator().manual_seed(1))
    ids[0, 1] = ids[1] = ids[2, 0] = -100
    ids[3] = torch.tensor([9, 4, 9, 9])
    return ids


def logits_of(dtype: torch.dtype, device: str) -> Tensor:
    """Row 3 has an id with p = 1 - 1e-9, row 4 a masked id."""
    z = 3.0 * torch.randn(N, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[3] = z[3].clamp(max=6.0)
    z[3, 9] = 32.0
    z[4, ids_of()[4, 2]] = -torch.inf
    return z.to(device, dtype)


def definition(z: Tensor, ids: Tensor, upstream: list[Tensor], **options) -> tuple[list, Tensor]:
    """Statistics and gradient by one call an id, in float64 on the reference backend: entropy and
    lse, which a row has once, with the row's most likely id."""
    leaf = z.detach().double().requires_grad_()
    columns = options.pop("vocab_size", None)
    softcap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    logits = Logits(leaf, softcap=softcap, vocab_size=columns)
    compute = Compute("reference")
    calls = [
        token_stats(logits, ids[:, j].contiguous(), temperature=temperature, compute=compute)
        for j in range(ids.shape[1])
    ]
    at = torch.stack([x.logp for x in calls], 1).masked_fill(ids < 0, -torch.inf).argmax(1)
    likely = ids.gather(1, at[:, None])[:, 0]
    row = token_stats(logits, likely, temperature=temperature, compute=compute)
    logp = torch.stack([x.logp for x in calls], 1)
    unit_polarity = torch.stack([x.unit_polarity for x in calls], 1)
    stats = [logp, row.entropy, unit_polarity, row.lse]
    return stats, torch.autograd.grad(stats, leaf, [g.double() for g in upstream])[0]


def upstream_of(device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    shapes = ((N, K), (N,), (N, K), (N,))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(device) for shape in shapes]


def assert_near(actual: Tensor, expected: Tensor, eps: float) -> None:
    tolerances = {"rtol": 8.0 * eps, "atol": 8.0 * eps}
    torch.testing.assert_close(actual.double(), expected, equal_nan=True, **tolerances)


def test_several_ids_are_several_calls(backend, device, dtypes, sizes):
    """And a row is read once: its ids may repeat, be masked, or be left out."""
    for dtype, options in itertools.product(dtypes, sizes(tuple(OPTIONS), ("capped",))):
        z, ids = logits_of(dtype, device).requires_grad_(), ids_of().to(device)
        upstream = upstream_of(device)
        expected, dz = definition(z, ids, upstream, **OPTIONS[options])
        stats = token_stats(Logits(z, **OPTIONS[options]), ids, compute=Compute(backend))
        acc = stats.entropy.dtype
        eps = torch.finfo(acc).eps
        for a, e in zip(stats, expected, strict=True):
            assert a.shape == e.shape
            assert_near(a, e, 8.0 * eps)
        grad = torch.autograd.grad(stats, z, [g.to(acc) for g in upstream])[0]
        assert_near(grad, dz, max(torch.finfo(dtype).eps, 8.0 * eps))
        assert not grad[1].any(), "a row whose ids are all left out"


@pytest.mark.plumbing
def test_the_gradient_keeps_its_digits_near_certainty(backend, device):
    """1 - p of 2e-10, though p is 1 in float32, and half-precision logits round it once."""
    for dtype in (torch.float32, torch.bfloat16):
        z, ids = logits_of(dtype, device).requires_grad_(), ids_of().to(device)
        stats = token_stats(z, ids, compute=Compute(backend))
        (grad,) = torch.autograd.grad(stats.logp[3, 0], z)
        probability = torch.softmax(z.detach()[3].double(), 0)
        rest = probability.sum() - probability[9]
        assert 1e-11 < rest < 1e-6
        assert float(grad[3, 9]) == pytest.approx(float(rest), rel=8e-3)


@pytest.mark.plumbing
def test_masked_ids_leave_the_other_ids_gradients(backend, device):
    z, ids = logits_of(torch.float32, device).requires_grad_(), ids_of().to(device)
    stats = token_stats(z, ids, compute=Compute(backend))
    assert stats.logp[4, 2] == -torch.inf
    (grad,) = torch.autograd.grad(stats.logp[4].sum(), z)
    assert grad[4].isfinite().all() and grad[4, ids[4, 0]] > 0.0
    masked = z.detach().index_fill(1, ids[4], -torch.inf).requires_grad_()
    stats = token_stats(masked[4:5], ids[4:5], compute=Compute(backend))
    assert stats.logp.isneginf().all() and stats.entropy.isfinite().all()
    assert not torch.autograd.grad([*stats[:2]], masked, [stats.unit_polarity, stats.lse])[0].any()


def heads(dtype: torch.dtype, device: str) -> dict[str, tuple[Head, KeepSet | None]]:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    weight, bias, a, b = (x.requires_grad_() for x in (draw(V, 8), draw(V), draw(2, 8), draw(V, 2)))
    kept = torch.arange(61, device=device).repeat(N)
    keep = KeepSet(61 * torch.arange(N + 1, device=device), kept)
    return {
        "plain": (Head(weight), None),
        "lora": (Head(weight, bias, LoRA(a, b, 0.5), softcap=4.0, logit_scale=0.7), None),
        "kept": (Head(weight, vocab_size=80), keep),
    }


@pytest.mark.plumbing
@pytest.mark.parametrize("name", ["plain", "lora", "kept"])
def test_several_ids_of_a_head(name, backend, device):
    """As of its logits that are held, for one chunk and for chunks of a row."""
    head, keep = heads(torch.float32, device)[name]
    hidden = torch.randn(N, 8, generator=torch.Generator().manual_seed(4)).to(device)
    hidden.requires_grad_()
    lora = head.lora or LoRA(hidden, hidden)
    leaves = [x for x in (hidden, head.weight, head.bias) if x is not None]
    leaves += [lora.a, lora.b] if head.lora else []
    ids, upstream = ids_of(80 if keep else 61).to(device), [g.float() for g in upstream_of(device)]
    z = hidden @ head.weight.t()
    if head.lora:
        z = 0.7 * (z + head.bias + 0.5 * hidden @ lora.a.t() @ lora.b.t())
    if keep:
        z = z.masked_fill(torch.arange(V, device=device) >= 61, -torch.inf)
    expected = token_stats(
        Logits(z, softcap=head.softcap, vocab_size=head.vocab_size), ids, temperature=0.8
    )
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for chunk_bytes in (None, 1):
        compute = Compute(backend, chunk_bytes=chunk_bytes)
        stats = token_stats(head(hidden, keep=keep), ids, temperature=0.8, compute=compute)
        grads = torch.autograd.grad(stats, leaves, upstream)
        for a, b in zip((*stats, *grads), (*expected, *wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.plumbing
def test_leading_dimensions_and_the_loss(backend, device):
    z = logits_of(torch.float32, device).view(1, N, V)
    ids = ids_of().to(device).view(1, N, K)
    stats = token_stats(z, ids, compute=Compute(backend))
    assert [tuple(x.shape) for x in stats] == [(1, N, K), (1, N), (1, N, K), (1, N)]
    one = token_stats(z, ids[..., :1], compute=Compute(backend))
    single = token_stats(z, ids[..., 0].contiguous(), compute=Compute(backend))
    torch.testing.assert_close(one.logp[..., 0], single.logp)
    ones = torch.ones(1, N, device=device)
    with pytest.raises(ValueError, match=r"targets: expected shape \(1, 7\).*got \(1, 7, 4\)"):
        policy_loss(z, ids, ones, ones)
    with pytest.raises(ValueError, match=r"targets: expected an id a row, got shape \(1, 7, 0\)"):
        token_stats(z, ids[..., :0])
    if device == "cpu":
        ids[0, 5, 1] = V
        with pytest.raises(ValueError, match=r"targets: expected values in .*got 97 at flat"):
            token_stats(z, ids, compute=Compute(backend))


@pytest.mark.plumbing
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("of_head", [False, True])
def test_more_statistics(of_head, several, backend, device):
    """log sum p^2, mean u and whether the target is the most likely, by their definitions."""
    z, ids = logits_of(torch.float32, device), ids_of().to(device)
    z[:, 1] = 40.0
    z[5:] = z[5:].clamp(min=-1e6)
    ids[6, 0] = 1
    compute, options = Compute(backend, full_stats=True, chunk_bytes=1), {"softcap": 50.0}
    targets = ids if several else ids[:, 0].contiguous()
    logits = Logits(z, **options)
    if of_head:
        z = z.nan_to_num(neginf=-1e5)
        logits = Head(z.t().contiguous(), **options)(torch.eye(N, device=device))
    stats = token_stats(logits, targets, temperature=2.0, compute=compute)
    u = 50.0 * torch.tanh(z.double() / 50.0) / 2.0
    u = u.masked_fill(z.isneginf(), -torch.inf)
    ignored = (targets < 0).view(N, -1).all(1)
    sums = torch.logsumexp(2.0 * torch.log_softmax(u, 1), 1).masked_fill(ignored, 0.0)
    assert_near(stats.log_sum_sq_probs, sums, 1e-6)
    assert_near(stats.mean_logits, u.mean(1).masked_fill(ignored, 0.0), 1e-6)
    top = (targets.view(N, -1) == 1).view(targets.shape)
    assert torch.equal(stats.is_top1, top) and top.any() and not top.all()
    plain = token_stats(logits, targets, temperature=2.0, compute=Compute(backend))
    assert all(torch.equal(a, b) for a, b in zip(stats, plain, strict=False))


@pytest.mark.plumbing
def test_more_statistics_are_without_gradient(backend, device):
    z = logits_of(torch.float32, device).requires_grad_()
    compute = Compute(backend, full_stats=True)
    targets = torch.arange(N, device=device)
    stats = token_stats(z, targets, compute=compute)
    assert stats.logp.requires_grad
    assert not any(x.requires_grad for x in stats[4:])
    expected = token_stats(z, targets, compute=Compute(backend))
    (a,), (b,) = (torch.autograd.grad(x.logp.sum(), z) for x in (stats, expected))
    assert torch.equal(a, b)
