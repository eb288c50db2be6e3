"""Compares the ledger of a table with its head: a moved main branch must not lose or duplicate rows.

The ledger is a table property, so it stays as it is when another process moves main to another snapshot (rollback,
cherry-pick, a replaced branch), and rows disappear. The summary of each snapshot that a ledger's commit appends has a
copy. So the newest copy in main's own history is that of the last such commit, which the evidence names by its
sequence. If it is another one, the table does not hold what the ledger says.

Snapshots of others (other exchanges, maintenance, other engines) have no copy. The search passes them. k2flow's own
carry the copy on before it could expire, see `carried_copies`. If the copies expire because other engines append many
snapshots, nothing can be compared, and nothing is refused.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Operation, Snapshot

from k2flow.errors import HeadMovedError
from k2flow.iceberg.ledger import KEY, CommittedRange, Evidence, Ledger, parse
from k2flow.iceberg.snapshots import KEEP_SNAPSHOTS, history

log = logging.getLogger(__name__)
AfterRollback = Literal["stop", "reread", "accept", "recompute", "restart"]
"""What to do with a table whose head was moved."""
CARRY_AFTER = KEEP_SNAPSHOTS // 2
"""Snapshots after a copy of a ledger until another one carries it on."""
CHERRY_PICKED = ("source-snapshot-id", "published-wap-id")
"""In the summary of a snapshot that another engine has picked from elsewhere: its rows are there, its copy is not."""


@dataclass(frozen=True)
class HeadCopy:
    """The newest copy of a ledger in main's history.

    `ledger` is None if there is none: `complete`: whether all of the history was there to look at. `age` counts
    the snapshots since the copy. `mixed`: one of these was picked from elsewhere, or the history without a copy has
    rows that no exchange committed, so what the table holds is not known.
    """

    ledger: Ledger | None
    complete: bool
    age: int = 0
    mixed: bool = False


def newest_copy(metadata: TableMetadata, exchange: str) -> HeadCopy:
    """Return the newest copy of an exchange's ledger in main's history. Raises CommitError if it is damaged."""
    mixed, foreign, age, oldest = False, False, 0, None
    for oldest in history(metadata):
        summary = _summary(oldest)
        if (text := summary.get(KEY + exchange)) is not None:
            return HeadCopy(parse(text, exchange), complete=True, age=age, mixed=mixed)
        mixed |= any(key in summary for key in CHERRY_PICKED)
        foreign |= _adds_rows(oldest) and not any(key.startswith(KEY) for key in summary)
        age += 1
    complete = oldest is None or _is_first(metadata, oldest)
    current = metadata.current_snapshot()
    rows = int(_summary(current).get("total-records", 0)) if current else 0
    return HeadCopy(None, complete, age, mixed=rows > 0 and (mixed or foreign or not complete))


def _is_first(metadata: TableMetadata, snapshot: Snapshot) -> bool:
    """Return whether a history begins with this snapshot, and not because the ones before it have expired.

    PyIceberg removes the parent of a snapshot when it expires the parent. A table that another program replaced has
    such a beginning too, and still the snapshots of before.
    """
    number = snapshot.sequence_number or 0
    earlier = any((each.sequence_number or 0) < number for each in metadata.snapshots)
    return snapshot.parent_snapshot_id is None and (number <= 1 or earlier)


def carried_copies(metadata: TableMetadata) -> dict[str, str]:
    """Return the copies that the next snapshot on main must carry on, lest they expire before their exchange commits.

    They come from main's own history, never from the properties: so they prove what main holds.
    """
    carried: dict[str, str] = {}
    wanted = {key for key in metadata.properties if key.startswith(KEY)}
    for age, snapshot in enumerate(history(metadata)):
        if not wanted:
            break
        for key in wanted & (summary := _summary(snapshot)).keys():
            wanted.remove(key)
            if age >= CARRY_AFTER:
                carried[key] = summary[key]
    return carried


def reconcile(
    name: str, metadata: TableMetadata, exchange: str, ledger: Ledger, after_rollback: AfterRollback = "stop"
) -> Ledger:
    """Return what table `name` holds: by its ledger or, if its head was moved, by what `after_rollback` says.

    - `stop`: HeadMovedError, which names the offsets of both.
    - `reread`: the offsets of the head's own snapshot. The flow reads from there again.
    - `accept`: the ledger's offsets; those without rows are `lost` in its evidence.
    - `recompute`: no offsets, for a table whose rows are all computed again from another one. The same if another
      program has changed its rows. `restart`: HeadMovedError in both cases.

    With neither `reread` nor `accept` does the flow read an offset whose rows the table has. Raises CommitError.
    """
    head = newest_copy(metadata, exchange)
    moved = _moved(metadata, exchange, ledger, head)
    if after_rollback in ("recompute", "restart"):
        if not moved and not _changed_by_others(metadata, exchange):
            return ledger
        what = f"main was moved: {_differences(ledger, head)}" if moved else "another program has changed its rows"
        if after_rollback == "restart":
            raise HeadMovedError(f"{name}: {what}: start again, to compute all its rows again")
        log.warning("%s: %s; all its rows are computed again", name, what)
        return replace(ledger, partitions={}, evidence=Evidence())
    if not moved:
        return ledger
    differences = _differences(ledger, head)
    if after_rollback == "stop" or (after_rollback == "reread" and head.mixed):
        raise HeadMovedError(_advice(name, exchange, differences, head))
    log.warning("%s: %s; continuing, as AFTER_ROLLBACK=%s says", name, differences, after_rollback)
    held = _of_head(ledger, head) if after_rollback == "reread" else _accepted(ledger, _of_head(ledger, head))
    return replace(
        held,
        writer_epoch=max(held.writer_epoch, ledger.writer_epoch),
        sequence=max(held.sequence, ledger.sequence),
        writer=ledger.writer,
        committed_at=max(held.committed_at, ledger.committed_at),
    )


def head_problem(metadata: TableMetadata, exchange: str, ledger: Ledger) -> str | None:
    """Return how the ledger and the head differ, None if they agree. Raises CommitError for a damaged copy."""
    head = newest_copy(metadata, exchange)
    return _differences(ledger, head) if _moved(metadata, exchange, ledger, head) else None


def _moved(metadata: TableMetadata, exchange: str, ledger: Ledger, head: HeadCopy) -> bool:
    """Return whether main's history does not hold the rows of exactly the offsets in the ledger."""
    copy = head.ledger
    if copy is None:
        return head.complete and bool(ledger.partitions)
    if (copy.topic_id, copy.partitions) == (ledger.topic_id, ledger.partitions):
        return False
    if copy.sequence >= ledger.sequence or not _extends(ledger, copy):
        return True
    if (appended := ledger.evidence.appended) is not None:
        return appended != copy.sequence
    # A version without evidence has committed last.
    return copy.writer_epoch != ledger.writer_epoch or _has_later_copy(metadata, exchange, copy, ledger)


