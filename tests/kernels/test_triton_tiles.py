"""The Triton kernels at every edge of how they cut rows: words, tiles, segments, split rows, heads.

Interpreted (``TRITON_INTERPRET=1``) or on a GPU. The interpreter counts as a device of one SM:
fewer than four rows are split, a program a segment.
"""

from __future__ import annotations

import os

import pytest
import torch

from papo_kernels import Objective
from papo_kernels.types import INSIDE, RowParams, TokenInputs
from tests.cases import make_case, make_loss_case
from tests.kernels.test_extremes import check_nearly_certain_tokens
from tests.oracle import check_policy_loss, check_token_stats

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu

PARAMS = Objective(clip_high=0.28, dual_clip=2.0, kl_coef=0.04, entropy_coef=0.01)
NAN = float("nan")

# (dtype, V, regime): n words of 16 bytes take 8 or 4 columns each, and the last one stays out.
EDGES = (
    (torch.bfloat16, 128, "the longest row without words: one element a thread"),
    (torch.bfloat16, 129, "the shortest with words: 15 of them and 9 elements"),
    (torch.bfloat16, 135, "the most elements after the words: two words less one"),
    (torch.bfloat16, 136, "and one more: another word"),
    (torch.float32, 131, "the same for words of four"),
    (torch.float32, 132, "the same for words of four"),
    (torch.bfloat16, 1024, "the longest tiny row: 127 words, a tile less a thread's"),
    (torch.bfloat16, 1025, "the shortest short row: four words a thread, none of them full"),
    (torch.float16, 4096, "a short row's first tile of 512 words less one"),
    (torch.bfloat16, 4104, "exactly that tile"),
    (torch.bfloat16, 4112, "and one word of another"),
    (torch.bfloat16, 32768, "the longest short row: a segment of 4096 words less one"),
    (torch.bfloat16, 32769, "the shortest long row: tiles of 1024 words"),
    (torch.bfloat16, 32776, "exactly a segment of them"),
    (torch.bfloat16, 32784, "two segments, the second of one word"),
    (torch.float32, 16384, "the longest short row of words of four"),
    (torch.float32, 16387, "a segment of 4096 words less one"),
    (torch.float32, 16388, "exactly a segment"),
    (torch.float32, 16393, "two segments, the second of one word"),
)


def impl():
    from papo_kernels.backends.triton import TRITON

    return TRITON


def stats_of(logits, targets, vocab_size=None):
    row = RowParams(0.9, 0.0, vocab_size or logits.shape[1])
    return impl().token_stats_fwd(logits, targets, row)


def loss_of(logits, targets, dlogits=None, old_logp=None):
    ones = torch.ones(len(targets), device=logits.device)
    tokens = TokenInputs(ones, ones, old_logp, None)
    row = RowParams(0.9, 0.0, logits.shape[1])
    return impl().policy_loss_fwd(logits, targets, tokens, Objective(), None, row, dlogits)


def rows(n, v, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (3.0 * torch.randn(n, v, generator=g)).to(DEVICE, dtype)


@pytest.mark.parametrize("v", range(1, 18))
def test_a_few_columns(v):
    """Around one word of either size, in rows of every alignment."""
    for dtype in (torch.bfloat16, torch.float32):
        check_token_stats(make_case("normal", 5, v, dtype=dtype, device=DEVICE), "triton")
        case = make_loss_case("normal", 5, v, dtype=dtype, device=DEVICE, objective=PARAMS)
        check_policy_loss(case, "triton", inplace=True)


@pytest.mark.parametrize(("dtype", "v"), [edge[:2] for edge in EDGES])
def test_edges_of_words_tiles_and_segments(dtype, v):
    """Two rows, so that rows of several segments are split."""
    check_token_stats(make_case("normal", 2, v, dtype=dtype, device=DEVICE), "triton")
    case = make_loss_case("normal", 2, v, dtype=dtype, device=DEVICE, objective=PARAMS)
    check_policy_loss(case, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_do_not_depend_on_where_a_row_starts(dtype):
    """At every distance from a 16-byte boundary, and with every distance of the gradient's row."""
    v, targets = 300, torch.tensor([7], device=DEVICE)
    row = rows(1, v, dtype)
    upstream = (torch.ones(1, device=DEVICE),) * 4
    params = RowParams(0.9, 0.0, v)
    *expected, state = stats_of(row, targets)
    gradient = impl().token_stats_bwd(row, targets, state, upstream, params)
    for head in range(16 // row.element_size()):
        buffer = torch.full((v + 16,), NAN, dtype=dtype, device=DEVICE)
        view = buffer[head : head + v][None]
        view.copy_(row)
        *stats, moved = stats_of(view, targets)
        assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))
        assert torch.equal(moved, state)
        # The gradient beside an aligned row, then over the row itself.
        for source, out in ((row, torch.empty_like(buffer)[head : head + v][None]), (view, view)):
            impl().token_stats_bwd(source, targets, state, upstream, params, out)
            assert torch.equal(out, gradient)
        assert buffer[:head].isnan().all()
        assert buffer[head + v :].isnan().all()


def test_bits_do_not_depend_on_whether_rows_are_split():
    """One row alone is read by two programs, the same row among four by one."""
    logits = rows(4, 40_000)
    targets = torch.tensor([5, 20_000, 39_999, 32_775], device=DEVICE)
    together, dtogether = stats_of(logits, targets), torch.empty_like(logits)
    loss = loss_of(logits, targets, dtogether)
    for i in range(4):
        one = slice(i, i + 1)
        alone, dalone = stats_of(logits[one], targets[one]), torch.empty_like(logits[one])
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))
        outputs = loss_of(logits[one], targets[one], dalone)
        assert all(torch.equal(a, b[one]) for a, b in zip(outputs, loss, strict=True))
        assert torch.equal(dalone, dtogether[one])


