"""Which fault happens when: all of it follows from the seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

PAUSE_SECONDS = (1.0, 4.0)
PROCESSES = (1, 3, 2)
EXCHANGES = ("binance", "binance", "kraken")  # the one with more processes is hit more often


class FaultKind(StrEnum):
    """The kinds of faults."""

    KILL = "kill -9 of one process"
    KILL_ALL = "kill -9 of all processes of a flow"
    FREEZE = "SIGSTOP of one process, then SIGCONT"
    REPLACE_FROZEN = "SIGSTOP of a flow, a successor, then SIGCONT"
    RESCALE = "another number of processes"
    SECOND_COPY_HERE = "a second copy on the same host"
    SECOND_COPY_ELSEWHERE = "a second copy on another host"
    BROKER_STOP = "broker stopped by SIGTERM"
    BROKER_KILL = "broker killed by SIGKILL"
    PARTITION = "a partition added to a topic"
    DISK_FULL = "disk full"
    CATALOG_LOCKED = "catalog locked by another connection"
    CATALOG_REFUSES = "catalog refuses connections"
    CATALOG_HANGS = "catalog does not answer"
    ANSWER_LOST = "connection cut after a commit was sent"
    REQUEST_LOST = "connection cut before a commit was sent"
    CATALOG_CRASH = "catalog crashed and restarted"
    CATALOG_FROZEN = "SIGSTOP of all processes of the catalog"
    STORE_REFUSES = "store refuses connections"
    STORE_HANGS = "store does not answer"
    STORE_CUTS = "connections cut after the store served the request"
    STORE_RESTART = "store stopped or killed, and restarted"
    STORE_SLOW = "each request to the store takes longer"
    READ_REFUSED = "read permission revoked for a while"
    REGISTRY_LAGS = "a new schema id that the registry does not know yet"
    HOSTILE_VALUES = "hostile texts, numbers, times and keys"
    CACHE_DELETED = "the window's cache deleted while the flow runs"
    CACHE_DELETED_DOWN = "the window's cache deleted between two starts"
    CACHE_DAMAGED = "a file of the window's cache replaced by a damaged one while the flow runs"
    CACHE_DAMAGED_DOWN = "a file of the window's cache damaged between two starts"
    CACHE_OLDER = "an older copy of the window's cache put back between two starts"
    CLOCK_JUMP = "a flow whose clock is minutes off"
    ROLLBACK = "a table rolled back to an older snapshot"
    OTHER_LOG = "an older copy of the broker's disk with other messages"
    BIT_FLIP = "a bit flipped in a log segment"


OFTEN = {
    FaultKind.KILL: 5,
    FaultKind.RESCALE: 3,
    FaultKind.FREEZE: 2,
    FaultKind.REPLACE_FROZEN: 2,
    FaultKind.SECOND_COPY_ELSEWHERE: 2,
    FaultKind.ANSWER_LOST: 2,
    FaultKind.HOSTILE_VALUES: 2,
    FaultKind.CACHE_DAMAGED_DOWN: 2,
}
ALONE = {FaultKind.ROLLBACK, FaultKind.OTHER_LOG, FaultKind.BIT_FLIP}
"""The kinds that a flow must detect. No other fault may be the reason why it ends, so they happen one at a time."""


@dataclass(frozen=True)
class Fault:
    """One fault, `at` seconds after the start, for `seconds`; `pick`, 0 to 1, chooses the victim."""

    at: float
    kind: FaultKind
    exchange: str
    seconds: float
    pick: float
    processes: int

    def __str__(self) -> str:
        return f"{self.at:6.1f} s  {self.exchange:8}{self.kind} ({self.seconds:.1f} s, {self.processes} processes)"


def plan(seed: int, seconds: float, kinds: Sequence[FaultKind]) -> list[Fault]:
    """Plan faults for `seconds`, in rounds: in each round every kind occurs as often as OFTEN says."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    pending: list[FaultKind] = []
    rescaled = 0
    at = 4.0  # both flows are starting then
    while at < seconds:
        if not pending:
            pending = [kind for kind in kinds for _ in range(OFTEN.get(kind, 1))]
            chance.shuffle(pending)
        kind = pending.pop()
        rescaled += kind is FaultKind.RESCALE
        processes = PROCESSES[rescaled % len(PROCESSES)]
        faults.append(Fault(at, kind, chance.choice(EXCHANGES), chance.uniform(2, 6), chance.random(), processes))
        at += chance.uniform(*PAUSE_SECONDS)
    return faults
