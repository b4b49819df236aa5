"""Every output and gradient against the oracle, over sizes, dtypes, layouts and kinds of logits."""

from __future__ import annotations

import math

import pytest
import torch

import papo_kernels
from papo_kernels import Compute, Logits, Objective, PolarityWeighting, token_stats
from tests.cases import LAYOUTS, LOGITS, make_case, make_loss_case
from tests.oracle import (
    check_policy_loss,
    check_token_stats,
    plain_policy_loss,
    plain_token_stats,
)

EVERY_TERM = Objective(clip_low=0.2, clip_high=0.28, dual_clip=1.5, kl_coef=0.04, entropy_coef=0.01)
WEIGHTING = PolarityWeighting(0.5, 0.7, sigma=0.1, scale=1.1)

# (V, which regime it covers)
WIDTHS = (
    (64, "one load of a vector register or warp"),
    (1000, "a multiple of 8: every row aligned to 16 bytes in 2-byte dtypes"),
    (1023, "odd: rows off any alignment, a ragged tail"),
    (1025, "one element more than an L1 block of the CPU scan"),
    (4097, "one more than the largest row of Triton's short-row tile"),
    (16385, "one more than a CPU chunk: two states are merged"),
    (33000, "more than one tile or cluster rank, chunks of unequal size"),
)
# (V, vocab_size, regime)
PADDED = (
    (1304, 1300, "less padding than a vector"),
    (2048, 1025, "whole tiles of padding"),
    (64, 1, "one real column"),
    (16400, 16384, "padding starts on a chunk's edge"),
)


@pytest.mark.parametrize("kind", LOGITS)
def test_kinds_and_dtypes(kind, backend, device, dtypes, sizes):
    n, v = sizes((16, 301), (4, 130))
    for dtype in sizes(dtypes, dtypes[:1]):
        case = make_case(kind, n, v, dtype=dtype, device=device)
        check_token_stats(case, backend)
        case = make_loss_case(
            kind, n, v, dtype=dtype, device=device, objective=EVERY_TERM, weighting=WEIGHTING
        )
        check_policy_loss(case, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, device, dtypes, sizes):
    n = sizes(7, 2)
    for dtype in sizes(dtypes[-3:], (torch.bfloat16, torch.float16)):
        # 129 columns: no row but the first starts on a 16-byte boundary.
        more = {"dtype": dtype, "device": device, "layout": layout}
        check_token_stats(make_case("normal", n, 129, **more), backend)
        case = make_loss_case("normal", n, 129, objective=EVERY_TERM, weighting=WEIGHTING, **more)
        check_policy_loss(case, backend)


@pytest.mark.parametrize("v", [v for v, _ in WIDTHS])
def test_widths(v, backend, device, dtypes, sizes):
    n = sizes(6, 3)
    for dtype in sizes(dtypes[-3:], dtypes[-2:-1]):
        check_token_stats(make_case("normal", n, v, dtype=dtype, device=device), backend)
        case = make_loss_case("peaked", n, v, dtype=dtype, device=device, weighting=WEIGHTING)
        check_policy_loss(case, backend)


@pytest.mark.parametrize(("v", "vocab_size"), [case[:2] for case in PADDED])
def test_padded_vocabulary(v, vocab_size, backend, device, dtypes, sizes):
    """The padding holds NaN and gets gradient 0."""
    for dtype in dtypes[-2:]:
        more = {"dtype": dtype, "device": device, "vocab_size": vocab_size}
        case = make_case("normal", sizes(6, 2), v, **more)
        assert check_token_stats(case, backend)[:, vocab_size:].eq(0).all()
        case = make_loss_case("normal", sizes(6, 2), v, objective=EVERY_TERM, **more)
        for inplace in (False, True):
            dlogits = check_policy_loss(case, backend, inplace=inplace)
            assert dlogits[:, vocab_size:].eq(0).all()


