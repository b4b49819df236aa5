"""The linear path's choices that depend on the device: which rows are multiplied, and into what."""

from __future__ import annotations

import pytest
import torch

from papo_kernels.head import gradients as linear_gradients
from papo_kernels.head import passes as linear_passes
from papo_kernels.head import plan as linear_chunks
from papo_kernels.head import products as linear_products
from tests.kernels.linear_cases import make_head_case


@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_do_not_count_are_masked_where_they_are_not_left_out(monkeypatch, dtype, loss):
    """A GPU multiplies all rows rather than wait for their number; NaN and inf in the hidden states
    of rows that do not count must still reach nothing."""
    case = make_head_case(30, 16, 90, dtype=dtype, bias=True, rank=2, loss=loss)
    results = []
    for everything in (False, True):
        if everything:
            monkeypatch.setattr(
                linear_passes,
                "active_rows",
                lambda ignored: linear_chunks.Active(ignored.shape[0], ignored),
            )
        leaves = case.leaves()
        out = (case.policy_loss if loss else case.token_stats)(leaves, chunk_bytes=3000)
        (out.loss if loss else (out.logp + out.unit_polarity).sum()).backward()
        results.append((*out, *(x.grad for x in leaves.values())))
    for a, b in zip(*results, strict=True):
        assert b.isfinite().all()
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if a.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("rows", ["reference", "cpu"])
def test_products_written_in_float32_by_the_device(monkeypatch, rows):
    """The calls made where half operands multiply into float32, with torch's functions emulated."""
    case = make_head_case(30, 16, 90, dtype=torch.bfloat16, bias=True, rank=2, loss=True)
    plain = case.leaves()
    expected = case.policy_loss(plain, backend=rows, chunk_bytes=3000)
    expected.loss.backward()

    real_mm, real_addmm = torch.mm, torch.addmm
    wide = []

    def mm(a, b, *, out=None, out_dtype=None):
        if out_dtype is None:
            return real_mm(a, b, out=out)
        assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == out_dtype == torch.float32
        wide.append("mm")
        return out.copy_(real_mm(a.float(), b.float()))

    def addmm(c, a, b, *, out=None, out_dtype=None):
        if out_dtype is None:
            return real_addmm(c, a, b, out=out)
        assert c is out and out.dtype == out_dtype == torch.float32
        wide.append("addmm")
        return out.add_(real_mm(a.float(), b.float()))

    monkeypatch.setattr(linear_products, "_multiplies_into_float32", lambda device, dtype: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    leaves = case.leaves()
    actual = case.policy_loss(leaves, backend=rows, chunk_bytes=3000)
    actual.loss.backward()
    assert {"mm", "addmm"} == set(wide)
    torch.testing.assert_close(actual.logp, expected.logp)
    for name, x in leaves.items():
        torch.testing.assert_close(x.grad, plain[name].grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("tile_bytes", [1, 300, 10_000])
@pytest.mark.parametrize("shape", [(5, 3, 40), (40, 3, 5), (5, 40, 3), (7, 7, 7)])
def test_widened_products_in_tiles(monkeypatch, shape, tile_bytes):
    """Tiles of the longest extent, be it the outer, inner or last one; written and added."""
    monkeypatch.setattr(linear_products, "_TILE_BYTES", tile_bytes)
    m, k, n = shape
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=g).bfloat16() for s in ((m, k), (k, n)))
    exact = a.double() @ b.double()
    out = torch.full((m, n), torch.nan)
    linear_products.product(a, b, out)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-5)
    linear_products.product(a, b.float(), out, add=True)
    torch.testing.assert_close(out.double(), 2 * exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tile_bytes", [1, 300, 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_two_halves_is_the_float32_sum(monkeypatch, dtype, tile_bytes):
    """Bit for bit, in tiles of a row, of some rows with a remainder, and in one: sums of quarters
    are exact in float32 in any order, and most of these need more bits than the result has, which
    must round once. Infinities, NaN and rows of padding keep their place."""
    monkeypatch.setattr(linear_gradients, "_CPU_TILE_BYTES", tile_bytes)
    g = torch.Generator().manual_seed(0)
    parameter = torch.empty(37, 7, dtype=dtype)
    split = linear_gradients._SplitSum(parameter, 35)
    whole = linear_gradients._Sum(parameter, 35, 4, None)
    for slab in range(4):
        a, b = (torch.randint(-99, 100, s, generator=g).to(dtype) for s in ((35, 11), (11, 7)))
        if slab == 2:
            a[3, 4], a[5, 6] = torch.inf, torch.nan
        for total in (split, whole):
            total.add_product(a / 4, b)
    exact = whole.rows.clone()
    expected, actual = whole.result(), split.result()
    assert (exact != expected[:35].float()).float().mean() > 0.5, "nothing was rounded"
    assert actual.dtype == dtype and not actual[35:].any()
    assert torch.equal(actual.view(torch.int16), expected.view(torch.int16))
    assert actual[5].isnan().all() and actual[3].isinf().any()
