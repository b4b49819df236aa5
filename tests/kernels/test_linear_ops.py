"""The linear operations under torch's machinery: opcheck, torch.compile forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from papo_kernels import PolarityWeighting, PolicyLossParams
from papo_kernels.head.keep import KeepSet
from papo_kernels.linear import LoRAHead, linear_policy_loss, linear_token_stats
from tests.kernels.linear_cases import make_head_case

N, D, V = 7, 5, 23


def head_arguments(device, dtype=torch.float32, full=True):
    """What all linear operations take first: hidden to keep_ids."""
    g = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,), (2, D), (V, 2)) if full else ((N, D), (V, D))
    tensors = [torch.randn(*s, generator=g).to(device, dtype).requires_grad_() for s in shapes]
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
            yield *head, targets, 0.9, 20.0, *tail
        elif name == "linear_token_stats_bwd":
            detached = [None if x is None else x.detach() for x in head]
            row = (targets, 0.9, 0.0, *tail)
            state = torch.ops.papo.linear_token_stats(*detached, *row)[-1]
            g = torch.ones(2 * N, device=device)[::2]
            yield *detached, *row, state, g, None, -g, needs
            yield *detached, *row, state, None, g, None, [True, False, False, False, False]
        else:
            case = make_head_case(N, D, V, device=device, loss=True).tokens
            scalars = [torch.tensor(x, device=device) for x in (0.5, 1.0, 1.1)]
            tokens = (case.advantages, case.token_weight, case.old_logp, case.ref_logp)
            options = [0.9, 0.0, 0.2, 0.28, 3.0, 0.04, 0.01, 0.5, 1e-6]
            call = (targets, *tokens, *scalars, "sign", options, V - 2, backend)
            yield *head, *call, 0.5, acc, 700, needs
            detached = [None if x is None else x.detach() for x in head]
            yield *detached, *call, 0.5, acc, 700, [False] * 5


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


def step(hidden, weight, a, b, targets, advantages, token_weight, keep):
    lora = LoRAHead(a, b, 0.5)
    options = {"softcap": 30.0, "temperature": 0.9, "lora": lora, "chunk_bytes": 2000}
    out = linear_policy_loss(
        hidden,
        weight,
        targets,
        advantages,
        token_weight,
        params=PolicyLossParams(entropy_coef=0.01),
        weighting=PolarityWeighting(0.5, 0.3),
        keep=KeepSet(*keep),
        **options,
    )
    stats = linear_token_stats(hidden, weight, targets, **options)
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
