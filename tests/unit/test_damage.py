"""A damaged log is read up to the damage and not a message further."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka import KafkaError as ConfluentError
from hypothesis import given
from hypothesis import strategies as st

from k2flow.flow.batch_buffer import BatchBuffer
from k2flow.flow.stalls import STALL_SECONDS, StallWatch
from k2flow.kafka.consumer import FetchedMessages, PartitionEvent
from k2flow.kafka.damage import Damage, damage_error, split_damage

EOF = ConfluentError._PARTITION_EOF
BAD = ConfluentError._BAD_MSG


def fetched(messages: Sequence[tuple[int, int]], *events: PartitionEvent) -> FetchedMessages:
    offsets = np.array([o for _, o in messages], np.int64)
    text = pa.array([b"%d:%d" % each for each in messages], pa.binary())
    partition = np.array([p for p, _ in messages], np.int32)
    epochs = dict.fromkeys(partition.tolist(), 3)
    return FetchedMessages(
        partition=partition, offset=offsets, timestamp_ms=offsets, key=text, value=text, events=[*events],
        leader_epoch=epochs,
    )  # fmt: skip


def event(code: int, partition: int, offset: int, after: int) -> PartitionEvent:
    return PartitionEvent(code=code, text="CRC", partition=partition, offset=offset, after=after)


def places(messages: FetchedMessages) -> list[tuple[int, int]]:
    return list(zip(messages.partition.tolist(), messages.offset.tolist(), strict=True))


@pytest.mark.parametrize(
    "code",
    [
        BAD, ConfluentError._BAD_COMPRESSION, ConfluentError._NOT_IMPLEMENTED, ConfluentError.INVALID_MSG,
        ConfluentError.INVALID_RECORD, ConfluentError.MSG_SIZE_TOO_LARGE,
    ],
)  # fmt: skip
def test_nothing_behind_a_bad_batch_is_used(code: int) -> None:
    """Librdkafka skips the batch, gives the next ones, and reports the end of the log."""
    got = fetched(
        [(0, 5), (1, 0), (0, 6), (0, 12), (1, 1)], event(code, 0, 7, 3), event(EOF, 0, 13, 5), event(EOF, 1, 2, 5)
    )
    left, damages = split_damage(got, {0: 5, 1: 0}, lambda _: 100)
    assert places(left) == [(0, 5), (1, 0), (0, 6), (1, 1)]
    assert left.value.to_pylist() == [b"0:5", b"1:0", b"0:6", b"1:1"]
    assert [(each.partition, each.code) for each in left.events] == [(1, EOF)]
    assert damages == [Damage(0, 7, "CRC")]


def test_a_bad_batch_at_the_position_is_damage_there() -> None:
    left, damages = split_damage(fetched([], event(BAD, 2, 1 << 60, 0)), {2: 40}, lambda _: None)
    assert len(left) == 0
    assert damages == [Damage(2, 40, "CRC")]
    error = damage_error("trades", damages, "K2FLOW_X_ACCEPT_LOST_OFFSETS")
    assert str(error).startswith("trades[2]: offset 40 cannot be read (CRC): ")
    assert "K2FLOW_X_ACCEPT_LOST_OFFSETS=1" in str(error)
    assert not error.retryable


def test_offsets_that_go_back_are_damage() -> None:
    """A batch with a smaller first offset than it was written with; its checksum does not cover it."""
    left, damages = split_damage(fetched([(0, o) for o in (12, 13, 14, 14, 15, 20)]), {0: 12}, lambda _: 100)
    assert places(left) == [(0, 12), (0, 13)]
    assert [(each.partition, each.offset) for each in damages] == [(0, 14)]


def test_offsets_behind_the_end_of_the_log_are_damage() -> None:
    left, damages = split_damage(fetched([(0, 14), (0, 79), (0, 80)]), {0: 14}, lambda _: 40)
    assert places(left) == [(0, 14)]
    assert damages == [Damage(0, 15, "offset 79 follows, but the log ends before 40")]


def test_a_batch_that_moved_on_is_found_by_the_one_after_it() -> None:
    left, damages = split_damage(fetched([(0, 14), (0, 79), (0, 80), (0, 20)]), {0: 14}, lambda _: 100)
    assert places(left) == [(0, 14)]
    assert [(each.partition, each.offset) for each in damages] == [(0, 20)]


def test_buffer_takes_back_what_is_behind_the_damage() -> None:
    buffer = BatchBuffer(100, 1 << 20)
    buffer.begin({0: 10, 1: 0}, {})
    buffer.add(fetched([(0, 10), (1, 0), (0, 79)]))
    buffer.drop_from(0, 20)
    batch = buffer.take(ends_checkpoint=True)
    assert batch.offsets == [(0, 10, 11), (1, 0, 1)]
    assert batch.offset.tolist() == [10, 0]
    buffer.drop_from(0, 5)  # a batch has it already
    assert buffer.position[0] == 11


@given(st.data())
def test_a_log_without_damage_is_used_whole(data: st.DataObject) -> None:
    """Gaps are legal: transaction markers and compaction leave them."""
    logs = {p: sorted(data.draw(st.sets(st.integers(50, 90)))) for p in range(3)}
    order = data.draw(st.permutations([p for p, offsets in logs.items() for _ in offsets]))
    pending = {p: iter(offsets) for p, offsets in logs.items()}
    got = fetched([(p, next(pending[p])) for p in order], event(EOF, 0, 91, len(order)))
    left, damages = split_damage(got, dict.fromkeys(range(3), 50), lambda _: 91)
    assert (places(left), left.events, damages) == (places(got), got.events, [])


def test_a_partition_that_gives_nothing_is_named_once_a_minute() -> None:
    watch = StallWatch()
    for p in range(3):
        watch.on_read(p, 0)
    watch.on_pause(1)
    watch.on_error(2, "Topic authorization failed", 10)
    assert watch.overdue(STALL_SECONDS - 1) == []
    assert watch.overdue(STALL_SECONDS) == [(0, STALL_SECONDS, ""), (2, STALL_SECONDS, "Topic authorization failed")]
    assert watch.overdue(STALL_SECONDS + 1) == []
    watch.on_read(2, STALL_SECONDS + 2)
    assert watch.overdue(2 * STALL_SECONDS) == [(0, 2 * STALL_SECONDS, "")]


def test_an_error_of_a_partition_at_its_end_counts() -> None:
    watch = StallWatch()
    watch.on_pause(0)
    watch.on_error(0, "refused", 5)
    assert watch.overdue(5 + STALL_SECONDS) == [(0, STALL_SECONDS, "refused")]