@pytest.mark.parametrize("softcap", [None, 30.0, 2.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_temperature_and_softcap(temperature, softcap, backend, device, dtypes, sizes):
    n = sizes(8, 2)
    for dtype in sizes(dtypes[-3:], dtypes[:1]):
        for kind in sizes(("normal", "masked", "peaked"), ("masked",)):
            row = {"temperature": temperature, "softcap": softcap, "device": device}
            check_token_stats(make_case(kind, n, 130, dtype=dtype, **row), backend)
            case = make_loss_case(kind, n, 130, dtype=dtype, objective=EVERY_TERM, **row)
            check_policy_loss(case, backend)


def test_float16_extremes(backend, device, sizes):
    """Logits at +-65504, the largest of float16, and at its subnormals."""
    values = torch.tensor([65504.0, -65504.0, 6e-8, -6e-8, 0.0, 1.0])
    n = sizes(24, 4)
    logits = values[torch.arange(n * 37).reshape(n, 37) * 7 % 6].half()
    case = make_case("normal", n, 37, dtype=torch.float16, device=device)
    case.logits.copy_(logits)
    check_token_stats(case, backend)
    case.logits[:, :-1] = 0.0
    case.logits[:, -1] = -65504.0
    check_token_stats(case, backend)


@pytest.mark.plumbing
def test_shapes_of_one_to_four_dimensions(backend, device):
    """Leading dimensions are rows; the results have the shape of the targets."""
    flat = make_loss_case("normal", 12, 33, device=device)
    expected = flat.token_stats(flat.logits, backend)
    loss = flat.policy_loss(flat.logits, backend).loss
    for shape in [(12,), (3, 4), (2, 3, 2), (12, 1)]:

        def rows(x, shape=shape):
            return x.reshape(shape)

        logits = flat.logits.reshape(*shape, 33).requires_grad_()
        stats = papo_kernels.token_stats(logits, rows(flat.targets), compute=Compute(backend))
        for value, want in zip(stats, expected, strict=True):
            assert value.shape == shape
            assert torch.equal(value.reshape(-1), want)
        out = papo_kernels.policy_loss(
            logits,
            *map(rows, (flat.targets, flat.advantages, flat.token_weight)),
            old_logp=rows(flat.old_logp),
            compute=Compute(backend),
        )
        assert out.loss.shape == ()
        assert torch.equal(out.loss, loss)
        assert all(value.shape == shape for value in out[1:])
        out.loss.backward()
        assert logits.grad.shape == logits.shape
    scalar = papo_kernels.token_stats(flat.logits[0], flat.targets[0], compute=Compute(backend))
    assert scalar.logp.shape == ()
    assert torch.equal(scalar.logp, expected.logp[0])


@pytest.mark.plumbing
def test_row_slices_and_expanded_rows_are_read_without_a_copy(backend, device):
    """[:, :-1] of a [B, T, V] batch (next-token logits), a broadcast row, a stepped batch."""
    base = make_case("normal", 24, 65, device=device).logits.view(4, 6, 65)
    targets = torch.arange(20, device=device).view(4, 5)
    for logits, t in [
        (base[:, :-1], targets),
        (base[:1, :1].expand(4, 5, 65), targets),
        (base[::2, 1:], targets[:2]),
        (base.transpose(0, 1), targets[:, :4].reshape(4, 4)[:, :4].repeat(2, 1)[:6]),
    ]:
        stats = papo_kernels.token_stats(logits, t, compute=Compute(backend))
        same = papo_kernels.token_stats(logits.contiguous(), t, compute=Compute(backend))
        assert all(torch.equal(a, b) for a, b in zip(stats, same, strict=True))


def test_outputs_do_not_depend_on_the_rows_beside(backend, device):
    """A row alone gives bit for bit what it gives in a batch: no reduction crosses rows."""
    case = make_case("normal", 9, 777, device=device)
    together = case.token_stats(case.logits, backend)
    for i in (0, 4, 8):
        alone = papo_kernels.token_stats(
            case.logits[i : i + 1], case.targets[i : i + 1], compute=Compute(backend)
        )
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize(("v", "vocab_size"), [(1304, 1300), (151_944, 151_937)])
def test_padded_columns_do_not_enter_the_sums(v, vocab_size, backend, device, sizes):
    """Padding full of large values (verl #2656: logp up to +123)."""
    v, vocab_size = sizes((v, vocab_size), (1304, 1300))
    rows = sizes(64, 8)
    logits = torch.randn(1, v, generator=torch.Generator().manual_seed(0)).to(device)
    logits[:, vocab_size:] = 1e4
    targets = torch.arange(rows, device=device) * (vocab_size // rows)
    padded = Logits(logits.expand(rows, v), vocab_size=vocab_size)
    stats = token_stats(padded, targets, compute=Compute(backend))
    plain = torch.log_softmax(logits[0, :vocab_size].double(), 0)
    assert (stats.logp <= 0).all()
    torch.testing.assert_close(stats.logp.double(), plain[targets], rtol=0, atol=2e-6)


@pytest.mark.parametrize("v", [151_936, 201_088, 248_320, 262_144])
def test_large_vocabularies(v, backend, device, sizes):
    v = sizes(v, v // 16)
    case = make_loss_case("normal", 2, v, dtype=torch.bfloat16, device=device)
    check_policy_loss(case, backend)


def test_entropy_of_262144_equal_logits(backend, device, dtypes, sizes):
    v = sizes(262_144, 32_768)
    for dtype in dtypes[-3:]:
        logits = torch.full((1, v), 0.5, dtype=dtype, device=device)
        targets = torch.tensor([v - 1], device=device)
        stats = token_stats(logits, targets, compute=Compute(backend))
        assert stats.entropy.item() == pytest.approx(math.log(v), abs=1e-5)
        assert stats.logp.item() == pytest.approx(-math.log(v), abs=1e-5)
        assert abs(stats.unit_polarity.item()) < 1e-10


@pytest.mark.parametrize("v", range(1, 18))
def test_tiny_vocabularies_with_and_without_grad(v, backend, device, sizes):
    n = sizes(4, 1)
    check_token_stats(make_case("normal", n, v, device=device), backend)
    case = make_loss_case("normal", n, v, device=device, objective=Objective(entropy_coef=0.1))
    check_policy_loss(case, backend)
    with torch.no_grad():
        out = case.policy_loss(case.logits, backend)
    expected = plain_policy_loss(case).loss
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert not out.loss.requires_grad


@pytest.mark.plumbing
def test_more_rows_than_a_grid_dimension_holds(backend, device):
    """65,536 and more rows; the last ones are checked one by one."""
    n, v = 131_073, 5
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(6)).to(device)
    targets = torch.arange(n, device=device) % v
    z = logits.requires_grad_()
    stats = token_stats(z, targets, compute=Compute(backend))
    exact = plain_token_stats(logits.detach(), targets)
    for a, b in zip(stats, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)
    (dz,) = torch.autograd.grad(stats.logp.sum(), z)
    assert dz.sum(1).abs().max() < 1e-6
    assert dz[-1].abs().max() > 1e-3


def test_logits_of_magnitude_100(backend, device, dtypes, sizes):
    """Results are float32 whatever the logits, with no narrow staging on the way."""
    for dtype in dtypes[-3:]:
        case = make_case("normal", sizes(16, 3), 500, dtype=dtype, device=device)
        case.logits.mul_(30.0)
        check_token_stats(case, backend)
        assert all(x.dtype == torch.float32 for x in case.token_stats(case.logits, backend))


@pytest.mark.parametrize("softcap", [0.5, 15.0, 30.0, 50.0])
def test_softcap_is_that_of_transformers(softcap, backend, device):
    """Gemma's own lines: logits / cap, tanh, * cap; from far below to far above the cap."""
    z = torch.linspace(-8.0 * softcap, 8.0 * softcap, 101, device=device)[None]
    capped = z.double() / softcap
    capped = torch.tanh(capped) * softcap
    for target in (0, 50, 75, 100):
        targets = torch.tensor([target], device=device)
        stats = token_stats(Logits(z, softcap=softcap), targets, compute=Compute(backend))
        expected = torch.log_softmax(capped, -1)[0, target].item()
        assert stats.logp.item() == pytest.approx(expected, rel=2e-6, abs=2e-6)