def _extends(ledger: Ledger, copy: Ledger) -> bool:
    """Return whether commits without a snapshot can have led from `copy` to `ledger`."""
    if not _same_topic(copy, ledger):
        return False
    now = ledger.partitions
    return all(p in now and now[p].first == old.first and now[p].next >= old.next for p, old in copy.partitions.items())


def _has_later_copy(metadata: TableMetadata, exchange: str, copy: Ledger, ledger: Ledger) -> bool:
    """Return whether a snapshot outside main's history has a copy of the ledger that is later than `copy`."""
    main = {snapshot.snapshot_id for snapshot in history(metadata)}
    others = (
        _summary(snapshot).get(KEY + exchange) for snapshot in metadata.snapshots if snapshot.snapshot_id not in main
    )
    return any(copy.sequence < parse(text, exchange).sequence <= ledger.sequence for text in others if text)


def _of_head(ledger: Ledger, head: HeadCopy) -> Ledger:
    """Return the ledger of what the head holds, with the evidence that is still true."""
    held = head.ledger or Ledger(ledger.topic, ledger.topic_id, former_topics=ledger.former_topics)
    if not _same_topic(held, ledger):
        return held
    lost = {
        p: tuple(each for each in ranges if each[1] <= (held.next_offset(p) or 0))
        for p, ranges in ledger.evidence.lost.items()
    }
    return replace(
        held, evidence=Evidence(marks=ledger.evidence.marks, lost={p: each for p, each in lost.items() if each})
    )


