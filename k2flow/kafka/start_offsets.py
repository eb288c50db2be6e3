"""The offsets at which a flow begins: where its tables end, if Kafka still has those offsets."""

import logging
from collections.abc import Collection, Mapping

from k2flow.errors import LostOffsetsError
from k2flow.iceberg.ledger import Ledger, start_offsets
from k2flow.kafka.topic import Topic

log = logging.getLogger(__name__)


def check_same_topic(topic: Topic, ledgers: Mapping[str, Ledger], accept_lost: bool, setting: str) -> None:
    """Check that each table's ledger is of this very topic, not of a deleted one with the same name.

    If it is not, the rest of the earlier topic is lost. Raises LostOffsetsError unless `setting` accepts that.
    """
    for table, ledger in ledgers.items():
        if not topic.same_as(ledger.topic_id) and not accept_lost:
            ends = ", ".join(f"[{p}] before {e.next}" for p, e in sorted(ledger.partitions.items()))
            raise LostOffsetsError(
                f"topic {topic.name} was deleted and created again: {table} holds the old topic's partitions {ends}; "
                "the rest of the old topic is lost. To continue with the new topic from its first offset set "
                f"{setting}=1 for one start"
            )


def begin_offsets(topic: Topic, ledgers: Mapping[str, Ledger]) -> dict[int, int]:
    """Return the smallest next offset over all tables, by partition. Offsets of an earlier topic do not count."""
    return start_offsets(map(topic.held, ledgers.values()))


def ends_in_replaced_log(
    topic: Topic, ledgers: Mapping[str, Ledger], partitions: Collection[int]
) -> dict[str, dict[int, int]]:
    """Return where each table continues in the partitions whose log was replaced; only tables that must still begin it.

    All tables continue where the furthest one ends: none has a row of an offset from there on, so no row is duplicated,
    and all read the same messages. If a process died while the loss was accepted, some tables have begun with the new
    log: they have one former log more than the others, which continue where those began.
    """
    held = {name: topic.held(ledger) for name, ledger in ledgers.items()}
    ends: dict[str, dict[int, int]] = {name: {} for name in held}
    for p in partitions:
        logs = {name: _former_logs(ledger, p) for name, ledger in held.items()}
        begun = [ledger.partitions[p].first for name, ledger in held.items() if logs[name] > min(logs.values())]
        end = min(begun) if begun else max(ledger.next_offset(p) or 0 for ledger in held.values())
        for name in held:
            if logs[name] == min(logs.values()):
                ends[name][p] = end
    return ends


def _former_logs(ledger: Ledger, partition: int) -> int:
    return sum(each.topic_id == ledger.topic_id and partition in each.partitions for each in ledger.former_topics)


def first_offset(
    topic: Topic, partition: int, wanted: int | None, low: int, high: int, accept_lost: bool, setting: str
) -> int:
    """Return the offset at which to begin a partition: `wanted`, where the tables end, or `low` if never read (None).

    Kafka has the committed offsets [low, high). With `accept_lost`, skip those it no longer has. Otherwise raise
    LostOffsetsError, which names the exact offsets and the variable `setting` that accepts their loss.
    """
    if wanted is None:
        return low
    if low <= wanted <= high:
        return wanted
    where = f"{topic.name}[{partition}]"
    if wanted > high:
        raise LostOffsetsError(
            f"{where}: the tables end before offset {wanted} but the topic ends before {high}: it was created again or "
            "truncated. Restore the topic, or write to new tables"
        )
    if not accept_lost:
        raise LostOffsetsError(
            f"{where}: offsets {wanted} to {low - 1} ({low - wanted} of them) were never committed and Kafka "
            f"no longer has them. To continue without them set {setting}=1 for one start"
        )
    log.error("%s: offsets %d to %d are lost; continuing, as %s says", where, wanted, low - 1, setting)
    return low
