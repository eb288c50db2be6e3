"""The ledger: which Kafka offsets of a topic a table holds, kept in the table itself.

Each exchange has one table property, `k2flow.ledger.<exchange>`. The Iceberg commit that adds rows also sets it, so the
rows and the ledger cannot disagree. It survives compaction and snapshot expiration. The summary of each snapshot
carries a copy under the same key. JSON:

    {"topic": "...", "topic_id": "...", "epoch": 3, "sequence": 41, "writer": {...}, "committed_at": 1764000000000,
     "partitions": {"0": {"first": 0, "next": 1500, "rows": 1470}, ...}, "earlier": []}

If a topic is deleted and created again, its ledger starts empty. `earlier` keeps the offsets of the deleted topics, so
that the audit can separate their rows from those of the current one. It also keeps those of a log that was replaced
under the same topic id.

A second property, `k2flow.evidence.<exchange>`, proves that the table and Kafka's log are those of the ledger. An
earlier version ignores it, and leaves it as it was: then `sequence` differs from the ledger's.

    {"sequence": 41, "appended": 40, "marks": {"0": [1499, 1764000000000, "8b1a9953c4611296", 3]}, "lost": {}}
"""

import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import psutil
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from k2flow.errors import CommitError, OffsetGapError

KEY = "k2flow.ledger."  # prefix of the property; the name of the exchange follows
EVIDENCE_KEY = "k2flow.evidence."  # prefix of the second property
NO_TOPIC_IDS = ("", "AAAAAAAAAAAAAAAAAAAAAA", "None")
"""Not Kafka's id of any topic: what a broker without topic ids gives."""
Ranges = tuple[tuple[int, int], ...]


class Mark(NamedTuple):
    """A message that was read: its place in Kafka's log, and what it held.

    `time_ms` is Kafka's (-1: none), `checksum` of key and value. `leader_epoch` is the one that it was written in (-1:
    the broker knows none).
    """

    offset: int
    time_ms: int
    checksum: str
    leader_epoch: int = -1

    def same_message(self, other: "Mark") -> bool:
        """Return whether both are the same message. A copied log may have other leader epochs."""
        return self[:3] == other[:3]

    def __str__(self) -> str:
        epoch = f", leader epoch {self.leader_epoch}" if self.leader_epoch >= 0 else ""
        return f"time {self.time_ms}, checksum {self.checksum}{epoch}"


@dataclass(frozen=True)
class OffsetRange:
    """Offsets [first, next) of one partition, and the number of table rows from them (for Gold: before dedup).

    `mark` is the last message before `next`, if the range has one.
    """

    partition: int
    first: int
    next: int
    rows: int
    mark: Mark | None = None