def _accepted(ledger: Ledger, held: Ledger) -> Ledger:
    """Return the ledger with the rows that the head holds, and the offsets without rows as lost."""
    same_topic = _same_topic(held, ledger)
    partitions = dict(held.partitions) if same_topic else {}
    lost = dict(held.evidence.lost)
    for p, claimed in ledger.partitions.items():
        own = partitions.get(p, CommittedRange(claimed.first, claimed.first, 0))
        if claimed.next > own.next:
            lost[p] = (*lost.get(p, ()), (own.next, claimed.next))
        partitions[p] = replace(own, next=max(own.next, claimed.next))
    former = held.former_topics if same_topic else ledger.former_topics
    evidence = Evidence(marks=ledger.evidence.marks, lost=lost)
    topic_id = ledger.topic_id or held.topic_id
    return replace(ledger, topic_id=topic_id, partitions=partitions, former_topics=former, evidence=evidence)


def _differences(ledger: Ledger, head: HeadCopy) -> str:
    copy = head.ledger or Ledger(ledger.topic)
    if not _same_topic(copy, ledger) and copy.partitions:
        return "the head's snapshot is of an earlier topic of the same name"
    claimed, held = ledger.partitions, copy.partitions
    ends = [
        f"{ledger.topic}[{p}]: the ledger {_end(claimed.get(p))}, the head's snapshot {_end(held.get(p))}"
        for p in sorted(claimed.keys() | held.keys())
        if claimed.get(p) != held.get(p)
    ]
    return "; ".join(ends)


def _advice(name: str, exchange: str, differences: str, head: HeadCopy) -> str:
    setting = f"K2FLOW_{exchange.upper()}_AFTER_ROLLBACK"
    reread = f"set {setting}=reread for one start to read them from Kafka again"
    if head.mixed:
        reread = "set main to the snapshot that it had (reading again might duplicate rows of a foreign snapshot)"
    return (
        f"{name}: the table does not hold the rows of its ledger: {differences}. Its main branch was moved to another "
        f"snapshot, or its ledger was edited. Either {reread}, or set {setting}=accept to continue without these rows"
    )


def _end(held: CommittedRange | None) -> str:
    return "has no offsets" if held is None else f"ends before offset {held.next} ({held.rows} rows)"


def _same_topic(one: Ledger, other: Ledger) -> bool:
    """Return whether both ledgers are of the same topic. An unknown id counts as the same."""
    return not (one.topic_id and other.topic_id) or one.topic_id == other.topic_id


def _adds_rows(snapshot: Snapshot) -> bool:
    return snapshot.summary is None or snapshot.summary.operation in (Operation.APPEND, Operation.OVERWRITE)


def _changed_by_others(metadata: TableMetadata, exchange: str) -> bool:
    """Return whether a snapshot since the newest copy of an exchange's ledger has added or removed files.

    A replace changes no row. A snapshot with a copy of any ledger is k2flow's.
    """
    counts = ("added-data-files", "deleted-data-files", "added-delete-files", "removed-delete-files")
    for snapshot in history(metadata):
        summary = _summary(snapshot)
        if KEY + exchange in summary:
            return False
        replaces = snapshot.summary is not None and snapshot.summary.operation == Operation.REPLACE
        if not replaces and any(int(summary.get(count, 0)) for count in counts):
            return True
    return False


def _summary(snapshot: Snapshot) -> Mapping[str, str]:
    return snapshot.summary.additional_properties if snapshot.summary else {}
