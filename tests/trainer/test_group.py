"""How ranks meet, and how one notices that another is gone: without processes or a model."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from typing import NoReturn

import pytest
import torch.distributed as dist

from papo.dist import group, peers, termination
from papo.dist.environment import Place
from papo.dist.peers import Failure, Member, PeerError, Peers
from papo.errors import PapoError
from tests.distributed.launch import free_port


def place(rank: int, world_size: int = 2, port: int | None = None) -> Place:
    return Place(rank, rank, world_size, "127.0.0.1", free_port() if port is None else port)


# ---- the rendezvous -----------------------------------------------------------------------------


def test_ranks_that_meet_know_each_other() -> None:
    zero = place(0)
    met: dict[int, list[Member]] = {}
    threads = [
        threading.Thread(
            target=lambda p: met.update({p.rank: group.meet(p, 60)[1]}),
            args=(zero._replace(rank=rank, local_rank=rank),),
        )
        for rank in (1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met[0] == met[1] == [Member.this()] * 2


def test_rank_0_names_those_that_did_not_come() -> None:
    here = place(0, world_size=3)
    with pytest.raises(PeerError) as raised:
        group.meet(here, 0.1)
    assert raised.value.speaks
    assert str(raised.value).startswith(
        f"ranks 1, 2 did not reach 127.0.0.1:{here.port} within 0 s; start all 3 ranks together"
    )


def test_any_other_rank_says_that_rank_0_does_not_answer() -> None:
    here = place(1)
    with pytest.raises(PeerError, match=f"rank 0 does not answer at 127.0.0.1:{here.port} within"):
        group.meet(here, 0.1)


def test_another_program_at_the_port_is_told_from_rank_0() -> None:
    """It takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PeerError, match="another program listens there"):
            group.meet(place(1, port=port), 0.1)
        with pytest.raises(PapoError, match=f"MASTER_PORT={port} is in use by another process"):
            group.meet(place(0, port=port), 0.1)


def test_the_deadline_is_short_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAPO_START_TIMEOUT", raising=False)
    assert group.deadline_seconds() == 25
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert group.deadline_seconds() >= 600
    monkeypatch.setenv("PAPO_START_TIMEOUT", "7")
    assert group.deadline_seconds() == 7
    monkeypatch.setenv("PAPO_START_TIMEOUT", "soon")
    with pytest.raises(PapoError, match="PAPO_START_TIMEOUT='soon': expected a whole number"):
        group.deadline_seconds()


# ---- lost ranks ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended() -> Member:
    """A rank that has run on this machine and does no more."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        return Member.of(process.pid)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_GRACE_SECONDS", 0.0)


def test_a_rank_that_ended_without_a_word_is_lost(ended: Member) -> None:
    store = dist.HashStore()
    seen = Peers(store, 0, [Member.this(), ended])
    failure = seen.failure()
    assert failure is not None
    assert failure.text.startswith(f"rank 1 (pid {ended.pid} on {ended.host}) is gone (killed or")
    # The others hear of it, from wherever they are.
    far = Member("elsewhere", 1, 0.0)
    assert Peers(store, 2, [far, far, Member.this()]).failure() == failure


def test_a_rank_that_is_done_is_not_lost(ended: Member) -> None:
    store = dist.HashStore()
    Peers(store, 1, [Member.this(), ended]).leave()
    assert Peers(store, 0, [Member.this(), ended]).failure() is None


def test_a_pid_that_another_process_has_now_is_gone() -> None:
    here = Member.this()
    assert not here.is_gone()
    assert here._replace(created=here.created - 1.0).is_gone()


def test_an_error_of_the_transport_is_the_lost_rank(ended: Member) -> None:
    seen = Peers(dist.HashStore(), 1, [ended, Member.this()])
    error = seen.explained(RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer"))
    assert error is not None and error.speaks and str(error).startswith("rank 0 (pid")


def test_a_rank_of_another_machine_cannot_be_reached() -> None:
    far = Member("elsewhere", 1, 0.0)
    seen = Peers(dist.HashStore(), 0, [Member.this(), far])
    error = seen.explained(dist.DistBackendError("socket closed"))
    assert error is not None and error.speaks
    assert str(error).startswith("a rank cannot be reached (socket closed); the run ends")


def test_a_bug_is_not_taken_for_a_lost_rank() -> None:
    seen = Peers(dist.HashStore(), 0, [Member.this()] * 2)
    assert seen.explained(RuntimeError("shapes differ")) is None
    assert seen.explained(KeyError("x")) is None


def test_the_lowest_rank_that_is_left_speaks(ended: Member) -> None:
    store = dist.HashStore()
    members = [ended, Member.this(), Member.this()]
    told = [Peers(store, r, members).explained(RuntimeError("")) for r in (1, 2)]
    assert [e is not None and e.speaks for e in told] == [True, False]


def test_what_a_rank_prints_itself_is_not_printed_again() -> None:
    store = dist.HashStore()
    members = [Member.this()] * 2
    Peers(store, 1, members).tell_own(KeyError("x"))
    told = Peers(store, 0, members).explained(RuntimeError(""))
    assert told is not None and not told.speaks
    # An error for users of one rank alone, which only rank 0 would print.
    store = dist.HashStore()
    Peers(store, 1, members).tell_own(PapoError("the disk is full"))
    told = Peers(store, 0, members).explained(RuntimeError(""))
    assert told is not None and told.speaks and str(told) == "rank 1: the disk is full"


def test_a_rank_that_hangs_is_ended_by_its_watcher(
    ended: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NCCL the main thread would wait for the collective's timeout."""

    def leave(status: int, line: str = "") -> NoReturn:
        raise SystemExit(line)

    monkeypatch.setattr(peers, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(termination.PROCESS, "leave", leave)
    with pytest.raises(SystemExit, match=r"^error: rank 1 \(pid .* is gone"):
        Peers(dist.HashStore(), 0, [Member.this(), ended])._watch()


def test_a_signals_failure_is_not_a_loss() -> None:
    failure = Failure("rank 1 has left at SIGINT; the run ends", -1, signalled=True)
    seen = Peers(dist.HashStore(), 0, [Member.this()] * 2)
    seen._tell(failure)
    assert seen.failure() == failure and not seen._is_lost()


def test_joining_asks_no_compiler_what_deepspeed_could_build(monkeypatch) -> None:
    ops = group.engine.deepspeed.ops
    monkeypatch.delitem(vars(ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(ops, "_probe_compatible_ops", lambda: pytest.fail("asked"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what joining sets is taken back
        monkeypatch.delenv(name)
    with group.joined("gloo"):
        assert dist.get_world_size() == 1
