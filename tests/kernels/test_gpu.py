"""What only a device can show: streams, graphs, host syncs, 64-bit offsets and repeatability.

`make gpu-check` runs them. Its smoke stage, which compute-sanitizer runs too, has small cases of
every kernel without pytest.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from papo_kernels import PolarityWeighting, PolicyLossParams, policy_loss, token_stats
from papo_kernels.backends import tuning
from tests.cases import make_case, make_loss_case
from tests.oracle import check_policy_loss, check_token_stats, plain_token_stats

pytestmark = pytest.mark.gpu
GPU = pytest.mark.parametrize("name", ["cuda", "triton"])

PARAMS = PolicyLossParams(clip_high=0.28, dual_clip=1.5, kl_coef=0.04, entropy_coef=0.01)
WEIGHTING = PolarityWeighting(0.5, 0.7, sigma=0.1, scale=1.1)

# (N, V, regime)
SMALL = (
    (3, 7, "a row shorter than a 16-byte word's worth of lanes"),
    (5, 1023, "odd rows, no row but the first aligned"),
    (2, 32000, "one or two cluster ranks"),
    (2, 151937, "odd and long: every rank of a cluster, ragged at both ends"),
    (150, 4096, "more rows than SMs: a persistent block takes a second row"),
)


def require(name: str) -> None:
    """Skip where this machine cannot run backend `name`."""
    from papo_kernels.backends import extension as _native

    if name == "cuda" and not _native.has_cuda():
        pytest.skip("the extension was built without CUDA")


def loss_of(logits: Tensor, targets: Tensor, backend: str, **more):
    n = targets.numel()
    ones = torch.ones(n, device=logits.device)
    return policy_loss(logits, targets, ones, ones / n, backend=backend, **more)


@pytest.fixture(params=["resident", "streamed", "triton"])
def family(request, monkeypatch):
    """The backend of a family of kernels, which it is made to use."""
    name = "triton" if request.param == "triton" else "cuda"
    require(name)
    if request.param == "resident" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs thread block clusters")
    if name == "cuda":
        monkeypatch.setenv("PAPO_KERNEL", request.param)
    tuning.forced.cache_clear()
    yield name
    monkeypatch.undo()
    tuning.forced.cache_clear()


@pytest.mark.parametrize("n,v", [(n, v) for n, v, _ in SMALL])
def test_small_cases_of_every_kernel(family, n, v):
    name = family
    for dtype in (torch.bfloat16, torch.float32):
        more = {"dtype": dtype, "device": "cuda"}
        check_token_stats(make_case("normal", n, v, **more), name)
        case = make_loss_case("normal", n, v, params=PARAMS, weighting=WEIGHTING, **more)
        check_policy_loss(case, name, factor=-1.5)
        check_policy_loss(case, name, inplace=True)


@GPU
def test_complaint_19_20_more_than_2_to_the_31_elements(name):
    require(name)
    logits = torch.empty(16385, 131072, dtype=torch.bfloat16, device="cuda").normal_(0, 2)
    targets = torch.randint(131072, (16385,), device="cuda")
    last = slice(-3, None)
    rows = logits[last].clone()
    exact = plain_token_stats(rows, targets[last])
    out = token_stats(logits, targets, backend=name)
    torch.testing.assert_close(out.logp[last].double(), exact.logp, rtol=0, atol=2e-6)
    torch.testing.assert_close(out.entropy[last].double(), exact.entropy, rtol=0, atol=2e-6)
    logits = logits.requires_grad_().mul(1.0)
    loss = loss_of(logits, targets, name, inplace=True)
    torch.testing.assert_close(loss.logp, out.logp, rtol=0, atol=0)
    expected = torch.softmax(rows.double(), 1)
    expected[torch.arange(3), targets[last]] -= 1.0
    torch.testing.assert_close(
        logits[last].double(), expected / 16385, rtol=2**-8, atol=1e-12, check_dtype=False
    )


@GPU
def test_complaint_21_more_than_65535_rows(name):
    require(name)
    check_token_stats(make_case("normal", 70001, 40, device="cuda"), name)
    check_policy_loss(make_loss_case("normal", 70001, 40, params=PARAMS, device="cuda"), name)


@GPU
def test_complaint_25_side_stream_and_autograd_thread(name):
    require(name)
    case = make_case("normal", 64, 50000, dtype=torch.bfloat16, device="cuda")
    expected = check_token_stats(case, name)
    results: list[Tensor] = []

    def work() -> None:
        # A busy stream: work on the default stream would overtake it and read what is not there.
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(case.logits)
            torch.cuda._sleep(50_000_000)
            late.copy_(case.logits)
            results.append(check_token_stats(case.__class__(late, case.targets), name))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results) == 1 and torch.equal(results[0], expected)


@GPU
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_complaint_25_the_tensors_device_not_the_current_one(name):
    require(name)
    with torch.cuda.device(0):
        check_token_stats(make_case("normal", 8, 5000, device="cuda:1"), name)
        assert torch.cuda.current_device() == 0


@GPU
def test_complaint_26_no_host_sync_and_graph_capture(name):
    require(name)
    logits = torch.empty(40, 30000, dtype=torch.bfloat16, device="cuda").normal_(0, 2)
    targets = torch.randint(30000, (40,), device="cuda")
    phase = torch.tensor(0.3, device="cuda")
    one = torch.ones((), device="cuda")
    weighting = PolarityWeighting(0.5, phase, sigma=one, scale=one)

    def call() -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        out = loss_of(leaf, targets, name, weighting=weighting)
        stats = token_stats(leaf, targets, backend=name)
        (out.loss + stats.entropy.mean()).backward()
        return out.weight, leaf.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A replay sees the logits and the phase of its own time.
    logits.copy_(torch.empty_like(logits).normal_(0, 3))
    phase.fill_(-0.8)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, call(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs thread block clusters",
)
def test_rows_that_fit_on_chip_run_the_resident_kernel():
    """Nothing else would show that a call fell back on the kernel that reads the logits twice."""
    require("cuda")
    logits = torch.empty(8, 151936, dtype=torch.bfloat16, device="cuda").normal_(0, 2)
    leaf = logits.requires_grad_()
    targets = torch.randint(151936, (8,), device="cuda")
    loss_of(leaf, targets, "cuda")  # not in the profile: loading the extension
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        loss_of(leaf, targets, "cuda")
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profiler.events() if event.device_type == on_device]
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any("resident_kernel" in name for name in names), names


@GPU
@pytest.mark.parametrize("n", [1, 64, 131, 300])
def test_the_same_bits_every_time(name, n):
    require(name)
    case = make_loss_case(
        "normal", n, 151937, params=PARAMS, dtype=torch.bfloat16, device="cuda", weighting=WEIGHTING
    )
    first = [case.policy_loss(case.logits, name), case.token_stats(case.logits, name)]
    for _ in range(3):
        again = [case.policy_loss(case.logits, name), case.token_stats(case.logits, name)]
        for a, b in zip(first, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    live = (case.token_weight != 0) & (case.targets != -100)
    assert torch.equal(first[0].logp[live], first[1].logp[live])
