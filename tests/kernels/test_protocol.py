"""The protocol that backends implement (papo_kernels/backends/protocol.py): row states, shards of
the vocabulary, and where the gradient is written."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from papo_kernels import Objective
from papo_kernels.backends import named
from papo_kernels.reference import merge_states
from papo_kernels.types import RowParams, TokenInputs, WeightingInputs, acc_dtype
from tests.cases import make_loss_case
from tests.oracle import FLOOR, assert_close, plain_token_stats

IGNORED, ELSEWHERE = -100, -1
PARAMS = Objective(clip_high=0.28, dual_clip=2.0, kl_coef=0.04, entropy_coef=0.01)
# Shards [begin, end) of 300 columns: even, ragged, a single column, a shard of nothing but -inf.
SPLITS = {
    "even": (0, 100, 200, 300),
    "ragged": (0, 37, 290, 300),
    "one_column": (0, 1, 2, 300),
    "masked_shard": (0, 120, 180, 300),
}


def merged(a, b):
    """Section 1 of the specification, for one row and Python floats."""
    if a[0] < b[0]:
        a, b = b, a
    m, Z, T, Z2, T2 = a[:5]
    target_u = max(a[5], b[5])
    if b[0] == float("-inf"):
        return m, Z, T, Z2, T2, target_u
    shift = b[0] - m
    e = torch.tensor(shift, dtype=torch.float64).exp().item()
    return (
        m,
        Z + e * b[1],
        T + e * (b[2] + shift * b[1]),
        Z2 + e * e * b[3],
        T2 + e * e * (b[4] + shift * b[3]),
        target_u,
    )


class Call:
    """One case as the arguments of the protocol's functions."""

    def __init__(self, backend, device, n):
        self.impl = named(backend)
        case = make_loss_case("masked", n, 300, device=device, objective=PARAMS, softcap=25.0)
        case.logits[:, 120:180] = -torch.inf
        inside = (case.targets >= 120) & (case.targets < 180)
        case.targets[inside] = 7
        case.logits[inside, 7] = 1.0
        case.targets[-1] = IGNORED
        self.acc = acc_dtype(case.logits.dtype)
        self.case, self.logits, self.targets = case, case.logits, case.targets
        self.row = RowParams(0.8, 25.0, 300, sharded=True)
        self.tokens = TokenInputs(case.advantages, case.token_weight, case.old_logp, case.ref_logp)
        scalars = [torch.tensor(x, dtype=self.acc, device=device) for x in (0.5, 0.1, 1.1)]
        self.weighting = WeightingInputs(0.5, scalars[0], "tanh", *scalars[1:], 1e-6)
        g = torch.Generator().manual_seed(3)
        self.grads = tuple(
            torch.randn(n, generator=g).to(device=device, dtype=self.acc) for _ in range(4)
        )

    def whole(self):
        """Outputs and gradients of the unsplit rows."""
        *stats, state = self.impl.token_stats_fwd(self.logits, self.targets, self.row)
        dstats = self.impl.token_stats_bwd(self.logits, self.targets, state, self.grads, self.row)
        dloss = torch.empty_like(self.logits)
        loss = self.policy_loss(self.logits, self.targets, self.row, dloss)
        return stats, state, dstats, loss, dloss

    def policy_loss(self, logits, targets, row, dlogits, state=None):
        return self.impl.policy_loss_fwd(
            logits,
            targets,
            self.tokens,
            PARAMS,
            self.weighting,
            row,
            dlogits,
            *(() if state is None else (state,)),
        )

    def shards(self, split):
        """Logits, local targets and row parameters of every shard."""
        edges = SPLITS[split]
        for begin, end in itertools.pairwise(edges):
            here = (self.targets >= begin) & (self.targets < end)
            local = torch.where(here, self.targets - begin, ELSEWHERE)
            local = torch.where(self.targets == IGNORED, IGNORED, local)
            yield self.logits[:, begin:end], local, self.row._replace(vocab_size=end - begin)


