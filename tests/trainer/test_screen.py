"""A screen that goes away while a run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reader_that_leaves_ends_no_run(tmp_path: Path, terminal: bool) -> None:
    """Neither at the next line nor at the end, where Python writes what is left."""
    script = """
import sys
from papo.record.progress import Progress
progress = Progress()
progress.start(3)
progress.say("first")
sys.stdin.read()
for _ in range(3):
    progress.say("into nothing")
progress.close()
open(sys.argv[1], "w").write("done")
"""
    ours, theirs = os.openpty() if terminal else os.pipe()
    command = [sys.executable, "-c", script, str(tmp_path / "mark")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        os.read(ours, 5)
        os.close(ours)
        _, err = process.communicate()
    assert process.returncode == 0 and "Traceback" not in err, err
    assert (tmp_path / "mark").read_text() == "done"
