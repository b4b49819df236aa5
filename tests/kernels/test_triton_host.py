"""The host's side of a Triton call, up to the launch: a stand-in for Triton's driver takes that.

Kernels are compiled, for an H100, and never run.
"""

from __future__ import annotations

import importlib
import pkgutil
from math import inf
from types import SimpleNamespace

import pytest
import torch

from papo_kernels import Objective
from papo_kernels.types import RowParams, TokenInputs, WeightingInputs

pytestmark = pytest.mark.needs("no interpreter")

N, V = 8, 2048
ROW = RowParams(0.9, 0.0, V)


@pytest.fixture
def host(monkeypatch):
    """What is launched, as (function, grid, flat arguments), and how often Triton's own way
    of starting a kernel is taken."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from benchmarks.bench_triton_host import Driver
    from papo_kernels.backends.triton import launch

    seen = SimpleNamespace(launches=[], slow=0)

    class Recording(Driver):
        def get_current_device(self):
            return id(seen)  # kernels are cached by device

        def launcher_cls(self, source, metadata):
            def start(*arguments):
                x, y, z, _, _, _, _, _, _, *rest = arguments
                seen.launches.append((metadata.name, (x, y, z), flat(rest)))

            return start

    original = JITFunction.run

    def run(self, *args, **kwargs):
        seen.slow += not kwargs["warmup"]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(driver, "_active", Recording())
    monkeypatch.setattr(JITFunction, "run", run)
    launch.clear_config()
    yield seen
    launch.clear_config()


def flat(values):
    """As the launcher flattens them: no constants, and of a tensor the address."""
    out = []
    for value in values:
        if isinstance(value, tuple | list):
            out += flat(value)
        elif isinstance(value, torch.Tensor):
            out.append(value.dtype)
        elif type(value).__name__ != "constexpr":
            out.append(value)
    return out


def stats(logits, row=ROW, n=N):
    from papo_kernels.backends.triton import TRITON

    return TRITON.token_stats_fwd(logits, torch.zeros(n, dtype=torch.int64), row)


def loss(logits, objective=None, row=ROW, n=N, weighting=None):
    from papo_kernels.backends.triton import TRITON

    tokens = TokenInputs(*(torch.zeros(n) for _ in range(4)))
    targets = torch.zeros(n, dtype=torch.int64)
    objective = objective or Objective()
    return TRITON.policy_loss_fwd(logits, targets, tokens, objective, weighting, row, logits)


def backward(logits, row=ROW, n=N):
    from papo_kernels.backends.triton import TRITON

    state, g = torch.zeros(n, 6, dtype=torch.float64), torch.zeros(n)
    targets = torch.zeros(n, dtype=torch.int64)
    return TRITON.token_stats_bwd(logits, targets, state, (g, None, g, None), row)


def scale(logits):
    from papo_kernels.backends.triton import TRITON

    return TRITON.scale_(logits, torch.ones(()))


def bf16(n=N, v=V):
    return torch.zeros(n, v, dtype=torch.bfloat16)


@pytest.mark.parametrize("call", [stats, loss, backward, scale])
def test_a_later_call_starts_the_compiled_kernel_with_the_same_arguments(call, host):
    call(bf16())
    assert host.slow == 1
    call(bf16())
    assert host.slow == 1
    first, second = host.launches
    assert repr(first) == repr(second)  # a NaN among the numbers is not equal to itself
    assert len(first[2]) > 4


@pytest.mark.parametrize("call", [stats, loss])
def test_split_rows_take_two_launches_of_compiled_kernels(call, host):
    """One multiprocessor: fewer than four rows are split."""
    v, n = 40_000, 3
    for _ in range(2):
        call(bf16(n, v), row=RowParams(0.9, 0.0, v), n=n)
    names, grids, _ = zip(*host.launches, strict=True)
    assert host.slow == 2
    assert names[:2] == names[2:]
    assert names[0] == "segments_kernel"
    assert grids[0] == grids[2] == (n, 2, 1)
    assert grids[1] == grids[3] == (n, 2 if call is loss else 1, 1)


def test_another_variant_is_another_kernel(host):
    """Types, alignment, a soft cap, what a loss is; and for each the launch knows its own."""
    aligned = bf16()
    calls = {
        "bfloat16": lambda: stats(aligned),
        "float32": lambda: stats(aligned.float()),
        "not aligned": lambda: stats(bf16(N, V + 1)[:, :V]),
        "soft cap": lambda: stats(aligned, RowParams(0.9, 30.0, V)),
        "gradient": lambda: loss(aligned),
        "surrogate": lambda: loss(aligned, Objective(surrogate="cispo")),
        "temperatures": lambda: stats(aligned, ROW._replace(temperatures=torch.ones(N))),
    }
    for call in calls.values():
        call()
    assert host.slow == len(calls)
    for call in calls.values():
        call()
    assert host.slow == len(calls)
    n = len(calls)
    for first, second in zip(host.launches[:n], host.launches[n:], strict=True):
        assert repr(first) == repr(second)


def test_the_numbers_of_a_call_reach_the_kernel_that_is_there(host):
    """Not those of the call it was compiled for, and integers are passed as floats."""
    one = torch.ones(())
    weighting = WeightingInputs(0.5, one, "tanh", one, one, 0)
    options = (
        (Objective(clip_low=0, clip_high=1, dual_clip=3, kl_coef=1), None),
        (Objective(clip_low=0.25, clip_high=0.5, entropy_coef=0.125), weighting),
    )
    for objective, weights in options:
        loss(bf16(), objective, weighting=weights)
    assert host.slow == 1
    numbers = [[x for x in call[2] if isinstance(x, float)] for call in host.launches]
    rest = [1.0, 1.05, 0.75, 1.0]  # of sapo and ce_gppo
    no_limits, dual = [inf] * 4, [3.0, inf, inf, inf]
    assert numbers[0][6:] == [0.0, 1.0] * 2 + dual + rest + [1.0, 0.0, 1.0] + [0.0] * 5
    given = [0.0, 0.125, 1.0, 0.0, 1.0, 1.0, 0.5, 0.0]
    assert numbers[1][6:] == [0.25, 0.5] * 2 + no_limits + rest + given
    for call in host.launches:
        integers = [x for x in call[2] if isinstance(x, int)]
        assert integers == [V, V, V, V]


def test_rows_far_apart_take_the_same_kernel(host):
    """A stride beyond 32 bits changes nothing: strides travel in 64."""
    one_row = torch.zeros(1, V, dtype=torch.bfloat16)
    stats(one_row, n=1)
    stats(one_row.as_strided((1, V), (2**33, 1)), n=1)
    assert host.slow == 1
    assert host.launches[1][2].count(2**33) == 1


def test_no_rows_no_launch(host):
    stats(bf16(0), n=0)
    loss(bf16(0), n=0)
    assert not host.launches
    stats(bf16())
    stats(bf16(0), n=0)
    assert len(host.launches) == 1


def test_outputs_share_no_memory(host):
    """Each may be changed in place and kept alone, as autograd hands them out."""
    for outputs in (stats(bf16()), loss(bf16())):
        pointers = {x.untyped_storage().data_ptr() for x in outputs}
        assert len(pointers) == len(outputs)
        assert not any(x._is_view() for x in outputs)


@pytest.mark.parametrize("change", [{"lanes": 100}, {"vectors": 3}, {"maxnreg": 81}, {"warps": 4}])
def test_a_row_of_the_table_that_cannot_work_is_an_error(host, monkeypatch, change):
    from papo_kernels.backends import tuning

    row = tuning.load()["triton"][0].config
    monkeypatch.setattr(tuning, "config", lambda *key: {**row, **change})
    with pytest.raises(ValueError, match=r"tuning.json.*expected") as error:
        stats(bf16())
    assert next(iter(change)) in str(error.value)
    assert not host.launches


def test_every_device_function_is_hashed_in_one_order():
    """Triton 3.6 gave a kernel another hash, and compiled it again, where other kernels had been
    called before it."""
    from triton.runtime import JITFunction

    from papo_kernels.backends import triton as package
    from papo_kernels.backends.triton import launch

    for module in pkgutil.iter_modules(package.__path__):
        found = vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()
        functions = [f.fn for f in found if isinstance(f, JITFunction)]
        used = {
            f.__module__.rpartition(".")[2] for f in functions if package.__name__ in f.__module__
        }
        # A module without functions of its own may use all.
        end = launch._MODULES.index(module.name) + 1 if module.name in used else None
        assert used <= set(launch._MODULES[:end])
