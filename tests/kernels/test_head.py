"""Exactness of a head's statistics and loss: golden cases, tolerance rule, chunks, gradcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from papo_kernels import (
    Compute,
    Head,
    Logits,
    Objective,
    PolarityWeighting,
    policy_loss,
    token_stats,
)
from tests.kernels.head_cases import (
    LOSS_INPUTS,
    Traits,
    check_head_policy_loss,
    check_head_token_stats,
    make_head_case,
    on_policy,
)
from tests.kernels.test_golden import CASES, assert_golden, build, is_exact
from tests.oracle import assert_close

# ---- golden cases -------------------------------------------------------------------------------


def factorized(logits: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden `[1, 9]`, weight `[V, 9]` and bias `[V]` whose logits are exactly these: powers of two
    whose products cancel in pairs, so that no sum rounds in any dtype. -inf comes from the bias."""
    g = torch.Generator().manual_seed(seed)
    shift = torch.randint(-2, 3, (4,), generator=g).double().exp2()
    sign = torch.randint(2, (4,), generator=g).double() * 2 - 1
    hidden = torch.cat([shift, sign * shift, torch.tensor([2.0])])
    columns = torch.cat([shift.flip(0), -sign * shift.flip(0), torch.tensor([0.5])])
    order = torch.randperm(9, generator=g)
    masked = logits.isneginf()
    z = logits.double().masked_fill(masked, 0.0)
    weight = z[:, None] * columns[order]
    # shift * shift.flip(0) cancels against the same product of the other sign.
    bias = torch.zeros_like(z).masked_fill(masked, -torch.inf)
    dtype = logits.dtype
    return hidden[order][None].to(dtype), weight.to(dtype), bias.to(dtype)


def check_golden(golden: dict[str, Any], dtype: torch.dtype, backend: str, device: str) -> None:
    case, expected = build(golden, dtype, device), golden["expected"]
    parts = factorized(case.logits[0].cpu(), len(golden["logits"]))
    hidden, weight, bias = (x.to(device).requires_grad_() for x in parts)
    z = (hidden.double() @ weight.double().t())[0] + bias
    assert z.detach().to(dtype).equal(case.logits[0])

    head = Head(weight, bias, softcap=case.softcap, vocab_size=case.vocab_size)
    options = {"temperature": case.temperature, "compute": Compute(backend)}
    stats = token_stats(head(hidden), case.targets, **options)
    for field in ("logp", "entropy", "unit_polarity"):
        assert_golden(field, getattr(stats, field), [expected[field]])
    upstream = golden["upstream"]
    total = sum(upstream[field] * getattr(stats, field).sum() for field in upstream)
    check_golden_gradients(total, (hidden, weight, bias), expected["grad_stats"])

    inputs = {name: getattr(case, name) for name in LOSS_INPUTS}
    out = policy_loss(head(hidden), case.targets, **inputs, **options)
    for field in ("ratio", "polarity", "weight"):
        assert_golden(field, getattr(out, field), [expected[field]])
    assert_golden("loss", out.loss, expected["loss"])
    assert out.clipped.item() is expected["clipped"]
    check_golden_gradients(out.loss, (hidden, weight, bias), expected["grad_loss"])


def check_golden_gradients(
    total: Tensor, leaves: tuple[Tensor, Tensor, Tensor], expected: list[float]
) -> None:
    """One row: the bias's gradient is that of the logits, the weight's is its outer product."""
    dhidden, dweight, dbias = torch.autograd.grad(total, leaves)
    dz = torch.tensor(expected, dtype=torch.float64)
    assert_golden("bias", dbias, expected)
    hidden, weight = (x.detach().double().cpu() for x in leaves[:2])
    for d in range(hidden.shape[1]):
        assert_golden("weight", dweight[:, d] / leaves[0][0, d].detach(), expected)
    # Each element of dz within the golden tolerance, and half a unit of dhidden's own dtype.
    relative, absolute = (1e-10, 1e-10) if dhidden.dtype == torch.float64 else (1e-4, 2e-6)
    eps = torch.finfo(dhidden.dtype).eps if dhidden.dtype.itemsize == 2 else 0.0
    allowed = torch.clamp((relative + eps) * dz.abs(), min=absolute) @ weight.abs()
    wrong = (dhidden[0].double().cpu() - dz @ weight).abs() > allowed
    assert not wrong.any()


