"""Start the ranks of a test as real processes and collect what they print."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
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
    """Run tasks of `module` one after the other on `world` ranks; each one's result per rank.

    Starting Python, torch and DeepSpeed takes far longer than a task, so a test file starts its
    ranks once.
    """
    results = finish(start(world, ["-m", module, json.dumps(tasks)]))
    for code, out, err in results:
        assert code == 0, f"exit code {code}\n{out}\n{err}"
    ranks = [json.loads(out.strip().splitlines()[-1]) for _, out, _ in results]
    return {key: [rank[key] for rank in ranks] for key in tasks}
