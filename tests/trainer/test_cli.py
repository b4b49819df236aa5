"""The command line: its arguments, its one-line errors and its progress."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from papo import cli
from papo.cli import config_from, main
from papo.config import ConfigError
from papo.dist import termination
from papo.dist.peers import PeerError
from papo.errors import PapoError
from papo.record.progress import Progress, clock_text, step_line
from tests.trainer.tiny import MINIMAL

ROOT = Path(__file__).parents[2]
FIGURES = {
    "reward/mean": 0.5,
    "entropy/mean": 2.25,
    "phase/phi": -0.5,
    "throughput/tokens_per_second": 1234.4,
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return str(path)


def as_one_of(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("MASTER_PORT", "29500")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting, no launcher, no model to look for, and the root of the log as it was: `main` sets
    it up for the whole process."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli.preflight, "check", lambda config: None)
    monkeypatch.setattr(cli, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(cli, "_log_to_stderr", lambda level: None)


# ---- arguments ----------------------------------------------------------------------------------


def test_set_overrides_in_order(file: str) -> None:
    config = config_from(["--config", file, "--set", "optim.lr=1e-5", "--set", "optim.lr=2e-5"])
    assert config.optim.lr == 2e-5 and config.resume == "never"


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        ([], "never"),
        (["--resume"], "auto"),
        (["--resume", "auto"], "auto"),
        (["--resume", "never", "--set", "resume=auto"], "never"),
        (["--set", "resume=auto"], "auto"),
        (["--resume", "runs/x/checkpoints/step-00000010"], "runs/x/checkpoints/step-00000010"),
    ],
)
def test_resume(file: str, arguments: list[str], resume: str) -> None:
    assert config_from(["--config", file, *arguments]).resume == resume


@pytest.mark.parametrize("resume", ["", "a\0b", "x" * 5000])
def test_resume_is_validated_as_the_option_is(file: str, resume: str) -> None:
    """An unset shell variable must not start the run over."""
    for arguments in (["--resume", resume], ["--resume="], ["--set", 'resume=""']):
        with pytest.raises(ConfigError, match=r"run.yaml: resume=.*: expected "):
            config_from(["--config", file, *arguments])


def test_an_argument_that_is_not_given_replaces_no_option(file: str) -> None:
    written = ["--set", "resume=auto", "--set", "resume_anyway=true"]
    config = config_from(["--config", file, *written])
    assert config.resume == "auto" and config.resume_anyway


def test_the_launchers_argument_is_accepted(file: str) -> None:
    assert config_from(["--local_rank=1", "--config", file]).name == "test"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config"),
        (["--config", "{file}", "--lr", "3"], "unrecognized arguments: --lr 3; see --help"),
        (["--config", "{file}", "--resum", "auto"], "unrecognized arguments: --resum auto"),
        (["--config", "{file}", "--set"], "expected one argument"),
        (["--config", "{file}", "--set", "optim.lrr=1"], "did you mean optim.lr?"),
        (["--config", "{file}", "--set", "weightng.strength=1"], "did you mean weighting?"),
        (["--config", "{file}", "--set", "steps"], "--set steps"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_bad_arguments_are_one_line_and_a_failure(
    file: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [a.format(file=file) for a in arguments]
    with pytest.raises(ConfigError):
        config_from(argv)
    assert main(argv) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and expected in line and not out


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_run_is_told_by_rank_0_and_fails_every_rank(
    file: str, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: object) -> int:
        raise PapoError("the disk is full:\nfree some")

    as_one_of(2, monkeypatch)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("papo.train.loop.run", run)
    monkeypatch.setattr(cli.peers, "met", True)
    capsys.readouterr()  # what importing DeepSpeed says
    assert main(["--config", file]) == 1
    out, err = capsys.readouterr()
    assert not out and err == ("error: the disk is full: free some\n" if rank == 0 else "")


def test_the_other_ranks_leave_after_rank_0_has_spoken(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher kills rank 0 with the rest when it sees another one fail first."""
    waited: list[float] = []
    monkeypatch.setattr(cli, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    as_one_of(2, monkeypatch)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["--config", file, "--set", "steps=0"]) == 1
    assert waited == [2.0]


@pytest.mark.parametrize(
    ("rank", "local", "launched", "told"),
    [("0", "0", False, 1), ("1", "1", False, 0), ("8", "0", False, 1), ("9", "1", True, 1)],
)
def test_before_the_ranks_have_met_each_machine_tells_what_it_lacks(
    file: str, monkeypatch, capsys, rank: str, local: str, launched: bool, told: int
) -> None:
    """And a rank that the launcher leaves alive after another would have told the same."""
    as_one_of(16, monkeypatch)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    launcher = object() if launched else None
    monkeypatch.setattr(termination.PROCESS, "_launcher", launcher)
    assert main(["--config", file, "--set", "steps=0"]) == 1
    err = capsys.readouterr().err
    assert err.count("error: ") == told and ("steps=0" in err) == bool(told)


