"""What a head's logits cost: matrix products, memory, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory_model
from papo_kernels import Compute, Head, KeepSet, LoRA, Objective, policy_loss, token_stats
from papo_kernels.head.plan import Workspace, active_rows, make_plan
from tests.kernels.tracking import flops, memory, products

MiB = 2**20


def inputs(n, d, v, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=g) * d**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    return hidden, weight, targets


def per_token(n):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, generator=g), torch.full((n,), 1.0 / n)


# ---- products -----------------------------------------------------------------------------------

N, D, V = 48, 32, 200
PRODUCT = 2 * N * D * V


@pytest.mark.parametrize(
    ("frozen", "expected"), [("", 3), ("hidden", 2), ("weight", 2), ("hidden weight", 1)]
)
@pytest.mark.parametrize("chunk_bytes", [None, 10_000])
def test_a_loss_costs_three_products_and_a_frozen_input_costs_none(frozen, expected, chunk_bytes):
    """Logits, dhidden and dweight, each once, whatever the chunks; none of them in backward."""
    hidden, weight, targets = inputs(N, D, V)
    hidden.requires_grad_("hidden" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    losses = []

    def forward():
        compute = Compute(chunk_bytes=chunk_bytes)
        out = policy_loss(Head(weight)(hidden), targets, *per_token(N), compute=compute)
        losses.append(out.loss)

    assert flops(forward) == expected * PRODUCT
    if expected > 1:
        assert products(losses[0].backward) == []
    assert (hidden.grad is None) == ("hidden" in frozen or expected == 1)
    assert (weight.grad is None) == ("weight" in frozen or expected == 1)


def test_one_chunk_is_three_calls():
    hidden, weight, targets = inputs(N, D, V)
    run = products(lambda: policy_loss(Head(weight)(hidden), targets, *per_token(N)))
    assert run == [(N, D, V), (N, V, D), (V, N, D)]


def test_statistics_cost_one_product_and_backward_three():
    """Backward computes the logits again; a frozen weight saves its own product there too."""
    hidden, weight, targets = inputs(N, D, V)
    logits, out = Head(weight)(hidden), []
    assert flops(lambda: out.append(token_stats(logits, targets))) == PRODUCT
    assert flops(lambda: out[0].logp.sum().backward()) == 3 * PRODUCT
    weight.requires_grad_(False)
    out = [token_stats(logits, targets)]
    assert flops(lambda: out[0].entropy.sum().backward()) == 2 * PRODUCT


def test_no_grad_does_no_gradient_work():
    hidden, weight, targets = inputs(N, D, V)
    logits = Head(weight)(hidden)
    with torch.no_grad():
        assert flops(lambda: token_stats(logits, targets)) == PRODUCT
        assert flops(lambda: policy_loss(logits, targets, *per_token(N))) == PRODUCT


def test_ignored_tokens_are_not_multiplied():
    """Prompt tokens that a mask leaves in the batch cost nothing on a CPU."""
    hidden, weight, targets = inputs(N, D, V)
    targets[::2] = -100
    advantages, token_weight = per_token(N)
    token_weight[1::4] = 0.0
    logits = Head(weight)(hidden)
    assert flops(lambda: token_stats(logits, targets)) == PRODUCT // 2

    def loss():
        return policy_loss(logits, targets, advantages, token_weight)

    assert flops(loss) == 3 * PRODUCT // 4
    targets[:] = -100
    assert products(loss) == []
    out = loss()
    out.loss.backward()
    assert out.loss.item() == 0.0 and not out.logp.any()
    assert not hidden.grad.any() and not weight.grad.any()


def test_padding_rows_of_the_weight_are_not_multiplied():
    hidden, weight, targets = inputs(N, D, V)
    targets = targets.clamp(max=149)
    logits = Head(weight, vocab_size=150)(hidden)
    assert flops(lambda: token_stats(logits, targets)) == 2 * N * D * 150


def test_a_lora_head_never_multiplies_its_factors():
    """Every product has the tokens or the rank as its inner or outer extent, none is B A."""
    hidden, weight, targets = inputs(N, D, V)
    rank = 3
    a, b = torch.randn(rank, D).requires_grad_(), torch.randn(V, rank).requires_grad_()
    weight.requires_grad_(False)
    logits = Head(weight, lora=LoRA(a, b, 0.5))(hidden)
    run = products(lambda: policy_loss(logits, targets, *per_token(N)))
    assert (V, rank, D) not in run
    big = [shape for shape in run if rank not in shape]
    assert big == [(N, D, V), (N, V, D)]
    thin = sum(2 * m * k * n for m, k, n in run if rank in (m, k, n))
    assert thin <= 2 * rank * N * (3 * V + 4 * D)


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16, torch.float64])
def test_plans_stay_within_their_budget(operand):
    """All rows, no more than the budget (and, where one slab saves it, half of the weight's sum),
    never less than a row; whole slabs of several chunks."""
    logits = torch.float64 if operand == torch.float64 else torch.float32
    seen = set()
    for rows in (0, 1, 100, 2048, 8191):
        for columns, d in ((1, 1), (1000, 64), (151_936, 1024), (262_144, 5376)):
            for budget in (1, 5 * MiB, 256 * MiB, 2560 * MiB):
                sum_bytes = 2 * columns * d if operand == torch.bfloat16 else 0
                dtypes = (operand, logits)
                plan = make_plan(rows, columns, d, dtypes, True, budget, sum_bytes)
                assert plan.pitch >= columns and plan.narrow == (operand == torch.bfloat16)
                assert plan.slabs == -(-rows // max(1, plan.slab_rows))
                assert plan.slabs <= 1 or not sum_bytes or plan.slab_rows < rows
                assert min(rows, 1) <= plan.chunk_rows <= plan.slab_rows <= rows
                # A product of 129 rows takes a GPU as long as one of 256.
                for size, whole in ((plan.slab_rows, rows), (plan.chunk_rows, plan.slab_rows)):
                    assert size == whole or size < 128 or size % 128 == 0
                held = plan.chunk_rows * plan.pitch * logits.itemsize
                if plan.narrow:
                    held += plan.slab_rows * plan.pitch * operand.itemsize
                row = plan.pitch * (logits.itemsize + operand.itemsize)
                allowed = budget + (sum_bytes if plan.slabs <= 1 else 0)
                assert held <= max(allowed, row), (rows, columns, d, budget, plan)
                seen.add((plan.slabs > 1, plan.chunk_rows < plan.slab_rows))
    assert seen >= ({(True, True), (False, True)} if operand == torch.bfloat16 else {(True, False)})


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1000])
def test_the_padding_of_the_workspace_holds_zeros(columns):
    """Or a product on AMX tiles, which reads it, is NaN where the memory was."""
    active = active_rows(torch.zeros(40, dtype=torch.bool))
    dtypes = (torch.bfloat16, torch.float32)
    plan = make_plan(40, columns, 8, dtypes, True, 2**20)
    hidden = torch.zeros(40, 8, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)  # memory without values is filled with NaN
    try:
        workspace = Workspace(hidden, active, plan, torch.float32, True)
    finally:
        torch.use_deterministic_algorithms(False)
    for buffer in (workspace._logits, workspace._narrow):
        assert buffer[:, columns:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("workspace", [1, 16])
def test_the_byte_model_of_the_documentation(dtype, frozen, workspace):
    """`benchmarks.memory_model` against the allocations of a call."""
    n, d, v = 512, 64, 20_000
    hidden, weight, targets = inputs(n, d, v, dtype)
    weight.requires_grad_(not frozen)
    model = memory_model.Model("test", v, d)
    expected = memory_model.head_bytes(n, model, dtype, workspace * MiB, frozen)
    expected += hidden.nbytes + (0 if frozen else weight.nbytes)

    def run():
        compute = Compute(chunk_bytes=workspace * MiB)
        out = policy_loss(Head(weight)(hidden), targets, *per_token(n), compute=compute)
        out.loss.backward()
        return out

    # Per-token vectors; and in bfloat16, whose products are widened on a CPU, tiles of 8 MiB.
    slack = 0.3 * MiB if dtype == torch.float32 else 20 * MiB
    assert expected <= memory(run).peak + 0.3 * MiB <= expected + slack + 0.3 * MiB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [True, False])
def test_memory_is_the_workspace(loss, dtype):
    """Logits of 256 MiB (float32) through 8 MiB. No one-hot (NeMo-RL 4114) and no [V, D] temporary
    per chunk (Liger #1323): beyond the workspace, the results and, for a half weight, the lower
    halves of its gradient's float32 sum, only a few MiB of tiles and per-token vectors."""
    n, d, v = 2048, 24, 32_768
    hidden, weight, targets = inputs(n, d, v, dtype)
    tokens = per_token(n)
    workspace = 8 * MiB
    logits, compute = Head(weight)(hidden), Compute(chunk_bytes=workspace)

    def run():
        if loss:
            objective = Objective(entropy_coef=0.01)
            out = policy_loss(logits, targets, *tokens, objective=objective, compute=compute)
            out.loss.backward()
        else:
            out = token_stats(logits, targets, compute=compute)
            (out.logp + out.entropy + out.unit_polarity).sum().backward()
        return out

    used = memory(run)
    results = hidden.nbytes + weight.nbytes + n * 10 * 4 + n * 6 * 8
    sums = weight.nbytes if dtype == torch.bfloat16 else 0
    assert used.peak > 0.9 * workspace + weight.nbytes, "the tracker saw no workspace"
    # Widening tiles are 8 MiB; nothing is widened in float32.
    slack = 20 * MiB if dtype == torch.bfloat16 else MiB
    assert used.peak <= workspace + results + sums + slack
    assert hidden.grad is not None and weight.grad is not None
    # Nothing but results stays, with the outputs and their graph alive.
    assert used.after <= results + MiB


def test_statistics_without_gradient_take_the_workspace_only():
    hidden, weight, targets = inputs(4096, 16, 32_768)
    logits, compute = Head(weight)(hidden), Compute(chunk_bytes=4 * MiB)
    with torch.no_grad():
        used = memory(lambda: token_stats(logits, targets, compute=compute))
    assert used.peak <= 4 * MiB + MiB // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_has_no_buffer(dtype):
    """Nor one slab of 20 MiB in place of the sum that it has no need of."""
    hidden, weight, targets = inputs(512, 512, 20_000, dtype)
    weight.requires_grad_(False)

    def run():
        compute = Compute(chunk_bytes=4 * MiB)
        out = policy_loss(Head(weight)(hidden), targets, *per_token(512), compute=compute)
        out.loss.backward()
        return out

    tiles = 10 * MiB if dtype == torch.bfloat16 else 0
    assert memory(run).peak <= 5 * MiB + hidden.nbytes + tiles < 20_000 * 512 * 2


def test_kept_ids_are_masked_in_bounded_memory():
    """16 M kept ids (every id of every token) in groups."""
    n, v = 512, 32_768
    hidden, weight, targets = inputs(n, 8, v)
    keep = KeepSet(torch.arange(n + 1) * v, torch.arange(v).repeat(n))
    head, compute = Head(weight), Compute(chunk_bytes=8 * MiB)
    with torch.no_grad():
        used = memory(lambda: token_stats(head(hidden, keep=keep), targets, compute=compute))
    assert used.peak <= 8 * MiB + 64 * MiB
    plain = token_stats(head(hidden), targets)
    kept = token_stats(head(hidden, keep=keep), targets)
    torch.testing.assert_close(kept.logp, plain.logp)


def test_the_gradient_is_handed_to_the_leaf_without_a_copy():
    hidden, weight, targets = inputs(64, 64, 16_384)
    out = policy_loss(Head(weight)(hidden), targets, *per_token(64))
    used = memory(out.loss.backward)
    assert used.peak <= 64 * 1024


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_last_rows_at_four_billion_logits(dtype):
    """N V = 4.0e9 > 2^31: 15 GiB of float32 logits through the default workspace."""
    n, d, v = 26_328, 64, 151_936
    hidden, weight, targets = inputs(n, d, v, dtype)
    advantages, token_weight = per_token(n)
    losses = []

    def run():
        out = policy_loss(Head(weight)(hidden), targets, advantages, token_weight)
        out.loss.backward()
        losses.append(out)

    used = memory(run)
    results = hidden.nbytes + weight.nbytes + n * 10 * 4
    assert used.peak <= 256 * MiB + 64 * MiB + results
    last = slice(n - 4, n)
    z = hidden.detach()[last].double() @ weight.detach().double().t()
    logp = torch.log_softmax(z, 1).gather(1, targets[last, None])[:, 0]
    torch.testing.assert_close(losses[0].logp[last].double(), logp, rtol=1e-5, atol=1e-5)


# ---- what is kept for backward ------------------------------------------------------------------


def saved_by(run):
    sizes = []

    def pack(x):
        sizes.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sizes


def test_what_a_fused_head_saves_for_backward():
    """The loss keeps its gradients and no input; the statistics their inputs and six numbers per
    token; neither anything of N V elements (speculators #1000)."""
    hidden, weight, targets = inputs(N, D, V)
    of_loss = saved_by(lambda: policy_loss(Head(weight)(hidden), targets, *per_token(N)))
    assert sorted(of_loss) == sorted([(N, D), (V, D)])
    of_stats = saved_by(lambda: token_stats(Head(weight)(hidden), targets))
    assert sorted(of_stats) == sorted([(N, D), (V, D), (N,), (N, 6)])


def test_backward_frees_what_was_saved_and_refuses_a_second_time():
    hidden, weight, targets = inputs(N, D, V)
    out = policy_loss(Head(weight)(hidden), targets, *per_token(N))
    out.loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()
    weight.grad = None
    stats = token_stats(Head(weight)(hidden), targets)
    stats.logp.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad = None
    stats.logp.sum().backward()
    assert torch.equal(weight.grad, first)


def test_a_kept_graph_gives_the_same_gradient_twice():
    """Scaling happens on a copy where the graph is kept, in place otherwise; 1 costs nothing."""
    hidden, weight, targets = inputs(N, D, V)
    out = policy_loss(Head(weight)(hidden), targets, *per_token(N))
    grads = [
        torch.autograd.grad(factor * out.loss, (hidden, weight), retain_graph=factor != 1.0)
        for factor in (3.0, -0.5, 1.0)
    ]
    for a, b, factor in zip(grads[0], grads[2], (3.0, 3.0), strict=True):
        torch.testing.assert_close(a, factor * b)
    torch.testing.assert_close(grads[1][1], -0.5 * grads[2][1])
