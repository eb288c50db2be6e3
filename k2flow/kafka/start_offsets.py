"""The offsets at which a flow begins: where its tables end, if Kafka still has those offsets."""

import logging
from collections.abc import Mapping

from k2flow.errors import LostOffsetsError
from k2flow.iceberg.ledger import Ledger, start_offsets
from k2flow.kafka.topic import Topic

log = logging.getLogger(__name__)


def check_same_topic(topic: Topic, ledgers: Mapping[str, Ledger], accept_lost: bool, setting: str) -> None:
    """Check that each table's ledger is of this very topic, not of a deleted one with the same name.

    Raises:
        LostOffsetsError: A ledger is of an earlier topic, and the loss of its rest is not accepted by `setting`.
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


def first_offset(
    topic: Topic, partition: int, wanted: int | None, low: int, high: int, accept_lost: bool, setting: str
) -> int:
    """Return the offset at which to begin a partition.

    Args:
        topic: The topic.
        partition: The partition to begin.
        wanted: The offset at which the tables end, or None for a partition never read.
        low: The first offset that Kafka has.
        high: The offset that the next committed message will get.
        accept_lost: Whether to skip offsets that Kafka no longer has.
        setting: The variable that accepts this loss, for the error.

    Raises:
        LostOffsetsError: Kafka does not have `wanted`, and the loss is not accepted. It names the exact offsets.
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
