"""The torch operations: opcheck of every one, and torch.compile forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.testing._internal.optests import aot_autograd_check

from papo_kernels import (
    Compute,
    Logits,
    Objective,
    PolarityWeighting,
    dispatch,
    policy_loss,
    token_stats,
)
from tests.cases import make_loss_case

pytestmark = pytest.mark.plumbing
N, V = 5, 37
ROW = torch.tensor([0.9, 20.0], dtype=torch.float64)  # temperature, soft cap
OBJECTIVE = Objective(0.2, 0.28, 3.0, 0.04, 0.01)
# Temperature, soft cap, strength and dead zone come before the objective's.
NUMBERS, OF_CISPO = (
    torch.tensor([0.9, 0.0, 0.5, 1e-6, *objective.numbers()], dtype=torch.float64)
    for objective in (OBJECTIVE, Objective(0.2, 0.28, surrogate="cispo", kl_limit=10.0))
)


def loss_arguments(device, dtype=torch.float32):
    """What both policy-loss operations take after the logits, but for the backend."""
    case = make_loss_case("normal", N, V, dtype=dtype, device=device, vocab_size=V - 2)
    scalars = [torch.tensor(x, device=device) for x in (0.5, 1.0, 1.1)]
    tokens = (case.targets, case.advantages, case.token_weight, case.old_logp, case.ref_logp)
    terms = ("sign", "clip", "k3", False, NUMBERS, None, V - 2)
    return case.logits, (*tokens, None, None, None, *scalars, *terms)


def samples(name, backend, device):
    """Arguments of one operation: plain, optional ones absent, strided, in half precision."""
    logits, rest = loss_arguments(device)
    targets = rest[0]
    strided = torch.zeros(N, V + 3, device=device)[:, :V].copy_(logits)
    narrow, narrow_rest = loss_arguments(device, torch.bfloat16)
    temperatures = torch.linspace(0.5, 2.0, N, device=device)
    row = (ROW, None, V - 2)
    _, _, _, _, state = torch.ops.papo.token_stats(logits, targets, *row, backend)
    g = torch.ones(2 * N, device=device)[::2]
    without = (*rest[:3], *[None] * 8, *rest[11:])
    log_ratio = rest[3] - rest[4]
    full = (*rest[:3], None, rest[4], log_ratio, rest[2], 2.0 * rest[2], *rest[8:12])
    full = (*full, "cispo", "k1+", True, OF_CISPO, temperatures, V - 2)
    targets = torch.arange(N, device=device)
    if name == "token_stats":
        for z in (logits, strided, narrow, logits[:0]):
            yield z, targets[: len(z)], *row, backend
        yield logits, targets, ROW, temperatures, V - 2, backend
    elif name == "token_stats_bwd":
        yield logits, targets, state, g, None, None, None, *row, backend
        yield strided, targets, state, None, g, -g, g, *row, backend
        ids = torch.stack([targets, targets.flip(0)], 1)
        state = torch.ops.papo.token_stats(logits, ids, *row, backend)[-1]
        yield logits, ids, state, g[:, None].expand(-1, 2), g, None, None, *row, backend
    elif name == "logit_sums":
        yield logits, *row, backend
        yield strided, ROW, temperatures, V - 2, backend
    elif name == "policy_loss":
        yield logits, *rest, backend, True
        yield strided, *without, backend, True
        yield logits, *full, backend, True
        yield narrow, *narrow_rest, backend, False
    elif name == "policy_loss_":
        for z, more in ((logits, rest), (narrow, narrow_rest), (logits.clone(), without)):
            yield z, *more, backend
    elif name == "token_loss":
        stats = torch.ops.papo.token_stats(logits, targets, *row, backend)[:3]
        for more in (rest, without, full):
            yield *stats, *more, backend
    elif name == "scale_":
        yield logits, torch.tensor(0.5, device=device), backend
        yield narrow, torch.tensor(1.0, device=device), backend


OPERATIONS = (
    *("token_stats", "token_stats_bwd", "token_loss", "logit_sums"),
    *("policy_loss", "policy_loss_", "scale_"),
)


def test_no_operation_is_left_out():
    """The operations of a head have their opcheck in test_head_ops."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("papo::")}
    assert {name for name in names if "linear" not in name} == {f"papo::{x}" for x in OPERATIONS}


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck_of_every_operation(name, backend, device):
    checked = 0
    for arguments in samples(name, backend, device):
        torch.library.opcheck(getattr(torch.ops.papo, name).default, arguments)
        checked += 1
    assert checked


