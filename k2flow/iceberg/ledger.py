"""The ledger: which Kafka offsets of a topic a table holds, kept in the table itself.

It is one table property for each exchange, `k2flow.ledger.<exchange>`, set in the same Iceberg commit as the rows it
speaks of, so the two cannot disagree; it survives compaction and snapshot expiry. Each snapshot's summary carries a
copy under the same key. JSON:

    {"epoch": 3, "sequence": 41, "writer": {...}, "topic": "...", "topic_id": "...", "committed_at": 1764000000000,
     "partitions": {"0": {"first": 0, "next": 1500, "rows": 1470}, ...}, "earlier": []}

A topic that is deleted and made again begins with an empty ledger; what the table holds of the one before is kept in
`earlier`, for the audit to tell the rows of the two apart.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

import psutil

from k2flow.errors import CommitError, OffsetGapError

KEY = "k2flow.ledger."


@dataclass(frozen=True)
class OffsetRange:
    """Offsets [first, next) of one partition; `rows` of the table came out of them (for Gold: before deduplication)."""

    partition: int
    first: int
    next: int
    rows: int


@dataclass(frozen=True)
class Extent:
    """All offsets [first, next) of one partition that a table holds, and how many of its rows came out of them."""

    first: int
    next: int
    rows: int


@dataclass(frozen=True)
class Earlier:
    """What a table holds of a topic that was deleted since, and had the same name.

    `until` (ms since 1970) is when the ledger last changed for it: its rows were all written before, and those of its
    successor after.
    """

    topic_id: str
    until: int
    partitions: Mapping[int, Extent]


@dataclass(frozen=True)
class Writer:
    """The process that commits: enough to tell on its host whether it still lives."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> "Writer":
        """The current process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def running_here(self) -> bool:
        """Whether it is another process of this host that runs now (one that is stopped by a signal does not)."""
        if self.host != socket.gethostname() or self.pid == os.getpid():
            return False
        try:
            process = psutil.Process(self.pid)
            alive = process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return alive and abs(process.create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Ledger:
    """What one table holds of one exchange's topic.

    `epoch` counts the starts of the flow, `sequence` its commits within all epochs, `committed_at` is in ms since 1970.
    """

    topic: str
    topic_id: str = ""
    epoch: int = 0
    sequence: int = 0
    writer: Writer | None = None
    committed_at: int = 0
    partitions: Mapping[int, Extent] = field(default_factory=dict)
    earlier: tuple[Earlier, ...] = ()

    def next_offset(self, partition: int) -> int | None:
        """The first offset of `partition` that is not in the table; None if the table has none of it."""
        extent = self.partitions.get(partition)
        return None if extent is None else extent.next

    def fenced(self, writer: Writer, topic_id: str) -> "Ledger":
        """The ledger with which `writer` takes over: a new epoch, the same offsets, unless the topic is another."""
        renewed = bool(self.topic_id and topic_id) and self.topic_id != topic_id
        ended = (Earlier(self.topic_id, self.committed_at, self.partitions),) if renewed and self.partitions else ()
        return replace(
            self,
            epoch=self.epoch + 1,
            sequence=self.sequence + 1,
            writer=writer,
            topic_id=topic_id or self.topic_id,
            committed_at=_now(),
            partitions={} if renewed else self.partitions,
            earlier=(*self.earlier, *ended),
        )

    def advanced(self, ranges: Iterable[OffsetRange], accept_gaps: bool = False) -> "Ledger":
        """The ledger after `ranges`, each of which must begin where the last one of its partition ended.

        A partition that the table has nothing of may begin anywhere. `accept_gaps` lets a range begin later than the
        last one ended (messages that Kafka no longer has), never earlier. Raises OffsetGapError.
        """
        partitions = dict(self.partitions)
        for r in sorted(ranges, key=lambda r: (r.partition, r.first)):
            old = partitions.get(r.partition, Extent(r.first, r.first, 0))
            if r.first < old.next or (r.first > old.next and not accept_gaps):
                raise OffsetGapError(
                    f"{self.topic}[{r.partition}]: offsets {r.first} to {r.next - 1} were to follow but the table "
                    f"ends before {old.next}: another copy of the flow has written to it. Stop that one and start again"
                )
            partitions[r.partition] = Extent(old.first, r.next, old.rows + r.rows)
        return replace(self, sequence=self.sequence + 1, partitions=partitions, committed_at=_now())

    def corrected(self, more: Mapping[int, int]) -> "Ledger":
        """The ledger after `more` (or fewer) rows came out of the same offsets of each partition."""
        partitions = {p: replace(extent, rows=extent.rows + more.get(p, 0)) for p, extent in self.partitions.items()}
        return replace(self, sequence=self.sequence + 1, partitions=partitions, committed_at=_now())

    def to_json(self) -> str:
        """One line of JSON, as the property holds it."""
        return json.dumps(asdict(self), separators=(",", ":"))


def _extents(raw: Mapping[str, Mapping[str, int]]) -> dict[int, Extent]:
    return {int(p): Extent(**extent) for p, extent in raw.items()}


def _now() -> int:
    return time.time_ns() // 1_000_000


def read(properties: Mapping[str, str], exchange: str, topic: str) -> Ledger:
    """The ledger of `exchange` in a table's properties, an empty one where there is none. Raises CommitError."""
    text = properties.get(KEY + exchange)
    if text is None:
        return Ledger(topic)
    try:
        raw = json.loads(text)
        raw["writer"] = Writer(**raw["writer"]) if raw["writer"] else None
        raw["partitions"] = _extents(raw["partitions"])
        raw["earlier"] = tuple(
            Earlier(e["topic_id"], e["until"], _extents(e["partitions"])) for e in raw.get("earlier", ())
        )
        ledger = Ledger(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise CommitError(
            f"table property {KEY}{exchange} is not a ledger ({error}): restore it from a snapshot"
        ) from error
    if ledger.topic != topic:
        raise CommitError(
            f"the tables hold offsets of topic {ledger.topic}, not {topic}: set K2FLOW_{exchange.upper()}_TOPIC back, "
            "or write to new tables"
        )
    return ledger


def start_offsets(ledgers: Iterable[Ledger]) -> dict[int, int]:
    """Where the flow begins: for each partition that any table knows the smallest next offset over all tables.

    A partition that a table knows nothing of begins, for that table, at the first offset the others began at.
    """
    known = list(ledgers)
    starts: dict[int, int] = {}
    for partition in {p for ledger in known for p in ledger.partitions}:
        extents = [ledger.partitions.get(partition) for ledger in known]
        first = min(extent.first for extent in extents if extent)
        starts[partition] = min(extent.next if extent else first for extent in extents)
    return starts
