"""The other blocks of a cluster, which are not replayed: they do as the replayed block does.

What a block's warps send to a block that finishes a row, all blocks send at the same time. So rows
that the replayed block finishes have messages of all. Of a row that another block finishes, the
plan comes as long after the messages as this block's own did.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

CLUSTER_LATENCY = 200
PLAN_WORDS = 2  # broadcasts of a row


class Barrier(Protocol):
    def add(self, arrivals: int, size: int, at: float) -> None: ...


@dataclass(frozen=True)
class Sent:
    """What crosses a cluster. size: its blocks; row_bytes: what a block's warps send of a row;
    broadcasts: what each other block sent to block 0, by its rank: (barrier, bytes)."""

    size: int = 1
    row_bytes: int = 0
    broadcasts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class Peers:
    """Of one replayed block, which has rank 0."""

    def __init__(self, sent: Sent, barriers: dict[int, Barrier]) -> None:
        self.sent, self.barriers = sent, barriers
        self.broadcasts = {rank: deque(found) for rank, found in sent.broadcasts.items()}
        self.bytes: dict[int, int] = {}  # of this block's messages, by the rank they go to
        self.own: deque[float] = deque()  # when all messages of a row to finish here were sent
        self.asked: deque[tuple[int, float]] = deque()  # the same elsewhere
        self.delay: float | None = None
        self.words = 0

    def message(self, barrier: int, size: int, rank: int, now: float) -> None:
        """A warp sends its sums of a row to a block."""
        if rank == 0:
            self.barriers[barrier].add(0, -size * self.sent.size, now + CLUSTER_LATENCY)
        self.bytes[rank] = self.bytes.get(rank, 0) + size
        if self.bytes[rank] % self.sent.row_bytes == 0:
            if rank == 0:
                self.own.append(now)
            else:
                self.asked.append((rank, now))
                self._answer(now)

    def broadcast(self, barrier: int, size: int, now: float) -> None:
        """This block sends a word of a plan to all."""
        self.barriers[barrier].add(0, -size, now + CLUSTER_LATENCY)
        self.words += 1
        if self.words % PLAN_WORDS == 0:
            self.delay = now - self.own.popleft()
            self._answer(now)

    def _answer(self, now: float) -> None:
        """Plans of other blocks, once it is known how long they take."""
        while self.asked and self.delay is not None:
            rank, asked = self.asked.popleft()
            at = max(now, asked + self.delay) + CLUSTER_LATENCY
            for _ in range(PLAN_WORDS):
                barrier, size = self.broadcasts[rank].popleft()
                self.barriers[barrier].add(0, -size, at)