def close(call, name, actual, expected):
    """To rounding: a sum in another order."""
    finite = expected[expected.isfinite()].double().abs()
    scale = finite.amax().item() if finite.numel() else 1.0
    # The state is stored as float64; its sums are no better than what they were added up in.
    floor = FLOOR[call.acc]
    assert_close(name, actual, expected.double(), expected, scale=scale + 1e-3, floor=floor)


@pytest.fixture
def call(backend, device, sizes):
    return Call(backend, device, sizes(12, 4))


def test_state_of_a_row(call):
    """row_max, Z, T, Z2, T2 about it, and the sampled token's scaled logit; 0 for ignored rows."""
    *_, state = call.impl.token_stats_fwd(call.logits, call.targets, call.row)
    assert state.shape == (len(call.targets), 6)
    assert state.dtype == torch.float64
    u = 25.0 * torch.tanh(call.logits.double() / 25.0) / 0.8
    u = torch.where(call.logits.isneginf(), -torch.inf, u)
    used = call.targets != IGNORED
    assert state[~used].eq(0).all()
    exact = u.amax(1)
    torch.testing.assert_close(state[used, 0], exact[used], rtol=3e-7, atol=0)
    # The sums are about row_max as stored, not about the exact one.
    d = torch.where(u.isneginf(), 0.0, u - state[:, :1])
    e = torch.where(u.isneginf(), 0.0, d.exp())
    sums = torch.stack([e.sum(1), (e * d).sum(1), (e * e).sum(1), (e * e * d).sum(1)], 1)
    # Triton's tanh is made of an exp2 and a division that are each off by up to two units in the
    # last place: where it starts, at 0.625, these move it by 8e-8 and 6e-8, and rounding by 3e-8.
    # u moves by 25 / 0.8 times that, and every e^d by as much of itself.
    allowed = 2e-6 + (25.0 / 0.8 * 1.7e-7 if call.impl.name == "triton" else 0.0)
    torch.testing.assert_close(state[used, 1:5], sums[used], rtol=allowed, atol=allowed)
    sampled = u.gather(1, call.targets.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(state[used, 5], sampled[used], rtol=3e-7, atol=0)


@pytest.mark.parametrize("split", SPLITS)
def test_shards_of_the_vocabulary(split, call):
    """A sampled token outside the shard is neither read nor written, in a ragged last tile least of
    all; merged states give every shard the whole row's results and its own columns' gradient."""
    stats, state, dstats, loss, dloss = call.whole()
    shards = list(call.shards(split))
    parts = torch.stack([call.impl.token_stats_fwd(z, t, row)[-1] for z, t, row in shards])
    whole = merge_states(parts)
    used = (call.targets != IGNORED).tolist()
    for i in [i for i, u in enumerate(used) if u]:
        folded = functools.reduce(merged, parts[:, i].tolist())
        assert whole[i].tolist() == pytest.approx(folded, rel=1e-12)
    close(call, "state", whole, state)

    ds, dl = [], []
    for z, t, row in shards:
        *again, kept = call.impl.token_stats_fwd(z, t, row, whole)
        for name, a, b in zip(("logp", "entropy", "c", "lse"), again, stats, strict=True):
            close(call, name, a, b)
        assert torch.equal(kept[used], whole[used])
        ds.append(call.impl.token_stats_bwd(z, t, whole, call.grads, row))
        buffer = torch.full_like(z, torch.nan)
        out = call.policy_loss(z, t, row, buffer, whole)
        for a, b in zip(out[:-1], loss[:-1], strict=True):
            close(call, "loss", a, b)
        assert torch.equal(out[-1], loss[-1])
        dl.append(buffer)
    close(call, "dstats", torch.cat(ds, 1), dstats)
    close(call, "dloss", torch.cat(dl, 1), dloss)


def test_with_a_state_the_logits_are_not_read_forward(call):
    """NaN everywhere, and yet the same outputs: the merged state holds all of the row."""
    stats, state, _, loss, _ = call.whole()
    blank = torch.full_like(call.logits, torch.nan)
    *again, _ = call.impl.token_stats_fwd(blank, call.targets, call.row, state)
    assert all(torch.equal(a, b) for a, b in zip(again, stats, strict=True))
    out = call.policy_loss(blank, call.targets, call.row, None, state)
    assert all(torch.equal(a, b) for a, b in zip(out, loss, strict=True))


def test_a_state_kept_from_the_forward_pass_gives_the_same_gradient(call):
    _, state, dstats, loss, dloss = call.whole()
    buffer = torch.empty_like(call.logits)
    out = call.policy_loss(call.logits, call.targets, call.row, buffer, state)
    assert all(torch.equal(a, b) for a, b in zip(out, loss, strict=True))
    close(call, "dloss", buffer, dloss)
    assert dstats.abs().amax() > 0


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
def test_state_of_a_shard_without_a_distribution(value, backend, device):
    """-inf everywhere: the identity of the merge. NaN and +inf: NaN, which no merge hides."""
    impl = named(backend)
    logits = torch.full((2, 40), -torch.inf, device=device)
    logits[:, 11] = value
    targets = torch.tensor([ELSEWHERE, 3], device=device)
    *_, state = impl.token_stats_fwd(logits, targets, RowParams(1.0, 0.0, 40, sharded=True))
    good = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(device)
    elsewhere = torch.tensor([5, ELSEWHERE], device=device)
    *stats, other = impl.token_stats_fwd(good, elsewhere, RowParams(1.0, 0.0, 50, sharded=True))
    whole = merge_states(torch.stack([state, other]))
    if value == -torch.inf:
        assert state[:, 0].isneginf().all()
        assert state[:, 1:5].eq(0).all()
        assert torch.equal(whole, other)
        return
    *again, _ = impl.token_stats_fwd(good, elsewhere, RowParams(1.0, 0.0, 50, sharded=True), whole)
    assert all(x.isnan().all() for x in again)
    assert not any(x[:1].isnan().any() for x in stats)
    grads = (torch.ones(2, device=device),) * 4
    dz = impl.token_stats_bwd(good, elsewhere, whole, grads, RowParams(1.0, 0.0, 50, sharded=True))
    assert dz.isnan().all()


@pytest.mark.parametrize("where", ["strided", "in_place"])
def test_where_the_gradient_goes(where, call):
    """Into rows of another stride, or over the logits; the same bits as into a new tensor, and
    nothing between the rows is touched."""
    _, state, dstats, _, dloss = call.whole()
    for name, expected in (("stats", dstats), ("loss", dloss)):
        buffer = torch.full(
            (len(call.logits), 320), 3.0, dtype=call.logits.dtype, device=call.logits.device
        )
        target = buffer[:, 8:308]
        source = target.copy_(call.logits) if where == "in_place" else call.logits
        if name == "stats":
            result = call.impl.token_stats_bwd(
                source, call.targets, state, call.grads, call.row, target
            )
            assert result.data_ptr() == target.data_ptr()
        else:
            call.policy_loss(source, call.targets, call.row, target)
        assert torch.equal(target, expected)
        target.fill_(3.0)
        assert buffer.eq(3.0).all()


@pytest.mark.parametrize("softcap", [0.0, 25.0])
def test_temperatures_of_rows(softcap, backend, device, sizes):
    """Each row as in a call whose only temperature is its own, bit for bit; one that is none makes
    its row NaN, unless that is ignored."""
    impl, n = named(backend), sizes(9, 5)
    case = make_loss_case("masked", n, 300, device=device, objective=PARAMS)
    case.targets[-1] = IGNORED
    values = torch.tensor([0.5, 1.0, 0.6875, 0.0, 3.0, -1.0, torch.nan, torch.inf, 0.5])[:n]
    values[-1] = torch.nan
    tokens = TokenInputs(case.advantages, case.token_weight, case.old_logp, case.ref_logp)

    def run(row):
        *stats, state = impl.token_stats_fwd(case.logits, case.targets, row)
        grads = (case.advantages,) * 4
        dstats = impl.token_stats_bwd(case.logits, case.targets, state, grads, row)
        dloss = torch.empty_like(case.logits)
        loss = impl.policy_loss_fwd(case.logits, case.targets, tokens, PARAMS, None, row, dloss)
        return *stats, state, dstats, *loss, dloss

    together = run(RowParams(1.0, softcap, 300, temperatures=values.to(device)))
    for i, temperature in enumerate(values.tolist()):
        if 0.0 < temperature < torch.inf:
            alone = run(RowParams(temperature, softcap, 300))
            assert all(torch.equal(a[i], b[i]) for a, b in zip(together, alone, strict=True))
        elif case.targets[i] == IGNORED:
            assert all(x[i].eq(0).all() for x in together)
        else:
            assert all(x[i].isnan().all() for x in together[:4])
            assert together[5][i].isnan().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_of_float32_logits(half, call, backend):
    """For the linear entry points: float32 out of the matrix product, half precision into the next.
    The CPU, whose products stay in float32, refuses."""
    _, state, dstats, _, dloss = call.whole()
    for name, expected in (("stats", dstats), ("loss", dloss)):
        dlogits = torch.empty_like(call.logits, dtype=half)

        def write(name=name, dlogits=dlogits):
            if name == "stats":
                call.impl.token_stats_bwd(
                    call.logits, call.targets, state, call.grads, call.row, dlogits
                )
            else:
                call.policy_loss(call.logits, call.targets, call.row, dlogits)

        if half not in call.impl.capabilities.half_gradients:
            assert backend == "cpu"
            with pytest.raises(TypeError, match=r"dlogits: expected torch\.float32 like logits"):
                write()
            continue
        write()
        bound = 0.51 * torch.finfo(half).eps * expected.abs() + 1e-7
        assert ((dlogits.float() - expected).abs() <= bound).all()


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0, 0.0])
def test_scale(factor, backend, device, dtypes):
    impl = named(backend)
    for dtype in dtypes:
        wide = torch.randn(5, 99, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        rows = wide[:, 1:90]
        expected = wide.clone()
        expected[:, 1:90] *= factor
        impl.scale_(rows, torch.tensor(factor, dtype=torch.float32, device=device))
        assert torch.equal(wide, expected)
    empty = torch.empty(0, 7, device=device)
    impl.scale_(empty, torch.tensor(2.0, device=device))


def test_scaling_by_one_leaves_nan_and_inf_alone(backend, device):
    impl = named(backend)
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0, 1e-40]], device=device)
    before = values.view(torch.int32).clone()
    impl.scale_(values, torch.tensor(1.0, device=device))
    assert torch.equal(values.view(torch.int32), before)