@dataclass(frozen=True)
class CommittedRange:
    """All offsets [first, next) of one partition that a table holds, and the number of its rows from them."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    first: int
    next: int
    rows: int


@dataclass(frozen=True)
class FormerTopic:
    """The offsets that a table holds of a deleted topic with the same name.

    Its rows were all written before `until` (ms since 1970), when its ledger last changed. Rows of the current topic
    were all written later.
    """

    topic_id: str
    until: int
    partitions: Mapping[int, CommittedRange]


@dataclass(frozen=True)
class Evidence:
    """What proves that the table and Kafka's log are those of a ledger.

    `sequence` is the ledger's. `appended` is the sequence of the last commit that appended a snapshot, whose summary
    has the copy; None if it is unknown. `marks` are the last messages read, by partition. `lost` are offset ranges
    whose rows are missing, because main was moved and that was accepted.
    """

    sequence: int = 0
    appended: int | None = None
    marks: Mapping[int, Mark] = field(default_factory=dict)
    lost: Mapping[int, Ranges] = field(default_factory=dict)


@dataclass(frozen=True)
class Writer:
    """The process that commits, identified well enough to check on its host whether it still runs."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> "Writer":
        """Return the current process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def running_here(self) -> bool:
        """Return whether it is another process of this host, and runs. A process stopped by a signal does not run."""
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
    """The offsets of one exchange's topic that one table holds.

    `writer_epoch` is the fencing token: it counts the starts of the flow. `sequence` counts the commits of all writer
    epochs. `topic_id` is Kafka's. `committed_at` is in ms since 1970. `evidence` is in a property of its own.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    topic: str
    topic_id: str = ""
    writer_epoch: Annotated[int, Field(alias="epoch")] = 0
    sequence: int = 0
    writer: Writer | None = None
    committed_at: int = 0
    partitions: Mapping[int, CommittedRange] = field(default_factory=dict)
    former_topics: Annotated[tuple[FormerTopic, ...], Field(alias="earlier")] = ()
    evidence: Annotated[Evidence, Field(exclude=True)] = field(default=Evidence(), compare=False)

    def next_offset(self, partition: int) -> int | None:
        """Return the first offset of `partition` that is not in the table; None if the table has no offset of it."""
        committed = self.partitions.get(partition)
        return None if committed is None else committed.next

    def fenced(self, writer: Writer, topic_id: str) -> "Ledger":
        """Return the ledger of the next writer epoch, with the same offsets unless the topic was created again."""
        ledger = self.of_topic(topic_id)
        return replace(
            ledger, writer_epoch=self.writer_epoch + 1, sequence=self.sequence + 1, writer=writer, committed_at=_now()
        )

    def of_topic(self, topic_id: str) -> "Ledger":
        """Return the ledger for the topic with this id: without offsets if it is another one.

        A topic that is back (its id is that of a former one) continues where its offsets ended, so that none is read
        twice. An unknown id counts as the same.
        """
        if not (self.topic_id and topic_id) or self.topic_id == topic_id:
            return replace(self, topic_id=topic_id or self.topic_id)
        former = self.former_topics
        if self.partitions:
            former = (*former, FormerTopic(self.topic_id, self.committed_at, self.partitions))
        ends = {p: held.next for each in former if each.topic_id == topic_id for p, held in each.partitions.items()}
        return replace(
            self,
            topic_id=topic_id,
            partitions={p: CommittedRange(end, end, 0) for p, end in ends.items()},
            former_topics=former,
            evidence=replace(self.evidence, marks={}, lost={}),
        )

    def of_log(self, ends: Mapping[int, int]) -> "Ledger":
        """Return the ledger after the log of some partitions was replaced under the same topic id.

        `ends` has the offset at which each of them continues. Its offsets so far become those of a former topic.
        """
        if not ends:
            return self
        closed = {p: self.partitions.get(p, CommittedRange(end, end, 0)) for p, end in ends.items()}
        marks = {p: mark for p, mark in self.evidence.marks.items() if p not in ends}
        lost = {p: ranges for p, ranges in self.evidence.lost.items() if p not in ends}
        return replace(
            self,
            partitions={**self.partitions, **{p: CommittedRange(end, end, 0) for p, end in ends.items()}},
            former_topics=(*self.former_topics, FormerTopic(self.topic_id, self.committed_at, closed)),
            evidence=replace(self.evidence, marks=marks, lost=lost),
        )

    def in_snapshot(self) -> "Ledger":
        """Return the ledger for a commit that appends a snapshot."""
        return replace(self, evidence=replace(self.evidence, appended=self.sequence))

    def advanced(self, ranges: Iterable[OffsetRange], accept_gaps: bool = False) -> "Ledger":
        """Return the ledger after `ranges`, which must be contiguous with it and with each other in each partition.

        A partition that the table has no offset of may begin anywhere. With `accept_gaps` a range may begin after the
        end of the last one (Kafka no longer has the messages between them), never before it. Any other
        range raises OffsetGapError.
        """
        partitions, marks = dict(self.partitions), dict(self.evidence.marks)
        for r in sorted(ranges, key=lambda r: (r.partition, r.first)):
            old = partitions.get(r.partition, CommittedRange(r.first, r.first, 0))
            if r.first < old.next or (r.first > old.next and not accept_gaps):
                raise OffsetGapError(
                    f"{self.topic}[{r.partition}]: offsets {r.first} to {r.next - 1} were to follow but the table "
                    f"ends before {old.next}: another copy of the flow has written to it. Stop that one and start again"
                )
            partitions[r.partition] = CommittedRange(old.first, r.next, old.rows + r.rows)
            if r.mark is not None:
                marks[r.partition] = r.mark
        evidence = replace(self.evidence, marks=marks)
        return replace(self, sequence=self.sequence + 1, partitions=partitions, committed_at=_now(), evidence=evidence)

    def restated(self, held: Mapping[int, CommittedRange]) -> "Ledger":
        """Return the ledger of a table whose rows are computed again, so that it holds exactly `held`."""
        evidence = Evidence(appended=self.evidence.appended)
        partitions = dict(held)
        return replace(self, sequence=self.sequence + 1, partitions=partitions, committed_at=_now(), evidence=evidence)

    def corrected(self, more: Mapping[int, int]) -> "Ledger":
        """Return the ledger with `more` rows (negative: fewer) from the same offsets of each partition."""
        partitions = {p: replace(old, rows=old.rows + more.get(p, 0)) for p, old in self.partitions.items()}
        return replace(self, sequence=self.sequence + 1, partitions=partitions, committed_at=_now())

    def to_json(self) -> str:
        """Return the value of the first property, one line of JSON."""
        return _JSON.dump_json(self, by_alias=True, ensure_ascii=True).decode()

    def properties(self, exchange: str) -> dict[str, str]:
        """Return both table properties."""
        evidence = replace(self.evidence, sequence=self.sequence)
        text = _EVIDENCE_JSON.dump_json(evidence, ensure_ascii=True).decode()
        return {KEY + exchange: self.to_json(), EVIDENCE_KEY + exchange: text}


