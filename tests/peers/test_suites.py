"""The peers' own tests, run on papo_kernels through the shims.

`make peers` installs the peers, fetches their tests into $PEERS_SRC and runs this file;
`make peers ARGS="-m large"` what takes an hour.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from .suites import SUITES, Suite


def _marked(suite: Suite) -> ParameterSet:
    marks = [pytest.mark.needs(f"{suite.peer.name}'s tests")]
    return pytest.param(suite, id=suite.name, marks=marks + [pytest.mark.large] * suite.large)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suite", [_marked(suite) for suite in SUITES])
def test_suite(suite: Suite, tmp_path: Path) -> None:
    sources = Path(os.environ["PEERS_SRC"]).resolve()
    report, output = suite.run(sources, tmp_path / "report.json")
    print(output[-4000:])
    assert suite.unexpected(report) == {}
    # A test that passes without a call shows nothing: the shims must be what ran.
    assert len(report.passed) >= suite.passes
    assert len(report.passed) + len(report.failed) >= suite.passes + len(suite.exceptions)
    assert len(report.reached) >= suite.reaches