def test_no_rows_and_no_gradients(backend, device):
    impl = named(backend)
    row = RowParams(1.0, 0.0, 9)
    logits, targets = torch.empty(0, 9, device=device), torch.empty(0, dtype=torch.int64).to(device)
    *stats, state = impl.token_stats_fwd(logits, targets, row)
    assert state.shape == (0, 6)
    assert all(x.shape == (0,) for x in stats)
    dz = impl.token_stats_bwd(logits, targets, state, (None,) * 4, row)
    assert dz.shape == (0, 9)
    logits, targets = torch.randn(3, 9, device=device), torch.tensor([1, 2, 3], device=device)
    *_, state = impl.token_stats_fwd(logits, targets, row)
    dz = impl.token_stats_bwd(logits, targets, state, (None,) * 4, row)
    assert dz.eq(0).all()


def test_outputs_from_a_state_agree_with_the_definitions(call):
    """Not only with the unsplit kernel: a mistake shared by both would pass the tests above."""
    shards = list(call.shards("ragged"))
    parts = torch.stack([call.impl.token_stats_fwd(z, t, r)[-1] for z, t, r in shards])
    z, t, row = shards[1]
    *stats, _ = call.impl.token_stats_fwd(z, t, row, merge_states(parts))
    options = {"temperature": 0.8, "softcap": 25.0}
    exact = plain_token_stats(call.logits, call.targets, **options)
    plain = plain_token_stats(call.logits, call.targets, dtype=torch.float32, **options)
    for name, actual in zip(("logp", "entropy", "unit_polarity", "lse"), stats, strict=True):
        assert_close(name, actual, getattr(exact, name), getattr(plain, name))