def _complete(raw: Any) -> Any:
    """Refuse JSON without offsets: it is damaged, and would start the flow at the beginning of the topic."""
    if isinstance(raw, dict) and (missing := {"writer", "partitions"} - raw.keys()):
        raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
    return raw


def first_error(error: ValidationError) -> str:
    """Return the first error in a property's JSON on one line, with the place in the JSON where it is."""
    found = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, found["loc"]))
    return f"{place}: {found['msg']}" if place else found["msg"]


_JSON: TypeAdapter[Ledger] = TypeAdapter(Annotated[Ledger, BeforeValidator(_complete)])
_EVIDENCE_JSON: TypeAdapter[Evidence] = TypeAdapter(Evidence)


def _now() -> int:
    return time.time_ns() // 1_000_000


def read(properties: Mapping[str, str], exchange: str, topic: str) -> Ledger:
    """Return the ledger of `exchange` in a table's properties, an empty one if there is none.

    Raises CommitError if a property is damaged, or the ledger is that of another topic.
    """
    text = properties.get(KEY + exchange)
    if text is None:
        return Ledger(topic)
    ledger = parse(text, exchange)
    if ledger.topic != topic:
        raise CommitError(
            f"the tables hold offsets of topic {ledger.topic}, not {topic}: set K2FLOW_{exchange.upper()}_TOPIC back, "
            "or write to new tables"
        )
    if (text := properties.get(EVIDENCE_KEY + exchange)) is None:
        return ledger
    try:
        evidence = _EVIDENCE_JSON.validate_json(text)
    except ValidationError as error:
        raise CommitError(
            f"table property {EVIDENCE_KEY}{exchange} is damaged ({first_error(error)}): remove it, then start again"
        ) from error
    if evidence.sequence != ledger.sequence:  # an earlier version has committed since
        evidence = replace(evidence, appended=None)
    return replace(ledger, evidence=evidence)


def parse(text: str, exchange: str) -> Ledger:
    """Return the ledger in a property, or in the summary of a snapshot. Raises CommitError if it is damaged."""
    try:
        ledger = _JSON.validate_json(text)
        return replace(ledger, topic_id="") if ledger.topic_id in NO_TOPIC_IDS else ledger
    except ValidationError as error:
        raise CommitError(
            f"table property {KEY}{exchange} is not a ledger ({first_error(error)}): restore it from a snapshot"
        ) from error


def start_offsets(ledgers: Iterable[Ledger]) -> dict[int, int]:
    """Return the offset at which the flow begins in each partition: the smallest next offset over all tables.

    Only partitions that a table knows are included. A table without offsets of such a partition begins it at the first
    offset of the others.
    """
    known = list(ledgers)
    starts: dict[int, int] = {}
    for partition in {p for ledger in known for p in ledger.partitions}:
        ranges = [ledger.partitions.get(partition) for ledger in known]
        first = min(committed.first for committed in ranges if committed)
        starts[partition] = min(committed.next if committed else first for committed in ranges)
    return starts
