"""The process group: how the ranks meet, and how they part."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from papo.dist import engine, environment, termination
from papo.dist.environment import Place
from papo.dist.peers import Member, PeerError, Peers
from papo.errors import PapoError, first_line

log = logging.getLogger(__name__)

_DEADLINE = "PAPO_START_TIMEOUT"
_DEADLINE_SECONDS = 25
_SHOWN_AFTER_SECONDS = 20
_POLL_SECONDS = 0.5

_peers: Peers | None = None


@contextlib.contextmanager
def joined(backend: str | None = None) -> Iterator[None]:
    """In the process group for the block.

    Raises:
        PapoError: the group cannot be joined.
        PeerError: another rank was lost, where the block met that as an error.
    """
    try:
        start(backend)
        yield
    except Exception as error:
        lost = None
        if _peers is not None and not isinstance(error, PeerError):
            lost = None if isinstance(error, PapoError) else _peers.explained(error)
            if lost is None:
                _peers.tell_own(error)
        stop()
        if lost is not None:
            raise lost from error
        raise
    stop()


def start(backend: str | None = None) -> None:
    """Join the launcher's process group; a single rank where the environment describes none.

    Raises:
        PapoError: a variable of the environment is bad, the port is taken, or ranks are missing.
    """
    global _peers
    place = environment.place()
    for name, value in (
        ("RANK", place.rank),
        ("LOCAL_RANK", place.local_rank),
        ("WORLD_SIZE", place.world_size),
        ("MASTER_ADDR", place.address),
    ):
        os.environ.setdefault(name, str(value))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed would now ask compilers what it could build, and on a CPU build an all-reduce for
    # inference. Nothing here calls what it builds.
    engine.deepspeed.ops.__compatible_ops__ = {}
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    device = _take_device(place)
    store: dist.Store = dist.HashStore()
    if place.world_size > 1:
        met, members = meet(place, deadline_seconds())
        second = _connect(place._replace(address=met.host))
        _peers = Peers(dist.PrefixStore("peers", second), place.rank, members)
        _peers.watch()
        store = dist.PrefixStore("group", met)
    dist.init_process_group(
        backend or ("gloo" if device is None else "nccl"),
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=engine.deepspeed.constants.default_pg_timeout,
        device_id=device if place.world_size > 1 else None,
    )
    engine.deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def stop() -> None:
    """Leave the process group."""
    global _peers
    if _peers is not None:
        _peers.leave()
        _peers = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _take_device(place: Place) -> torch.device | None:
    """Make the rank's GPU the current one; None without GPUs."""
    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise PapoError(f"LOCAL_RANK={place.local_rank}, but this machine shows {count} GPUs")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


# ---- the rendezvous -----------------------------------------------------------------------------


def deadline_seconds() -> float:
    """How long the ranks wait for each other: long under a launcher, which ends them all if one
    ends.

    Raises:
        PapoError: PAPO_START_TIMEOUT is no number of seconds.
    """
    text = os.environ.get(_DEADLINE)
    if text is None:
        patient = termination.PROCESS.launched or _agent_has_store()
        long = engine.deepspeed.constants.default_pg_timeout.total_seconds()
        return float(long) if patient else _DEADLINE_SECONDS
    if not text.isascii() or not text.isdecimal() or not 0 < int(text[:9]) < 1_000_000:
        raise PapoError(f"{_DEADLINE}={text!r}: expected a whole number of seconds")
    return float(text)