@pytest.mark.parametrize("n", [2, 4])
def test_the_ratio_of_an_unchanged_policy_is_exactly_one(n):
    """Split and unsplit: both entry points form the same logp, bit for bit."""
    logits = rows(n, 33_001)
    targets = torch.arange(n, device=DEVICE)
    old_logp = stats_of(logits, targets)[0]
    out = loss_of(logits, targets, old_logp=old_logp)
    assert torch.equal(out[1], old_logp)
    assert out[6].eq(1.0).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, None])
def test_logp_is_rounded_once(temperature):
    """However far below the maximum the token is. What 1 / temperature, the difference of logits
    and their product are rounded by moved the slope of a KL term, e^(ref_logp - logp), so much that
    what it left of the surrogate's lost its digits."""
    z = rows(6, 40, torch.float32, seed=3) * 20.0
    z[:, 0] = 77.7
    targets = torch.arange(1, 7, device=DEVICE)
    own = torch.linspace(0.3, 1.9, 6, device=DEVICE)
    row = RowParams(temperature or 1.0, 0.0, 40, temperatures=None if temperature else own)
    logp = impl().token_stats_fwd(z, targets, row)[0].double()
    u = z.double() / (temperature or own.double()[:, None])
    exact = u.log_softmax(1).gather(1, targets[:, None])[:, 0]
    # Half a unit in its last place, and what log Z has of its own rounding.
    assert ((logp - exact).abs() <= 2.0**-24 * exact.abs() + 2e-7).all()


def test_nearly_certain_tokens():
    check_nearly_certain_tokens("triton", DEVICE, 128)


@pytest.mark.parametrize("masked", ["first", "last", "all_but_the_rest"])
def test_segments_without_mass(masked):
    """Whole segments of -inf, in split rows."""
    v = 33_001
    case = make_case("normal", 2, v, dtype=torch.bfloat16, device=DEVICE)
    part = {
        "first": slice(0, 32_768),
        "last": slice(32_768, v),
        "all_but_the_rest": slice(0, 32_992),
    }[masked]
    case.logits[:, part] = -torch.inf
    case.targets.fill_(3 if masked == "last" else v - 3 if masked == "all_but_the_rest" else 32_990)
    check_token_stats(case, "triton")


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("value", [NAN, torch.inf])
def test_a_bad_logit_anywhere_spoils_its_row_alone(n, value):
    """In the first tile, in another segment, and in the elements after the words."""
    for column in (0, 32_800, 33_000):
        logits, targets = rows(n, 33_001), torch.arange(n, device=DEVICE)
        expected = stats_of(logits, targets)
        logits[1, column] = value
        stats, dlogits = stats_of(logits, targets), torch.empty_like(logits)
        loss_of(logits, targets, dlogits)
        assert all(x[1].isnan().all() for x in stats[:4])
        assert dlogits[1].isnan().all()
        assert all(torch.equal(a[0], b[0]) for a, b in zip(stats, expected, strict=True))
        assert dlogits[0].isfinite().all()


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("target", [300, -1, -2, -101, 2**40, -(2**40)])
def test_a_target_that_is_no_column_is_neither_read_nor_written(n, target):
    """NaN in its row, nothing elsewhere: the row lies between guards."""
    buffer = torch.full((n, 340), 7.0, device=DEVICE)
    logits = buffer[:, 20:320]
    logits.copy_(rows(n, 300, torch.float32))
    targets = torch.full((n,), 4, device=DEVICE)
    targets[0] = target
    *stats, _ = stats_of(logits, targets)
    assert all(x[0].isnan() and x[1:].isfinite().all() for x in stats)
    *out, clip_side = loss_of(logits, targets, logits)
    assert all(x[0].isnan() and x[1:].isfinite().all() for x in out)
    assert clip_side[0] == INSIDE
    assert logits[0].isnan().all()
    assert logits[1:].isfinite().all()
    assert buffer[:, :20].eq(7.0).all()
    assert buffer[:, 320:].eq(7.0).all()


