"""Parts of a partition's log that cannot be read as they were written: bytes have changed on the broker's disk.

librdkafka checks the checksum of each batch (`check.crcs`). It reports a batch that fails, skips it and reads on. So
nothing behind such an event may be used. The checksum does not cover a batch's first offset. If that has changed, the
batch's offsets go back, or lie behind the end of the log. If they do neither, the damage looks the same as offsets
that have no message: transaction markers, aborted messages, and messages that compaction has removed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.errors import KafkaError
from k2flow.kafka.consumer import FetchedMessages, Int64s, PartitionEvent
from k2flow.retryable import Verdict, kafka_verdict


@dataclass(frozen=True)
class Damage:
    """The first offset of a partition that cannot be read, and what is wrong there."""

    partition: int
    offset: int
    text: str


def split_damage(
    fetched: FetchedMessages, position: Mapping[int, int], log_end: Callable[[int], int | None]
) -> tuple[FetchedMessages, list[Damage]]:
    """Return what can be used of `fetched`, and the damage in each of its partitions.

    `position` has the next offset of each partition; `log_end` returns the offset after a partition's last one, if it
    is known.
    """
    reported = {e.partition: e for e in reversed(fetched.events) if kafka_verdict(e.code) is Verdict.DAMAGED}
    found = []
    keep: npt.NDArray[np.bool_] | None = None
    for p in sorted({*reported, *fetched.leader_epoch}):
        at = np.flatnonzero(fetched.partition == p)
        damage = _first_damage(p, fetched.offset[at], at, reported.get(p), position[p], log_end)
        if damage is None:
            continue
        found.append(damage)
        keep = np.ones(len(fetched), np.bool_) if keep is None else keep
        keep[at[fetched.offset[at] >= damage.offset]] = False
        if p in reported:
            keep[at[at >= reported[p].after]] = False
    if keep is None:
        return fetched, []
    return _filtered(fetched, keep, {each.partition for each in found}), found


def damage_error(topic: str, damages: Iterable[Damage], setting: str) -> KafkaError:
    """Return the error to raise; `setting` accepts the loss of offsets that Kafka no longer has."""
    where = "; ".join(
        f"{topic}[{each.partition}]: offset {each.offset} cannot be read ({each.text})" for each in damages
    )
    return KafkaError(
        f"{where}: Kafka's log is damaged there, and nothing behind it is read. Have Kafka restore the partition from "
        "another replica and start again. To continue without the damaged messages, delete the records up to their end "
        f"(kafka-delete-records) and set {setting}=1 for one start"
    )


def _first_damage(
    partition: int,
    offsets: Int64s,
    at: npt.NDArray[np.intp],
    event: PartitionEvent | None,
    position: int,
    log_end: Callable[[int], int | None],
) -> Damage | None:
    """Return the damage in one partition, whose `offsets` are `at` these places of the messages fetched."""
    before = np.concatenate([[position - 1], offsets[:-1]]) if len(offsets) else offsets
    steps = offsets - before
    end = log_end(partition) if (steps > 1).any() else None
    wrong = np.flatnonzero((steps < 1) | ((steps > 1) & (offsets >= end) if end is not None else False))
    if len(wrong) and (event is None or at[wrong[0]] < event.after):
        i = int(wrong[0])
        offset, last = int(offsets[i]), int(before[i])
        if steps[i] < 1:
            return Damage(partition, offset, f"a message with offset {offset} follows offset {last}")
        return Damage(partition, last + 1, f"offset {offset} follows, but the log ends before {end}")
    if event is None:
        return None
    read = offsets[at < event.after]
    return Damage(partition, int(read[-1]) + 1 if len(read) else position, event.text)


def _filtered(fetched: FetchedMessages, keep: npt.NDArray[np.bool_], damaged: set[int]) -> FetchedMessages:
    mask = pa.array(keep)
    partition = fetched.partition[keep]
    left = set(np.unique(partition).tolist())
    return replace(
        fetched,
        partition=partition,
        offset=fetched.offset[keep],
        timestamp_ms=fetched.timestamp_ms[keep],
        key=fetched.key.filter(mask),
        value=fetched.value.filter(mask),
        events=[each for each in fetched.events if each.partition not in damaged],
        leader_epoch={p: epoch for p, epoch in fetched.leader_epoch.items() if p in left},
    )