@pytest.mark.parametrize("name", CASES)
def test_golden_through_a_factorisation(name, backend, device, dtypes):
    for dtype in dtypes[:-1]:  # float16 overflows in the factors
        if is_exact(CASES[name], dtype):
            check_golden(CASES[name], dtype, backend, device)


# ---- the tolerance rule -------------------------------------------------------------------------

# name: N, D, V and what the head has. 4 rows below one group of lanes, 37 with a ragged end; D not
# a multiple of any vector; V = 515 and 1025 one or three columns past a tile.
HEADS = {
    "plain": (37, 19, 515, Traits()),
    "one_row": (1, 64, 1025, Traits()),
    "peaked": (37, 33, 300, Traits(spread=12.0)),
    "bias": (23, 16, 130, Traits(bias=True, temperature=0.7)),
    "masked": (23, 16, 130, Traits(masked=True)),
    "padded": (23, 16, 131, Traits(bias=True, vocab_size=97)),
    "gemma": (23, 24, 257, Traits(softcap=5.0, temperature=0.6)),
    "cohere": (23, 24, 257, Traits(logit_scale=0.25, spread=12.0)),
    "capped_and_scaled": (23, 24, 257, Traits(softcap=5.0, logit_scale=0.5)),
    "lora": (37, 24, 140, Traits(rank=4, bias=True, vocab_size=129)),
    "kept": (37, 24, 140, Traits(kept=20, temperature=0.8)),
    "all": (40, 17, 150, Traits(
        masked=True, rank=3, vocab_size=141, softcap=9.0, logit_scale=0.7, temperature=1.3, kept=30,
    )),
}  # fmt: skip
LOSS = {
    "objective": Objective(clip_high=0.28, dual_clip=3.0, kl_coef=0.05, entropy_coef=0.01),
    "weighting": PolarityWeighting(0.5, -0.6, shape="tanh", sigma=0.1, scale=1.1),
}
# One slab of everything; several of several rows; one row each.
CHUNKS = (None, 40_000, 1)


