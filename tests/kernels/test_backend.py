"""Which backend serves a call: the argument, else PAPO_BACKEND, else the fastest that can."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from papo_kernels import Compute, policy_loss, token_stats
from papo_kernels.backends import choice, choose, extension, named
from tests.cases import make_case

LOGITS, TARGETS = torch.zeros(2, 5), torch.tensor([0, 1])


@pytest.fixture
def fresh(monkeypatch):
    """No earlier choice, no environment: what is logged once is logged again."""
    monkeypatch.delenv("PAPO_BACKEND", raising=False)
    choice._choose.cache_clear()
    yield monkeypatch
    choice._choose.cache_clear()


@pytest.fixture
def served(fresh):
    """The names of the backends that the calls of a test reached."""
    names = []

    def recorded(backend, function):
        original = getattr(backend, function)

        def call(*args):
            names.append(backend.name)
            return original(*args)

        return call

    for backend in (named("cpu"), named("reference")):
        for function in ("token_stats_fwd", "token_stats_bwd", "policy_loss_fwd", "scale_"):
            fresh.setattr(backend, function, recorded(backend, function))
    return names


def run(code, **environment):
    """A fresh interpreter; its stdout, or its stderr where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PAPO_BACKEND": "", "TRITON_INTERPRET": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def test_the_argument_beats_the_environment_beats_the_preference(served):
    token_stats(LOGITS, TARGETS)
    assert set(served) == {"cpu"}
    served.clear()
    os.environ["PAPO_BACKEND"] = "reference"
    token_stats(LOGITS, TARGETS)
    policy_loss(LOGITS, TARGETS, TARGETS.float(), TARGETS.float())
    assert set(served) == {"reference"}
    served.clear()
    token_stats(LOGITS, TARGETS, compute=Compute("cpu"))
    assert set(served) == {"cpu"}
    served.clear()
    os.environ["PAPO_BACKEND"] = ""
    token_stats(LOGITS, TARGETS)
    assert set(served) == {"cpu"}, "an empty variable is no choice"


def test_backward_uses_the_backend_of_forward(served):
    logits = LOGITS.clone().requires_grad_()
    loss = token_stats(logits, TARGETS, compute=Compute("reference")).entropy.sum()
    values = TARGETS.float()
    loss = loss + policy_loss(logits, TARGETS, values, values, compute=Compute("reference")).loss
    (2.0 * loss).backward()
    assert set(served) == {"reference"}


def test_the_choice_is_logged_once(fresh, caplog):
    caplog.set_level(logging.INFO, logger="papo_kernels")
    for _ in range(3):
        token_stats(LOGITS, TARGETS)
    assert [r.getMessage() for r in caplog.records] == ["cpu for torch.float32 logits on cpu"]
    token_stats(LOGITS, TARGETS, compute=Compute("reference"))
    token_stats(LOGITS, TARGETS, compute=Compute("reference"))
    (message,) = [r.getMessage() for r in caplog.records[1:]]
    assert message == "reference for torch.float32 logits on cpu (asked for by backend)"


def test_the_reference_as_a_fallback_is_a_warning_with_the_reason(fresh, caplog):
    fresh.setattr(extension, "available", lambda: False)
    fresh.setattr(extension, "why_unavailable", lambda: "no compiler was found")
    stats = token_stats(LOGITS, TARGETS)
    assert stats.entropy[0].item() == pytest.approx(1.6094, abs=1e-3)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "reference for torch.float32 logits on cpu (cpu: no compiler was found)"
    )


@pytest.mark.parametrize("source", ["backend", "PAPO_BACKEND"])
def test_what_cannot_serve_raises_with_the_reason(source, fresh):
    def call(name, logits=LOGITS):
        if source == "backend":
            return token_stats(logits, TARGETS, compute=Compute(name))
        fresh.setenv("PAPO_BACKEND", name)
        return token_stats(logits, TARGETS)

    with pytest.raises(ValueError, match=rf"{source}: 'cuda' cannot .*CUDA tensors, not cpu"):
        call("cuda")
    with pytest.raises(ValueError, match=rf"{source}: expected one of .*'numpy'"):
        call("numpy")
    fresh.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=rf"{source}: 'triton' cannot .*TRITON_INTERPRET"):
        call("triton")
    with pytest.raises(ValueError, match=rf"{source}: 'triton' cannot .*float64"):
        call("triton", LOGITS.double())
    fresh.setattr(extension, "available", lambda: False)
    fresh.setattr(extension, "why_unavailable", lambda: "the extension is not built")
    with pytest.raises(ValueError, match=rf"{source}: 'cpu' cannot .*the extension is not built"):
        call("cpu")


def test_every_dtype_has_a_backend_on_a_cpu(fresh):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert choose(None, torch.device("cpu"), dtype) is named("cpu")


def test_float64_is_refused_by_the_gpu_backends(backend, device):
    if torch.float64 in named(backend).capabilities.logits_dtypes:
        assert backend in ("reference", "cpu")
        return
    case = make_case("normal", 2, 9, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=rf"'{backend}' cannot serve .*float64"):
        case.token_stats(case.logits, backend)


def test_a_missing_extension_says_how_to_build_it():
    code = """
import sys
sys.modules["papo_kernels._C"] = None
import torch
from papo_kernels import Compute, token_stats
try:
    token_stats(torch.zeros(1, 4), torch.tensor([1]), compute=Compute("cpu"))
except ValueError as error:
    print(error)
"""
    message = run(code)
    assert "backend: 'cpu' cannot serve this call" in message
    assert "pip install -e ." in message


def test_an_unknown_instruction_set_says_what_there_is():
    code = """
import torch
from papo_kernels import Compute, token_stats
try:
    token_stats(torch.zeros(1, 4), torch.tensor([1]), compute=Compute("cpu"))
except ValueError as error:
    print(error)
"""
    message = run(code, PAPO_CPU_ISA="sse9")
    assert "PAPO_CPU_ISA='sse9': expected one of avx512_bf16, avx512, avx2, portable" in message


def test_importing_loads_no_backend():
    code = """
import sys, papo_kernels
print([m for m in sys.modules if m.startswith("triton") or m in (
    "papo_kernels.backends.native", "papo_kernels.reference")])
"""
    assert run(code) == "[]"


def test_importing_survives_a_broken_extension():
    code = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "papo_kernels._C":
            raise SystemError("bad build")
sys.meta_path.insert(0, Finder())
from papo_kernels.backends import extension
print(extension.why_unavailable())
"""
    assert "papo_kernels._C is not available (bad build)" in run(code)


def test_a_child_forked_before_the_first_call():
    """The parent has run torch's OpenMP team, none of whose threads the child has, and no kernel
    yet: the extension that knows of the fork is loaded with the package."""
    code = """
import multiprocessing, sys, torch
from papo_kernels import token_stats
torch.set_num_threads(2)
logits = torch.zeros(64, 20_000).exp()
child = multiprocessing.get_context("fork").Process(
    target=lambda: token_stats(logits, torch.zeros(64, dtype=torch.int64))
)
child.start()
child.join(20)
print("hangs" if child.is_alive() else child.exitcode)
child.kill()
"""
    assert run(code) == "0"
