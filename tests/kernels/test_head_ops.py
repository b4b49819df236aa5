"""The operations of a head under torch's machinery: opcheck, torch.compile forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.optests import aot_autograd_check

from papo_kernels import (
    Compute,
    Head,
    KeepSet,
    LoRA,
    Objective,
    PolarityWeighting,
    policy_loss,
    token_stats,
)
from tests.kernels.head_cases import make_head_case

pytestmark = pytest.mark.plumbing
N, D, V = 7, 5, 23
ROW = torch.tensor([0.9, 20.0], dtype=torch.float64)  # temperature, soft cap
# Temperature, soft cap, strength and dead zone come before the objective's.
NUMBERS = (0.9, 0.0, 0.5, 1e-6, *Objective(0.2, 0.28, 3.0, 0.04, 0.01).numbers())
NUMBERS = torch.tensor(NUMBERS, dtype=torch.float64)


def head_arguments(device, dtype=torch.float32, full=True):
    """What all operations of a head take first: hidden to keep_ids. None requires grad: autograd is
    that of the public functions."""
    g = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,), (2, D), (V, 2)) if full else ((N, D), (V, D))
    tensors = [torch.randn(*s, generator=g).to(device, dtype) for s in shapes]
    tensors += [None] * (5 - len(tensors))
    if not full:
        return (*tensors, None, None)
    ids = torch.arange(V - 2, device=device).repeat(N)
    return (*tensors, torch.arange(N + 1, device=device) * (V - 2), ids)


def samples(name, backend, device):
    targets = torch.arange(N, device=device)
    targets[3] = -100
    for dtype, full in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        head = head_arguments(device, dtype, full)
        needs = [x is not None for x in head[:5]]
        acc = torch.float32
        tail = (V - 2, backend, 0.5, torch.float32, 700)
        if name == "linear_token_stats":
            yield *head, targets, ROW, None, *tail, False
            yield *head, targets[:, None].expand(N, 3).contiguous(), ROW, None, *tail, True
        elif name == "linear_token_stats_bwd":
            row = (targets, ROW, None, *tail)
            state = torch.ops.papo.linear_token_stats(*head, *row, False)[4]
            g = torch.ones(2 * N, device=device)[::2]
            yield *head, *row, state, g, None, -g, g, needs
            yield *head, *row, state, None, g, None, None, [True, False, False, False, False]
        else:
            case = make_head_case(N, D, V, device=device, loss=True).tokens
            scalars = [torch.tensor(x, device=device) for x in (0.5, 1.0, 1.1)]
            tokens = (case.advantages, case.token_weight, case.old_logp, case.ref_logp)
            tokens = (*tokens, None, None, None)
            terms = ("sign", "clip", "k3", False, NUMBERS, None, V - 2, backend)
            call = (targets, *tokens, *scalars, *terms)
            yield *head, *call, 0.5, acc, 700, needs
            yield *head, *call, 0.5, acc, 700, [False] * 5


OPERATIONS = ("linear_token_stats", "linear_token_stats_bwd", "linear_policy_loss")


def test_no_operation_is_left_out():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("papo::")}
    assert {name for name in names if "linear" in name} == {f"papo::{x}" for x in OPERATIONS}


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name, backend, device):
    checked = 0
    for arguments in samples(name, backend, device):
        torch.library.opcheck(getattr(torch.ops.papo, name).default, arguments)
        checked += 1
    assert checked >= 3


def lazy(hidden, weight, bias, a, b, *keep):
    """The logits of what `head_arguments` gives."""
    lora = None if a is None else LoRA(a, b, 0.5)
    head = Head(weight, bias=bias, lora=lora, softcap=20.0, vocab_size=V - 2)
    return head(hidden, keep=None if keep[0] is None else KeepSet(*keep))


def statistics_of(backend, targets, *head):
    compute = Compute(backend, chunk_bytes=700)
    return token_stats(lazy(*head), targets, temperature=0.9, compute=compute)


def loss_of(backend, targets, advantages, token_weight, old_logp, *head):
    return policy_loss(
        lazy(*head),
        targets,
        advantages,
        token_weight,
        old_logp=old_logp,
        objective=Objective(0.2, 0.28, 3.0, entropy_coef=0.01),
        temperature=0.9,
        compute=Compute(backend, chunk_bytes=700),
    )


@pytest.mark.parametrize("kind", ["full", "bare", "half precision"])
def test_traced_gradients(kind, backend, device):
    """The part of opcheck that an operation without autograd escapes, for the two functions."""
    dtype = torch.bfloat16 if kind == "half precision" else torch.float32
    tensors = head_arguments(device, dtype, kind != "bare")
    head = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors]
    targets = torch.arange(N, device=device)
    targets[3] = -100
    aot_autograd_check(statistics_of, (backend, targets, *head), {}, dynamic=True)
    case = make_head_case(N, D, V, device=device, loss=True).tokens
    tokens = (case.advantages, case.token_weight, case.old_logp)
    aot_autograd_check(loss_of, (backend, targets, *tokens, *head), {}, dynamic=True)


def step(hidden, weight, a, b, targets, advantages, token_weight, keep):
    head = Head(weight, lora=LoRA(a, b, 0.5), softcap=30.0)
    options = {"temperature": 0.9, "compute": Compute(chunk_bytes=2000)}
    out = policy_loss(
        head(hidden, keep=KeepSet(*keep)),
        targets,
        advantages,
        token_weight,
        objective=Objective(entropy_coef=0.01),
        weighting=PolarityWeighting(0.5, 0.3),
        **options,
    )
    stats = token_stats(head(hidden), targets, **options)
    return 2.0 * out.loss + (stats.entropy * token_weight).sum(), out.ratio, stats.unit_polarity


def test_compile_in_one_graph_for_every_number_of_tokens():
    """Forward and backward, equal to eager; another number of tokens compiles nothing again."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for n in (8, 13, 21):
        g = torch.Generator().manual_seed(n)
        shapes = ((n, D), (V, D), (2, D), (V, 2))
        values = [torch.randn(*s, generator=g) for s in shapes]
        targets = torch.randint(V, (n,), generator=g)
        tokens = (targets, torch.randn(n, generator=g), torch.rand(n, generator=g))
        keep = (torch.arange(n + 1) * V, torch.arange(V).repeat(n))
        results = []
        for run in (step, compiled):
            leaves = [x.clone().requires_grad_() for x in values]
            loss, *rest = run(*leaves, *tokens, keep)
            loss.backward()
            results.append([loss.detach(), *rest, *(x.grad for x in leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1]


def test_compiled_code_calls_a_head_that_was_made_before():
    """It reads the parameters that the head holds, and what a step makes of them."""
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    head, compute = Head(weight, softcap=30.0, logit_scale=0.5), Compute(chunk_bytes=2000)

    def total(hidden, targets):
        return token_stats(head(hidden), targets, temperature=0.9, compute=compute).logp.sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for n in (8, 13):
        hidden = torch.randn(n, D, generator=torch.Generator().manual_seed(n))
        results = [run(hidden, torch.arange(n)) for run in (total, compiled)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(x, weight) for x in results))
        weight.data *= 0.5
        graphs.append(counter.frame_count)
    assert graphs == [1, 1]