@pytest.mark.parametrize("n", [2, 5])
def test_ignored_rows_and_padding_are_not_read(n):
    """Both hold NaN; their gradient is 0, over segments of zeros too."""
    v, vocab_size = 33_100, 33_001
    logits = rows(n, v)
    logits[1] = NAN
    logits[:, vocab_size:] = NAN
    targets = torch.arange(n, device=DEVICE)
    targets[1] = -100
    *stats, state = stats_of(logits, targets, vocab_size)
    assert all(x[1].eq(0).all() and x[0].isfinite().all() for x in (*stats, state))
    row = RowParams(0.9, 0.0, vocab_size)
    upstream = (torch.ones(n, device=DEVICE),) * 4
    dlogits = torch.full_like(logits, 5.0)
    impl().token_stats_bwd(logits, targets, state, upstream, row, dlogits)
    assert dlogits[1].eq(0).all()
    assert dlogits[:, vocab_size:].eq(0).all()
    assert dlogits[0].isfinite().all()


@pytest.fixture
def short_segments(monkeypatch):
    """Rows of 1100 columns have several, and are split where they are few."""
    from papo_kernels.backends.triton import launch

    monkeypatch.setenv("PAPO_TRITON_CONFIG", "lanes=64,vectors=1,segment=1,maxnreg=64")
    launch.clear_config()
    yield
    monkeypatch.undo()
    launch.clear_config()


@pytest.mark.parametrize("n", [3, 7])
def test_every_row_has_a_temperature_of_its_own(n, short_segments):
    """Split, whole and from states; one that is no positive number spoils its row alone, and none
    that is not read."""
    own = torch.tensor([0.5, 2.0, 0.0, NAN, -1.0, torch.inf, NAN][:n], device=DEVICE)
    logits, targets = rows(n, 1100), torch.arange(n, device=DEVICE)
    targets[6:] = -100
    row = RowParams(1.0, 0.0, 1100, temperatures=own)
    ones = torch.ones(n, device=DEVICE)
    tokens, upstream = TokenInputs(ones, ones, None, None), (ones, None, ones, ones)

    def results(logits, targets, tokens, upstream, row):
        *stats, state = impl().token_stats_fwd(logits, targets, row)
        found = [*stats, impl().token_stats_bwd(logits, targets, state, upstream, row)]
        for given in (None, state):
            dz = torch.empty_like(logits)
            found += impl().policy_loss_fwd(logits, targets, tokens, PARAMS, None, row, dz, given)
            found.append(dz)
        return found

    found = results(logits, targets, tokens, upstream, row)
    for i in range(2):
        at = slice(i, i + 1)
        one = TokenInputs(ones[at], ones[at], None, None)
        shared = row._replace(temperature=own[i].item(), temperatures=None)
        alone = results(logits[at], targets[at], one, (ones[at], None, *[ones[at]] * 2), shared)
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a[at], b, rtol=2e-3 if a.dim() == 2 else 1e-5, atol=1e-6)
    assert all(x[2:6].isnan().all() for x in found if x.dtype != torch.uint8)
    assert all(x[6:].eq(0).all() for x in found)
    assert all(x.eq(INSIDE).all() for x in found if x.dtype == torch.uint8)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ["token_weight", "kl_weight", "entropy_weight"])
def test_a_row_is_read_where_any_term_has_a_weight(n, name, short_segments):
    """Split and whole; the others hold NaN."""
    logits, targets = rows(n, 1100), torch.arange(n, device=DEVICE)
    logits[1] = NAN
    zeros, weights = torch.zeros(n, device=DEVICE), torch.zeros(n, device=DEVICE)
    weights[0] = 1.0
    tokens = TokenInputs(zeros + 1.0, zeros, None, zeros, None, zeros, zeros)
    tokens = tokens._replace(**{name: weights})
    dlogits, row = torch.empty_like(logits), RowParams(0.9, 0.0, 1100)
    out = impl().policy_loss_fwd(logits, targets, tokens, PARAMS, None, row, dlogits)
    assert out[1][0] < 0
    assert dlogits[0].ne(0).any()
    assert all(x[1:].eq(0).all() for x in (*out, dlogits))


@pytest.mark.parametrize("factor", [0.0, torch.inf])
def test_an_infinite_factor_of_a_gradient_gives_no_nan(factor):
    dlogits = torch.tensor([[0.0, torch.inf, 1.0]], device=DEVICE)
    if factor:
        dlogits[0, 1] = -2.0
    impl().scale_(dlogits, torch.tensor(factor, device=DEVICE))
    assert not dlogits.isnan().any()
    assert dlogits[0, 0] == 0
    assert dlogits.ne(0).any() == bool(factor)


def test_more_columns_than_can_be_counted_are_refused():
    logits = torch.empty(1, device=DEVICE).expand(1, 2**30 + 1)
    with pytest.raises(ValueError, match=r"logits: expected at most 2\^30 columns"):
        stats_of(logits, torch.tensor([0], device=DEVICE))
