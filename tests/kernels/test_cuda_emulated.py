"""The CUDA kernels on the emulated machine of cuda_emulator.py, beyond what the suite shows of the
backend "emulated": clusters of every width, threads and transfers in random order, nothing read or
written outside the matrices.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from papo_kernels import Objective, PolarityWeighting
from papo_kernels.backends.native import CUDA
from papo_kernels.types import RowParams, TokenInputs, WeightingInputs
from tests.cases import LOGITS, Case, make_case, make_loss_case
from tests.kernels.cuda_emulator import DEVICES, at_offset, emulated
from tests.kernels.test_extremes import check_nearly_certain_tokens
from tests.oracle import check_policy_loss, check_token_stats

pytestmark = pytest.mark.needs("g++")

EVERY_TERM = Objective(clip_low=0.2, clip_high=0.28, dual_clip=1.5, kl_coef=0.04, entropy_coef=0.01)
WEIGHTING = PolarityWeighting(0.5, 0.7, sigma=0.1, scale=1.1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, V, which regime it covers)
SHAPES = (
    (1, 1, "one element: less than a word, one lane of one warp"),
    (3, 7, "a ragged row shorter than a word of 2-byte elements"),
    (40, 33, "more rows than one look-ahead of 32, odd rows"),
    (9, 1000, "a few words per lane, every row aligned"),
    (7, 3001, "a cluster of 2 or more, odd rows, a ragged end in the last block"),
    (5, 8200, "a cluster of 4 or more"),
)


# The three ways there are to run a call; the device's limits decide.
@pytest.fixture(params=["ahead", "in_turn", "no_clusters"])
def device_limits(request):
    return DEVICES[request.param]


@pytest.mark.parametrize("n,v", [(n, v) for n, v, _ in SHAPES])
def test_shapes(n, v, device_limits):
    with emulated(**device_limits):
        for dtype in DTYPES:
            check_token_stats(make_case("normal", n, v, dtype=dtype), "cuda")
            case = make_loss_case(
                "normal", n, v, dtype=dtype, objective=EVERY_TERM, weighting=WEIGHTING
            )
            check_policy_loss(case, "cuda", factor=-1.5)
            check_policy_loss(case, "cuda", inplace=True)


@pytest.mark.parametrize("kind", LOGITS)
def test_kinds_in_half_precision(kind, device_limits):
    with emulated(**device_limits):
        for dtype in DTYPES[1:]:
            check_token_stats(make_case(kind, 16, 1601, dtype=dtype), "cuda")
            case = make_loss_case(
                kind, 16, 1601, dtype=dtype, objective=EVERY_TERM, weighting=WEIGHTING
            )
            check_policy_loss(case, "cuda", inplace=True)


def test_a_slice_of_several_buffers():
    """37,500 columns do not fit one buffer of 32 KB; the ring holds one more than they fill."""
    with emulated(shared_per_block=110000, shared_per_multiprocessor=110000) as native:
        case = make_loss_case("normal", 4, 300001, dtype=torch.bfloat16, objective=EVERY_TERM)
        check_policy_loss(case, "cuda", inplace=True)
        assert native.widest_cluster == 8
        check_token_stats(case, "cuda")


def test_a_real_vocabulary_on_an_h100():
    with emulated(**DEVICES["h100"]) as native:
        case = make_loss_case("normal", 2, 151_936, dtype=torch.bfloat16, objective=EVERY_TERM)
        check_policy_loss(case, "cuda", inplace=True)
        assert native.widest_cluster > 1
        check_token_stats(case, "cuda")


# ---- orders -------------------------------------------------------------------------------------


def one_call(case: Case, dlogits: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    scalars = [torch.tensor(x) for x in (0.5, 0.1, 1.1)]
    return CUDA.policy_loss_fwd(
        case.logits,
        case.targets,
        TokenInputs(case.advantages, case.token_weight, case.old_logp, case.ref_logp),
        case.objective,
        WeightingInputs(0.5, scalars[0], "tanh", *scalars[1:], 1e-6),
        RowParams(case.temperature, case.softcap or 0.0, case.logits.shape[1]),
        dlogits,
    )


@pytest.mark.parametrize("v", [900, 3001, 8200])
def test_every_order_of_threads_gives_the_same_bits(v, device_limits):
    """Sixteen orders, one to three clusters at a time: a missing barrier changes or hangs one."""
    case = make_loss_case("normal", 11, v, dtype=torch.bfloat16, objective=EVERY_TERM)
    first = None
    for seed in range(16):
        with emulated(**device_limits, resident=1 + seed % 3, seed=seed):
            dlogits = torch.full_like(case.logits, torch.nan)
            outputs = (*one_call(case, dlogits), dlogits)
        first = outputs if first is None else first
        for a, b in zip(outputs, first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("v", [900, 3001, 8200])
def test_the_ratio_to_ones_own_logp_is_exactly_one(v, device_limits):
    """Whatever the number of rows, their alignment, and whether a gradient is formed."""
    logits = (3.0 * torch.randn(6, v)).to(torch.bfloat16)
    targets = torch.randint(v, (6,))
    row = RowParams(0.9, 0.0, v)
    ones = torch.ones(6)
    with emulated(**device_limits):
        logp, *_ = CUDA.token_stats_fwd(logits, targets, row)
        for offset, stride in ((0, v), (3, v + 5), (1, v + 8)):
            moved = at_offset(logits, stride, offset)
            for rows in (slice(0, 6), slice(2, 3)):
                for dlogits in (None, torch.empty_like(logits[rows])):
                    tokens = TokenInputs(ones[rows], ones[rows], logp[rows].contiguous(), None)
                    _, again, *_, ratio, _ = CUDA.policy_loss_fwd(
                        moved[rows], targets[rows], tokens, Objective(), None, row, dlogits
                    )
                    assert torch.equal(again, logp[rows])
                    assert ratio.eq(1.0).all()


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment_of_both_matrices(dtype, device_limits):
    """Rows that start anywhere within a word, in the logits and, elsewhere, in the gradient."""
    n, v = 3, 1203
    case = make_loss_case("normal", n, v, dtype=dtype, objective=EVERY_TERM)
    per_word = 16 // case.logits.element_size()
    expected = None
    with emulated(**device_limits):
        for offset in range(per_word):
            for out_offset in range(0, per_word, 3):
                moved = at_offset(case.logits, v + offset, offset)
                dlogits = at_offset(torch.full_like(case.logits, torch.nan), v + 1, out_offset)
                around = dlogits.untyped_storage().nbytes()
                one_call(replace(case, logits=moved), dlogits)
                expected = dlogits.clone() if expected is None else expected
                assert torch.equal(dlogits, expected)
                whole = torch.empty(0, dtype=dtype).set_(dlogits.untyped_storage())
                written = whole.isfinite().sum().item()
                assert written == n * v, f"{written} of {n * v} elements, {around} bytes"


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_float32_logits_with_a_narrower_gradient(narrow, device_limits):
    case = make_loss_case("normal", 5, 1203, objective=EVERY_TERM)
    row = RowParams(1.0, 0.0, 1203)
    g = torch.randn(4, 5)
    with emulated(**device_limits):
        wide, small = torch.empty_like(case.logits), torch.empty(5, 1203, dtype=narrow)
        one_call(case, wide)
        one_call(case, small)
        assert torch.equal(small, wide.to(narrow))
        *_, state = CUDA.token_stats_fwd(case.logits, case.targets, row)
        for dlogits in (wide, small):
            CUDA.token_stats_bwd(case.logits, case.targets, state, tuple(g), row, dlogits)
        assert torch.equal(small, wide.to(narrow))
        with pytest.raises(TypeError, match="dlogits"):
            one_call(case, torch.empty(5, 1203, dtype=torch.float64))


def test_in_place_and_beside_are_the_same(device_limits):
    case = make_loss_case("masked", 9, 3001, dtype=torch.bfloat16, objective=EVERY_TERM)
    row = RowParams(1.0, 0.0, 3001)
    g = tuple(torch.randn(4, 9))
    with emulated(**device_limits):
        *_, state = CUDA.token_stats_fwd(case.logits, case.targets, row)
        beside = CUDA.token_stats_bwd(case.logits, case.targets, state, g, row)
        over = case.logits.clone()
        CUDA.token_stats_bwd(over, case.targets, state, g, row, over)
        assert torch.equal(over, beside)
        loss = torch.empty_like(beside)
        outputs = one_call(case, loss)
        over = case.logits.clone()
        again = one_call(replace(case, logits=over), over)
        assert torch.equal(over, loss)
        for a, b in zip(outputs, again, strict=True):
            assert torch.equal(a, b)


# ---- rows that are special ----------------------------------------------------------------------


def test_rows_that_contribute_nothing(device_limits):
    """Ignored rows and rows of weight 0 hold NaN; all of them, none, and runs longer than 32."""
    n, v = 70, 40
    with emulated(**device_limits):
        for left_out in (range(0, n), range(3, 40), range(1, n, 2)):
            case = make_loss_case("normal", n, v, dtype=torch.bfloat16, objective=EVERY_TERM)
            rows = torch.tensor(list(left_out))
            case.targets[rows[::2]] = -100
            case.token_weight[rows] = 0.0
            case.logits[rows] = torch.nan
            dlogits = check_policy_loss(case, "cuda", inplace=True)
            assert dlogits[rows].eq(0).all()
            case.targets[rows] = -100
            assert check_token_stats(case, "cuda")[rows].eq(0).all()


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_bad_rows_are_nan_and_their_neighbors_are_not(bad, device_limits):
    """One such element anywhere, or all of them; a single -inf is a masked token and no bad row."""
    v, row = 1601, 3
    others = [i for i in range(9) if i != row]
    with emulated(**device_limits):
        for dtype in DTYPES:
            case = make_loss_case("normal", 9, v, dtype=dtype, objective=EVERY_TERM)
            case.targets[row], case.token_weight[row] = 5, 0.1
            expected_grad = torch.empty_like(case.logits)
            expected = one_call(case, expected_grad)
            for place in (0, 700, v - 1, slice(None)):
                logits = case.logits.clone()
                logits[row, place] = float(bad)
                dlogits = torch.empty_like(logits)
                outputs = one_call(replace(case, logits=logits), dlogits)
                masked = bad == "-inf" and place != slice(None)
                for x in (*outputs[:-1], dlogits):
                    assert x[row].isnan().any() == (not masked)
                    assert x[row].isnan().all() == (not masked)
                for x, y in zip((*outputs, dlogits), (*expected, expected_grad), strict=True):
                    assert torch.equal(x[others], y[others])


@pytest.mark.parametrize("target", [1203, 5000, -1, -2, -101, 2**40, -(2**40)])
def test_a_target_out_of_range_makes_its_row_nan(target, device_limits):
    logits = torch.randn(5, 1203)
    targets = torch.tensor([0, 7, target, 1202, -100])
    row = RowParams(1.0, 0.0, 1203)
    with emulated(**device_limits):
        *stats, state = CUDA.token_stats_fwd(logits, targets, row)
        dlogits = CUDA.token_stats_bwd(logits, targets, state, (torch.ones(5),) * 4, row)
        ones = torch.ones(5)
        loss = torch.empty_like(logits)
        outputs = CUDA.policy_loss_fwd(
            logits, targets, TokenInputs(ones, ones, None, None), EVERY_TERM, None, row, loss
        )
    for x in (*stats, dlogits, *outputs[:-1], loss):
        assert x[2].isnan().all()
        assert x[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("v", [128, 1000, 2048])
def test_nearly_certain_tokens(v, device_limits):
    """The machine's exponentials are off by up to two units in the last place, as a GPU's."""
    with emulated(**device_limits):
        check_nearly_certain_tokens("cuda", "cpu", v)


# ---- states, scaling, nothing -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype):
    x = torch.randn(3, 70001).to(dtype)
    with emulated():
        for stride, offset in ((70001, 0), (70001, 1), (70010, 3)):
            y = at_offset(x, stride, offset)
            CUDA.scale_(y, torch.tensor(-0.75, dtype=torch.float64))
            assert torch.equal(y, (x.float() * -0.75).to(dtype))
            CUDA.scale_(y, torch.tensor(1.0))
            assert torch.equal(y, (x.float() * -0.75).to(dtype))


def test_more_columns_than_can_be_counted_are_refused():
    logits = torch.empty(1).expand(1, 2**30 + 1)
    with pytest.raises(ValueError, match=r"logits: expected at most 2\^30 columns"):
        CUDA.capabilities.check(logits)


def test_no_rows(device_limits):
    row = RowParams(1.0, 0.0, 40)
    none = torch.empty(0)
    logits, targets = torch.empty(0, 40), torch.empty(0, dtype=torch.int64)
    with emulated(**device_limits) as native:
        *stats, state = CUDA.token_stats_fwd(logits, targets, row)
        assert [tuple(x.shape) for x in stats] == [(0,)] * 4
        assert CUDA.token_stats_bwd(logits, targets, state, (none,) * 4, row).shape == (0, 40)
        tokens = TokenInputs(none, none, None, None)
        CUDA.policy_loss_fwd(logits, targets, tokens, EVERY_TERM, None, row, logits)
        CUDA.scale_(logits, torch.tensor(2.0))
        assert native.launches == 0
