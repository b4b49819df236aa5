"""Start the ranks of a test as real processes and collect what they print."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(rank: int, world: int, port: int, **extra: str) -> dict[str, str]:
    """The launcher's variables for one rank; one thread each, so that float32 sums do not depend on
    the machine.
    """
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        **extra,
    }


def start(world: int, command: list[str], **extra: str) -> list[subprocess.Popen[str]]:
    """One process per rank running `python command...`."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, world, port, **extra),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finish(ranks: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank; a rank that hangs fails the test with what all of
    them printed.
    """
    results = []
    try:
        for process in ranks:
            out, err = process.communicate(timeout=timeout)
            results.append((process.returncode, out, err))
    finally:
        for process in ranks:
            process.kill()
    return results


def run_tasks(
    world: int,
    tasks: dict[str, tuple[str, dict[str, Any]]],
    module: str = "tests.distributed.tasks",
) -> dict[str, list[Any]]:
    """Run tasks of `module` one after the other on `world` ranks; each one's result per rank."""
    nursery = _nursery()
    assert nursery.stdin is not None and nursery.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        print(
            json.dumps([world, module, json.dumps(tasks), folder]), file=nursery.stdin, flush=True
        )
        codes = json.loads(nursery.stdout.readline())
        printed = [
            [Path(folder, f"rank{rank}.{name}").read_text() for name in ("out", "err")]
            for rank in range(world)
        ]
    for code, (out, err) in zip(codes, printed, strict=True):
        assert code == 0, f"exit code {code}\n{out}\n{err}"
    ranks = [json.loads(out.strip().splitlines()[-1]) for out, _ in printed]
    return {key: [rank[key] for rank in ranks] for key in tasks}


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    """One for all tests of this process; it ends when its input does."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.nursery"],
        env=environment(0, 1, 0),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