def statistics_of(backend, logits, targets):
    logits = Logits(logits, softcap=20.0, vocab_size=V - 2)
    return token_stats(logits, targets, temperature=0.9, compute=Compute(backend))


def loss_of(backend, logits, *arguments):
    targets, advantages, token_weight, old_logp, ref_logp, phase, sigma, scale = arguments
    return policy_loss(
        Logits(logits, vocab_size=V - 2),
        targets,
        advantages,
        token_weight,
        old_logp=old_logp,
        ref_logp=ref_logp,
        objective=OBJECTIVE,
        weighting=PolarityWeighting(0.5, phase, sigma=sigma, scale=scale),
        temperature=0.9,
        compute=Compute(backend),
    )


@pytest.mark.parametrize("kind", ["strided", "half precision", "no rows"])
def test_traced_gradients(kind, backend, device):
    """The part of opcheck that an operation without autograd escapes, for the two functions."""
    dtype = torch.bfloat16 if kind == "half precision" else torch.float32
    logits, rest = loss_arguments(device, dtype)
    tokens, (phase, sigma, scale) = rest[:5], rest[8:11]
    if kind == "strided":
        logits = torch.zeros(N, V + 3, device=device)[:, :V].copy_(logits)
    elif kind == "no rows":
        logits, tokens = logits[:0], [x[:0] for x in tokens]
    logits.requires_grad_()
    arguments = (backend, logits, *tokens, phase, sigma, scale)
    aot_autograd_check(statistics_of, arguments[:3], {}, dynamic=True)
    aot_autograd_check(loss_of, arguments, {}, dynamic=True)


def training_step(backend, inplace):
    """Hidden states to a loss with every option, statistics beside it; tensors in, tensors out."""

    def step(hidden, weight, targets, advantages, token_weight, old_logp, phase):
        logits = hidden @ weight.t()
        stats = token_stats(
            Logits(logits, softcap=30.0), targets, temperature=0.9, compute=Compute(backend)
        )
        out = policy_loss(
            Logits(logits * 1.0, vocab_size=V - 1),
            targets,
            advantages,
            token_weight,
            old_logp=old_logp,
            ref_logp=old_logp,
            objective=Objective(kl_coef=0.04, entropy_coef=0.01),
            weighting=PolarityWeighting(0.5, phase),
            compute=Compute(backend, inplace=inplace),
        )
        return out.loss + 0.1 * stats.unit_polarity.sum() + stats.entropy.mean(), out.weight

    return step


def step_inputs(n, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(k, 8, generator=g).to(device) for k in (n, V))
    targets = torch.randint(V - 1, (n,), generator=g).to(device)
    tokens = [torch.randn(n, generator=g).to(device) for _ in range(3)]
    phase = torch.rand((), generator=g).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, *tokens, phase


