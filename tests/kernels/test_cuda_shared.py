"""Tests that all backends share, on the CUDA kernels of the emulated machine: the same functions,
called once more. (What no single device shows, orders and layouts, is in test_cuda_emulated.py.)"""

from __future__ import annotations

import inspect
import itertools
import shutil

import pytest
import torch

from tests.kernels import (
    test_complaints,
    test_extremes,
    test_policy_loss,
    test_protocol,
    test_regimes,
)
from tests.kernels.cuda_emulator import DEVICES, emulated

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEFT_OUT = {
    "test_complaint_21_more_rows_than_a_grid_dimension_holds": "14 s; the grid is one-dimensional",
}


def shared_tests(module):
    """Every case of the tests in `module` that take a backend, as (function, its parameters)."""
    for name, function in vars(module).items():
        wanted = inspect.signature(function).parameters if name.startswith("test_") else ()
        if name in LEFT_OUT or not {"backend", "call"} & set(wanted):
            continue
        axes = []
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize":
                names = mark.args[0]
                names = names.split(",") if isinstance(names, str) else names
                axes.append([(names, v if len(names) > 1 else (v,)) for v in mark.args[1]])
        for choice in itertools.product(*axes):
            given = {
                n.strip(): v for names, values in choice for n, v in zip(names, values, strict=True)
            }
            shown = "-".join(str(v) for v in given.values())
            yield pytest.param(function, given, id=f"{name[5:]}[{shown}]"[:120])


MODULES = (test_complaints, test_extremes, test_policy_loss, test_protocol, test_regimes)


# Everything on the device that matters most, what users ran into on the others too.
CASES = [
    pytest.param(device, *test.values, id=f"{test.id}-{device}")
    for device in ("h100", "in_turn", "no_clusters")
    for module in (MODULES if device == "h100" else (test_complaints,))
    for test in shared_tests(module)
]


@pytest.mark.parametrize("device_limits,function,given", CASES)
def test_shared(device_limits, function, given, request):
    def full(size, interpreted):
        return size

    fixtures = {"backend": "cuda", "device": "cpu", "sizes": full, "dtypes": DTYPES}
    wanted = inspect.signature(function).parameters
    with emulated(**DEVICES[device_limits]):
        if "call" in wanted:
            fixtures["call"] = test_protocol.Call("cuda", "cpu", 12)
        for name in wanted:
            if name not in given and name not in fixtures:
                fixtures[name] = request.getfixturevalue(name)
        function(**{name: {**fixtures, **given}[name] for name in wanted})
