"""The cases of `bench_cpu.py` under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

One thread, process CPU time, cold caches, as there; pytest-benchmark runs a case's rounds in a row
where `bench_cpu.py` interleaves the cases.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.bench_cpu import make_cases
from benchmarks.harness import CacheFlusher, Case
from benchmarks.shapes import CPU_SHAPES, Shape

NAMES = [case.name for case in make_cases(Shape(1, 8, torch.float32))]
ROUNDS = 5


@pytest.fixture(scope="module", params=CPU_SHAPES, ids=lambda shape: shape.name)
def cases(request: pytest.FixtureRequest) -> Iterator[dict[str, Case]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {case.name: case for case in make_cases(request.param)}
    torch.compiler.reset()
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", NAMES)
def test_case(benchmark: Any, cases: dict[str, Case], name: str) -> None:
    case, flush = cases[name], CacheFlusher()

    def cold() -> None:
        if case.prepare is not None:
            case.prepare()
        flush()

    benchmark.pedantic(case.run, setup=cold, rounds=ROUNDS, warmup_rounds=1)