@pytest.mark.parametrize("head", HEADS)
def test_statistics_follow_the_rule(head, backend, device, dtypes, sizes):
    for dtype in dtypes[:-1]:
        if head == "kept" and dtype.itemsize == 2:
            continue  # `all` covers it
        case = make_head_case(*HEADS[head], dtype=dtype, device=device)
        for chunk_bytes in sizes(CHUNKS, (40_000,)):
            check_head_token_stats(case, backend=backend, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("head", HEADS)
def test_losses_follow_the_rule(head, backend, device, dtypes, sizes):
    for dtype in dtypes[:-1]:
        options = {"dtype": dtype, "device": device, "loss": True}
        off_policy = make_head_case(*HEADS[head], **options, **LOSS)
        for case in (off_policy, on_policy(make_head_case(*HEADS[head], **options))):
            for chunk_bytes in sizes(CHUNKS, (40_000,)):
                check_head_policy_loss(case, backend=backend, chunk_bytes=chunk_bytes)


def test_logits_of_half_operands_are_float32(backend, device):
    """bfloat16 operands taken as they are: rounding their product to bfloat16 moved logp by 1e-2
    and gradients by up to 23 % (Liger #1432; open-instruct 1387 wants a float32 head)."""
    case = make_head_case(16, 96, 700, Traits(spread=8.0), dtype=torch.bfloat16, device=device)
    check_head_token_stats(case, backend=backend)
    exact = token_stats(case.tokens.logits, case.tokens.targets, compute=Compute("reference"))
    rounded = case.token_stats(case.leaves(), backend=backend, logits_dtype=torch.bfloat16)
    wide = case.token_stats(case.leaves(), backend=backend)
    error, bar = ((x.logp.double() - exact.logp).abs().max() for x in (wide, rounded))
    assert error < 1e-4 < bar, "the rounding that float32 logits avoid is gone from this case"


def test_logits_in_the_dtype_of_the_operands_on_request(backend, device):
    """The gradient then replaces the logits, and only their rounding is added."""
    for loss in (False, True):
        case = make_head_case(20, 32, 300, dtype=torch.bfloat16, device=device, loss=loss)
        leaves = case.leaves()
        run = case.policy_loss if loss else case.token_stats
        out = run(leaves, backend=backend, logits_dtype=torch.bfloat16, chunk_bytes=9000)
        wide_leaves = case.leaves()
        wide = run(wide_leaves, backend=backend)
        assert out.logp.dtype == torch.float32
        torch.testing.assert_close(out.logp, wide.logp, rtol=0.0, atol=0.1)
        (out.loss if loss else out.logp.sum()).backward()
        (wide.loss if loss else wide.logp.sum()).backward()
        for name in ("hidden", "weight"):
            a, b = (x[name].grad.float() for x in (leaves, wide_leaves))
            assert (a - b).norm() < 0.02 * b.norm()


def test_results_do_not_depend_on_the_chunks(backend, device, sizes):
    """To 1e-6 of the logits' size in float32, from one slab to one row each (a vendor's product of
    one row is another kernel, with another order of sums)."""
    n, v = sizes((64, 900), (9, 150))
    traits = Traits(bias=True, rank=3)
    case = make_head_case(n, 32, v, traits, loss=True, device=device, **LOSS)
    rows = 4 * (v // 64 * 64 + 64 + 2 * 32)
    size = float(case.tokens.logits.nan_to_num(0.0).abs().max())
    results = []
    for chunk_bytes in (None, 33 * rows, 7 * rows, rows):
        leaves = case.leaves()
        out = case.policy_loss(leaves, backend=backend, chunk_bytes=chunk_bytes)
        out.loss.backward()
        stats = case.token_stats(leaves, backend=backend, chunk_bytes=chunk_bytes)
        results.append((*out[:-1], *stats, *(x.grad for x in leaves.values())))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
            assert (a - b).abs().max() <= 1e-6 * size * a.abs().max()


def test_error_of_the_weight_gradient_does_not_grow_with_the_chunks(backend, device, sizes):
    """bfloat16 sums over chunks drift (Liger #512: 7.5e-3 to 10e-3 from 1 to 32 chunks). Here one
    slab, some, and one per token are each as far off as one rounding to bfloat16."""
    case = make_head_case(sizes(256, 32), 8, 400, dtype=torch.bfloat16, device=device, loss=True)
    wide = case.leaves(torch.float32)
    case.policy_loss(wide, backend=backend).loss.backward()
    exact = wide["weight"].grad.double()
    errors = []
    for chunk_bytes in (None, 32 * 448 * 2, 1):
        leaves = case.leaves()
        case.policy_loss(leaves, backend=backend, chunk_bytes=chunk_bytes).loss.backward()
        errors.append(float((leaves["weight"].grad.double() - exact).norm() / exact.norm()))
    assert 1e-4 < max(errors) < 1.05 * min(errors) < 4e-3, errors


# ---- gradcheck ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [None, 1500])
def test_gradcheck_of_the_statistics(chunk_bytes, backend, dtypes):
    if torch.float64 not in dtypes:
        return
    traits = Traits(bias=True, rank=2, softcap=6.0, temperature=0.8, kept=4)
    case = make_head_case(5, 3, 7, traits, dtype=torch.float64)
    case.parameters["hidden"].nan_to_num_(0.5)
    names = tuple(case.parameters)

    def statistics(*values):
        leaves = dict(zip(names, values, strict=True))
        return case.token_stats(leaves, backend=backend, chunk_bytes=chunk_bytes)

    leaves = tuple(case.leaves().values())
    assert torch.autograd.gradcheck(statistics, leaves, atol=1e-7)


def test_gradcheck_of_the_loss(backend, dtypes):
    """Off-policy with a weighting-free loss, which has no stop-gradient."""
    if torch.float64 not in dtypes:
        return
    objective = Objective(kl_coef=0.3, entropy_coef=0.2, dual_clip=2.0)
    traits = Traits(bias=True, rank=2, logit_scale=0.7)
    case = make_head_case(8, 3, 7, traits, dtype=torch.float64, loss=True, objective=objective)
    case.parameters["hidden"].nan_to_num_(0.5, posinf=0.5)
    names = tuple(case.parameters)

    def loss(*values):
        leaves = dict(zip(names, values, strict=True))
        return 1.7 * case.policy_loss(leaves, backend=backend, chunk_bytes=1000).loss

    leaves = tuple(case.leaves().values())
    assert torch.autograd.gradcheck(loss, leaves, atol=1e-7)


def test_a_temperature_for_each_row(backend, device):
    """Each chunk takes its own rows': as of logits that are held."""
    case = make_head_case(9, 8, 70, Traits(softcap=6.0, logit_scale=0.5), device=device, loss=True)
    case.parameters["hidden"].nan_to_num_(0.5, posinf=0.5)
    tokens, temperature = case.tokens, torch.linspace(0.5, 2.0, 9, device=device)
    inputs = (tokens.targets, tokens.advantages, tokens.token_weight)
    results = []
    for chunk_bytes in (None, 1, 0):
        leaves = case.leaves()
        logits = case.logits(leaves)
        if chunk_bytes == 0:
            held = 0.5 * leaves["hidden"] @ leaves["weight"].t()
            logits, chunk_bytes = Logits(held, softcap=6.0), None
        options = {"temperature": temperature, "compute": Compute(backend, chunk_bytes)}
        out = policy_loss(logits, *inputs, old_logp=tokens.old_logp, **options)
        stats = token_stats(logits, tokens.targets, **options)
        (out.loss + stats.entropy.sum()).backward()
        results.append((*out, *stats, *(leaf.grad for leaf in leaves.values())))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_leading_dimensions_and_layouts(backend, device):
    """`[B, T, D]` in and `[B, T]` out; strided hidden states and a transposed weight."""
    case = make_head_case(24, 16, 70, device=device, loss=True)
    flat = case.policy_loss(case.leaves(), backend=backend)
    leaves = case.leaves()
    batch = {
        "hidden": leaves["hidden"].detach().view(2, 12, 16).transpose(0, 1).requires_grad_(),
        "weight": leaves["weight"].detach().t().contiguous().t().requires_grad_(),
    }
    names = ("targets", "advantages", "token_weight", "old_logp", "ref_logp")
    inputs = [getattr(case.tokens, name).view(2, 12).t() for name in names]
    targets, advantages, token_weight, old_logp, _ = inputs
    logits, compute = Head(batch["weight"])(batch["hidden"]), Compute(backend)
    out = policy_loss(logits, targets, advantages, token_weight, old_logp=old_logp, compute=compute)
    assert out.logp.shape == (12, 2)
    assert_close("logp", out.logp.t().reshape(-1), flat.logp.double(), flat.logp)
    out.loss.backward()
    flat_leaves = case.leaves()
    case.policy_loss(flat_leaves, backend=backend).loss.backward()
    torch.testing.assert_close(batch["weight"].grad, flat_leaves["weight"].grad)
    dhidden = batch["hidden"].grad.transpose(0, 1).reshape(24, 16)
    torch.testing.assert_close(dhidden, flat_leaves["hidden"].grad)
    strided = torch.zeros(24, 20, device=device)[:, 2:18].copy_(leaves["hidden"].detach())
    again = token_stats(Head(leaves["weight"])(strided), case.tokens.targets, compute=compute)
    torch.testing.assert_close(
        again.logp, case.token_stats(leaves, backend=backend).logp, equal_nan=True
    )
