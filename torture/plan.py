"""What goes wrong when: all of it from the seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

PAUSE_SECONDS = (1.0, 4.0)
PROCESSES = (1, 3, 2)
EXCHANGES = ("binance", "binance", "kraken")  # the one with more processes is met more often


class Kind(StrEnum):
    """Everything that can go wrong."""

    KILL = "kill -9 of one process"
    KILL_ALL = "kill -9 of all processes of a flow"
    FREEZE = "SIGSTOP of one process, then SIGCONT"
    SUPPLANT = "SIGSTOP of a flow, a successor, then SIGCONT"
    RESCALE = "another number of processes"
    TWIN_HERE = "a second copy on the same host"
    TWIN_ELSEWHERE = "a second copy on another host"
    BROKER_STOP = "broker stopped by SIGTERM"
    BROKER_KILL = "broker killed by SIGKILL"
    PARTITION = "a partition added to a topic"
    DISK_FULL = "disk full"
    CATALOG_LOCKED = "catalog locked by another"
    CATALOG_REFUSES = "catalog refuses connections"
    CATALOG_HANGS = "catalog does not answer"
    ANSWER_LOST = "connection cut once a commit was sent"
    REQUEST_LOST = "connection cut before a commit was sent"
    CATALOG_CRASH = "catalog crashed and restarted"
    CATALOG_FROZEN = "SIGSTOP of all processes of the catalog"
    STORE_REFUSES = "store refuses connections"
    STORE_HANGS = "store does not answer"
    STORE_CUTS = "connections cut once the store did what was asked"
    STORE_RESTART = "store stopped or killed, and restarted"


OFTEN = {Kind.KILL: 5, Kind.RESCALE: 3, Kind.FREEZE: 2, Kind.SUPPLANT: 2, Kind.TWIN_ELSEWHERE: 2, Kind.ANSWER_LOST: 2}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong `at` seconds after the start, for `seconds`; `pick`, 0 to 1, chooses the victim."""

    at: float
    kind: Kind
    exchange: str
    seconds: float
    pick: float
    processes: int

    def __str__(self) -> str:
        return f"{self.at:6.1f} s  {self.exchange:8}{self.kind} ({self.seconds:.1f} s, {self.processes} processes)"


def plan(seed: int, seconds: float, kinds: Sequence[Kind]) -> list[Fault]:
    """Faults for `seconds`: each kind comes as often as OFTEN says before any comes again."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    deck: list[Kind] = []
    rescaled = 0
    at = 4.0  # both flows are starting then
    while at < seconds:
        if not deck:
            deck = [kind for kind in kinds for _ in range(OFTEN.get(kind, 1))]
            chance.shuffle(deck)
        kind = deck.pop()
        rescaled += kind is Kind.RESCALE
        processes = PROCESSES[rescaled % len(PROCESSES)]
        faults.append(Fault(at, kind, chance.choice(EXCHANGES), chance.uniform(2, 6), chance.random(), processes))
        at += chance.uniform(*PAUSE_SECONDS)
    return faults