def run_step(step, inputs):
    loss, weight = step(*inputs)
    return loss.detach(), weight, *torch.autograd.grad(loss, inputs[:2])


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_steps(inplace, backend, device):
    """fullgraph, dynamic N: one compilation serves every N and phase, with eager's results."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = training_step(backend, inplace)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (6, 9, 17, 64):
        inputs = step_inputs(n, device, seed=n)
        pairs = zip(run_step(compiled, inputs), run_step(step, inputs), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


def test_compiled_by_inductor(backend, device):
    """The same through the default compiler, which fuses around the operations."""
    torch._dynamo.reset()
    step = training_step(backend, False)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (6, 9):
        inputs = step_inputs(n, device, seed=n)
        pairs = zip(run_step(compiled, inputs), run_step(step, inputs), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_no_compilation_per_shape(backend, device):
    """A sweep of N and V is served by one compilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def statistics(logits, targets):
        return token_stats(logits, targets, temperature=0.7, compute=Compute(backend))[:3]

    counts = []
    for n, v in [(4, 20), (5, 30), (6, 31), (9, 33), (10, 4000)]:
        logits = torch.randn(n, v, generator=torch.Generator().manual_seed(n)).to(device)
        targets = torch.arange(n, device=device)
        got = statistics(logits, targets)
        expected = token_stats(logits, targets, temperature=0.7, compute=Compute(backend))[:3]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_no_compilation_per_phase_sigma_and_scale(as_tensor, backend, device):
    """Five values of the weighting's numbers, floats that change with the training step or 0-dim
    tensors, with eager's results from one compilation (of the second value, where the first is
    taken for a constant)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    logits, (targets, advantages, token_weight, *_) = loss_arguments(device)

    def weights(phase, sigma, scale):
        weighting = PolarityWeighting(0.5, phase, shape="tanh", sigma=sigma, scale=scale)
        call = (Logits(logits, vocab_size=V - 2), targets, advantages, token_weight)
        return policy_loss(*call, weighting=weighting, compute=Compute(backend)).weight

    compiled = torch.compile(weights, fullgraph=True, backend=counter)
    counts = []
    for k in range(5):
        numbers = (0.9 - 0.3 * k, 0.01 + 0.02 * k, 1.1 + 0.1 * k)
        if as_tensor:
            numbers = [torch.tensor(x, device=device) for x in numbers]
        assert torch.equal(compiled(*numbers), weights(*numbers))
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 4 and counts[1] <= 2


def test_numbers_of_eager_calls_are_made_once(device):
    """Also when the first call that needs them runs in inference mode, whose tensors autograd
    refuses; a fake tensor is never among them."""
    like = torch.zeros(3, dtype=torch.int64, device=device)
    dispatch._filled.cache_clear()
    with FakeTensorMode():
        assert isinstance(dispatch.filled(0.25, torch.float32, like), FakeTensor)
    with torch.inference_mode():
        first = dispatch.filled(0.25, torch.float32, like)
    assert not first.is_inference() and type(first) is torch.Tensor and first.item() == 0.25
    assert dispatch.filled(0.25, torch.float32, like) is first
    assert dispatch.filled(0.25, torch.float64, like).dtype == torch.float64


def test_the_two_ways_of_a_call(path, device):
    """What the fixture `path` says of a call is so, forward and backward."""
    logits, (targets, advantages, token_weight, *_) = loss_arguments(device)
    logits = logits[:, : V - 2].contiguous().requires_grad_()
    with torch.profiler.profile() as profiler:
        total = policy_loss(logits.mul(1.0), targets, advantages, token_weight).loss
        stats = token_stats(logits, targets, compute=Compute(full_stats=True))
        total = total + stats.entropy.sum()
        compute = Compute(inplace=True)
        out = policy_loss(logits.mul(1.0), targets, advantages, token_weight, compute=compute)
        (2.0 * (total + out.loss)).backward()
    seen = {event.name for event in profiler.events() if event.name.startswith("papo::")}
    fused = {f"papo::{x}" for x in OPERATIONS if x != "token_loss"}
    assert seen == (fused if path == "dispatcher" else set())


def test_errors_inside_compiled_code(backend, device):
    """A wrong shape is reported while tracing, with the argument's name."""
    torch._dynamo.reset()
    compiled = torch.compile(token_stats, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"targets: expected shape"):
        compiled(
            torch.zeros(3, 5, device=device),
            torch.zeros(4, dtype=torch.int64, device=device),
            compute=Compute(backend),
        )