@pytest.mark.parametrize("has_folder", [True, False])
def test_an_unforeseen_error_is_a_line_and_its_traceback_a_file(
    has_folder: bool,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the run's folder, or where there is none in the temporary one."""

    def run(config: object) -> int:
        raise RuntimeError("a \x1b[31mbug\x00 of \udcff\nmany lines")

    folders = {True: tmp_path / "run", False: tmp_path / "temporary"}
    folders[has_folder].mkdir()
    monkeypatch.setattr("papo.train.loop.run", run)
    monkeypatch.setattr(cli.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    capsys.readouterr()
    assert main(["--config", file, "--set", f"output_dir={tmp_path / 'run'}"]) == 1
    (written,) = folders[has_folder].iterdir()
    assert capsys.readouterr().err == (
        "error: unexpected RuntimeError: a \\x1b[31mbug\\x00 of \\udcff; "
        f"the traceback is in {written}\n"
    )
    assert "Traceback" in written.read_text() and "in run" in written.read_text()


def test_a_lost_peer_ends_the_process_in_one_line(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, since destroying the process group would wait for the peer."""
    left: list[tuple[int, str]] = []

    def run(config: object) -> int:
        raise PeerError("rank 1 is gone", speaks=True)

    monkeypatch.setattr("papo.train.loop.run", run)
    monkeypatch.setattr(termination.PROCESS, "leave", lambda *how: left.append(how))
    monkeypatch.setattr(termination.PROCESS, "leave_silently", lambda status: None)
    main(["--config", file])
    assert left == [(1, "error: rank 1 is gone")]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"RANK": "first"},
            "RANK='first' beside WORLD_SIZE=1: expected a whole number from 0 to 0",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK='2' beside WORLD_SIZE=2"),
        ({"RANK": "\N{SUPERSCRIPT TWO}", "WORLD_SIZE": "4"}, "expected a whole number from 0 to 3"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected a whole number from 1"),
        ({"WORLD_SIZE": "9" * 5000}, "expected a whole number from 1"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"WORLD_SIZE": "2"}, "MASTER_PORT is not set, but WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT='70000': expected"),
    ],
)
def test_a_bad_variable_of_the_launcher_is_one_line(
    file: str,
    variables: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", file]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line


def test_a_bad_option_ends_the_process_before_torch_is_loaded(file: str) -> None:
    """As a process: the exit status, and an answer within the time Python takes to start."""
    code = (
        "import sys; from papo.cli import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", file, "--set", "weighting.strength=1"],
        cwd=ROOT,
        env={**os.environ, "RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {file}: weighting.strength=1: expected less than 1\n"


# ---- progress -----------------------------------------------------------------------------------


def test_a_step_is_a_line_with_what_was_promised() -> None:
    assert step_line(3, 20, FIGURES, 65.2) == (
        "step 3/20  reward 0.500  entropy 2.250  phase -0.50  1234 tok/s  ETA 1:05"
    )


def test_a_mean_over_nothing_is_a_dash() -> None:
    figures = {**FIGURES, "reward/mean": math.nan, "entropy/mean": math.nan}
    assert step_line(3, 20, figures, 65.2).startswith("step 3/20  reward -  entropy -  phase ")


@pytest.mark.parametrize(("r", "shown"), [(0.916, "dH r +0.92  "), (-0.5, "dH r -0.50  ")])
def test_a_step_shows_how_well_entropy_changes_were_predicted(r: float, shown: str) -> None:
    """Once there are steps enough to tell; by polarity with `metrics.predict_share` 0."""
    name = "entropy/prediction_correlation"
    without = step_line(3, 20, FIGURES, 65.2)
    unknown = {**FIGURES, name: math.nan, f"{name}_polarity": math.nan}
    assert step_line(3, 20, unknown, 65.2) == without
    expected = without.replace("1234 tok/s", f"{shown}1234 tok/s")
    assert step_line(3, 20, {**FIGURES, name: r, f"{name}_polarity": 0.1}, 65.2) == expected
    assert step_line(3, 20, {**unknown, f"{name}_polarity": r}, 65.2) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.7, "1:00:00"), (7384, "2:03:04")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_eta_is_the_median_step_times_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """An evaluation or a checkpoint between two steps does not move it."""
    now = iter([0.0, 10.0, 20.0, 120.0, 130.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(now))
    progress = Progress()
    progress.start(total=10)
    for step in (1, 2, 3, 4):
        progress.update(step, FIGURES)
    progress.say("a line")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("ETA ")[-1] for line in lines] == ["1:30", "1:20", "1:10", "1:00", "a line"]


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(enabled=False)
    progress.start(2)
    progress.update(1, FIGURES)
    progress.say("a line")
    progress.close()
    assert not capsys.readouterr().out


def test_on_a_terminal_the_bar_shows_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    progress = Progress()
    progress.start(total=4, done=1)
    progress.update(2, FIGURES)
    (task,) = progress._bar.tasks
    assert (task.completed, task.total) == (2, 4)
    assert task.description.startswith("step 2/4  reward 0.500")
    progress.close()
    progress.close()