def _agent_has_store() -> bool:
    """Whether torchrun's agent listens at the port, in place of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(place: Place, seconds: float) -> tuple[dist.TCPStore, list[Member]]:
    """Meet the other ranks.

    Args:
        seconds: to wait for them.

    Returns:
        The store that all ranks share, and every rank's process.

    Raises:
        PapoError: the port is taken.
        PeerError: some ranks did not come.
    """
    waiting = _Waiting(place, seconds)
    serves = place.rank == 0 and not _agent_has_store()
    store = _serve(place) if serves else _reach(place, waiting)
    keys = [f"member/{rank}" for rank in range(place.world_size)]
    try:
        store.set(keys[place.rank], json.dumps(Member.this()))
        while missing := [r for r, key in enumerate(keys) if not store.check([key])]:
            names = ", ".join(map(str, missing))
            who = f"rank{'s' if len(missing) > 1 else ''} {names} did not reach"
            if store.check(["missing"]):
                raise PeerError(who, speaks=False)
            if waiting.is_over(who):
                store.set("missing", "")
                time.sleep(2 * _POLL_SECONDS if serves else 0.0)  # for those that came to read it
                raise PeerError(waiting.error(who), speaks=place.rank == 0)
            time.sleep(_POLL_SECONDS)
        members = [Member(*json.loads(value)) for value in store.multi_get(keys)]
    except RuntimeError as error:
        who = f"rank 0 has left {place.address}:{place.port}"
        raise PeerError(f"{who} before all ranks had come", speaks=True) from error
    return store, members


class _Waiting:
    """A deadline; halfway there, where it is long, the screen says who is missing."""

    def __init__(self, place: Place, seconds: float) -> None:
        self._where = f"{place.address}:{place.port}"
        self._world_size = place.world_size
        self._seconds = seconds
        self._began = time.monotonic()
        self._shown = seconds <= _DEADLINE_SECONDS or place.local_rank != 0

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._began + self._seconds - time.monotonic())

    def is_over(self, who: str) -> bool:
        """Whether the deadline has passed.

        Args:
            who: is missing, as the beginning of a sentence.
        """
        waited = time.monotonic() - self._began
        if not self._shown and waited >= _SHOWN_AFTER_SECONDS:
            self._shown = True
            log.critical("%s %s within %.0f s; waiting for them", who, self._where, waited)
        return waited >= self._seconds

    def error(self, who: str) -> str:
        """The line of a deadline that has passed."""
        return (
            f"{who} {self._where} within {self._seconds:.0f} s; start all {self._world_size} ranks "
            f"together, with the same MASTER_ADDR and MASTER_PORT, or set {_DEADLINE} to more "
            "seconds"
        )


def _serve(place: Place) -> dist.TCPStore:
    """The store, in rank 0."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", place.port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PapoError(
                f"MASTER_PORT={place.port} is in use by another process: "
                "start with `deepspeed --master_port <free port>`"
            ) from error
        raise PapoError(f"MASTER_PORT={place.port}: {error.strerror}") from error
    return dist.TCPStore(
        "localhost",
        place.port,
        place.world_size,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def _reach(place: Place, waiting: _Waiting) -> dist.TCPStore:
    """The store, in any other rank."""
    who = "rank 0 does not answer at"
    while True:
        try:
            socket.create_connection((place.address, place.port), max(0.1, waiting.left)).close()
            break
        except (OSError, UnicodeError) as error:  # a name of a host that cannot be one
            if waiting.is_over(who) or isinstance(error, UnicodeError):
                line = f"{waiting.error(who)} ({first_line(error)})"
                raise PeerError(line, speaks=True) from error
        time.sleep(_POLL_SECONDS)
    # What listens there may be no store, and torch would wait for its answer forever.
    stores: list[dist.TCPStore] = []

    def connect() -> None:
        with contextlib.suppress(RuntimeError):  # the deadline's error says more
            stores.append(_connect(place))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    while not stores and not waiting.is_over(who):
        thread.join(_POLL_SECONDS)
        if not thread.is_alive():
            break
    if not stores:
        raise PeerError(f"{waiting.error(who)} (another program listens there)", speaks=True)
    return stores[0]


def _connect(place: Place) -> dist.TCPStore:
    return dist.TCPStore(
        place.address,
        place.port,
        place.world_size,
        is_master=False,
        timeout=timedelta(seconds=_DEADLINE_SECONDS),
        wait_for_workers=False,
    )
