"""Batches are gathered without gaps, end at the cap and at the ends of their partitions; when the tables commit."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2flow.flow.batch_buffer import BatchBuffer
from k2flow.flow.schedule import MAX_UNCOMMITTED_SECONDS, CommitSchedule
from k2flow.iceberg.ledger import Mark, OffsetRange
from k2flow.kafka.consumer import FetchedMessages
from k2flow.kafka.marks import checksum


def fetched(messages: list[tuple[int, int]]) -> FetchedMessages:
    """Return messages of these partitions and offsets; the time of offset o is o seconds."""
    offsets = np.array([o for _, o in messages], np.int64)
    text = pa.array([b"%d:%d" % each for each in messages], pa.binary())
    return FetchedMessages(
        partition=np.array([p for p, _ in messages], np.int32),
        offset=offsets,
        timestamp_ms=offsets * 1000,
        key=text,
        value=text,
        events=[],
    )


def buffer(offsets: dict[int, int], ends: dict[int, int] | None = None, rows: int = 100) -> BatchBuffer:
    made = BatchBuffer(rows, 1 << 20)
    made.begin(offsets, ends or {})
    return made


def test_batch_has_the_rows_and_the_ranges_of_what_was_added() -> None:
    gathered = buffer({0: 5, 1: 0, 2: 7})
    assert gathered.add(fetched([(0, 5), (1, 0), (0, 8)])) == {0: 8_000, 1: 0}
    assert gathered.add(fetched([(1, 1)])) == {1: 1_000}
    batch = gathered.take(ends_checkpoint=False)
    assert batch.offsets == [(0, 5, 9), (1, 0, 2)]
    assert batch.rows["value"].to_pylist() == [b"0:5", b"1:0", b"0:8", b"1:1"]
    assert batch.offset.tolist() == [5, 0, 8, 1]
    assert not batch.ends_checkpoint
    assert gathered.rows == gathered.nbytes == 0
    assert gathered.take(ends_checkpoint=True).offsets == []


def test_marks_are_the_last_messages_of_each_range() -> None:
    gathered = buffer({0: 5, 1: 0, 2: 7})
    gathered.begin({}, {}, {2: Mark(6, 0, "before")})
    gathered.add(replace(fetched([(0, 5), (1, 0), (0, 8)]), leader_epoch={0: 3}))
    at_8 = Mark(8, 8_000, checksum(b"0:8", b"0:8"), 3)
    assert gathered.marks() == {0: at_8, 1: Mark(0, 0, checksum(b"1:0", b"1:0")), 2: Mark(6, 0, "before")}
    gathered.add(fetched([(1, 1)]))
    at_1 = Mark(1, 1_000, checksum(b"1:1", b"1:1"))
    assert gathered.take(ends_checkpoint=False).marks == {0: at_8, 1: at_1}
    gathered.skip_to(0, 12)
    assert gathered.take(ends_checkpoint=True).ranges() == [OffsetRange(0, 9, 12, 0)]
    assert gathered.marks() == {0: at_8, 1: at_1, 2: Mark(6, 0, "before")}


def test_messages_after_the_end_have_no_mark() -> None:
    gathered = buffer({0: 5}, ends={0: 7})
    gathered.add(fetched([(0, 5), (0, 6), (0, 7)]))
    assert gathered.take(ends_checkpoint=True).marks[0].offset == 6


def test_null_and_empty_have_other_checksums() -> None:
    sums = {checksum(key, value) for key in (None, b"", b"a") for value in (None, b"", b"a")}
    assert len(sums) == 9


def test_messages_after_the_end_are_left_out() -> None:
    gathered = buffer({0: 5, 1: 0}, ends={0: 7, 1: 4})
    gathered.add(fetched([(0, 5), (0, 6), (0, 7), (1, 3)]))
    assert gathered.at_end(0)
    assert gathered.all_at_end
    batch = gathered.take(ends_checkpoint=True)
    assert batch.offsets == [(0, 5, 7), (1, 0, 4)]
    assert batch.rows.num_rows == 3


def test_message_after_the_end_shows_that_the_end_is_reached() -> None:
    """If the last offsets before the end are transaction markers, a busy topic may never report the end of its log."""
    gathered = buffer({0: 5, 1: 0}, ends={0: 8, 1: 4})
    gathered.add(fetched([(0, 5), (1, 2)]))
    assert not gathered.at_end(0)
    assert gathered.add(fetched([(0, 8), (1, 3), (1, 5)])) == {1: 3_000}
    assert gathered.all_at_end
    assert gathered.take(ends_checkpoint=True).offsets == [(0, 5, 8), (1, 0, 4)]


def test_end_of_a_log_moves_the_position_without_messages() -> None:
    """Transaction markers and compacted offsets; not past the end to stop at, and never back."""
    gathered = buffer({0: 5, 1: 0}, ends={1: 3})
    gathered.skip_to(0, 9)
    gathered.skip_to(1, 8)
    gathered.skip_to(0, 2)
    batch = gathered.take(ends_checkpoint=True)
    assert batch.offsets == [(0, 5, 9), (1, 0, 3)]
    assert batch.rows.num_rows == 0
    assert gathered.all_at_end


@pytest.mark.parametrize(("rows", "max_bytes", "full"), [(3, 1 << 20, False), (2, 1 << 20, True), (3, 1, True)])
def test_cap_of_rows_or_bytes(rows: int, max_bytes: int, full: bool) -> None:
    gathered = BatchBuffer(rows, max_bytes)
    gathered.begin({0: 0}, {})
    gathered.add(fetched([(0, 0), (0, 1)]))
    assert gathered.full == full
    assert gathered.free_rows == rows - 2


@given(st.lists(st.tuples(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=5), st.booleans())))
def test_batches_cover_every_offset_once(steps: list[tuple[list[tuple[int, int]], bool]]) -> None:
    gathered, position = buffer(dict.fromkeys(range(3), 10)), dict.fromkeys(range(3), 10)
    batches, sent = [], []
    for messages, take in steps:
        added = []
        for p, gap in messages:
            position[p] += gap
            added.append((p, position[p] - 1))
        gathered.add(fetched(added))
        sent += added
        if take:
            batches.append(gathered.take(ends_checkpoint=False))
    batches.append(gathered.take(ends_checkpoint=True))
    reached = dict.fromkeys(range(3), 10)
    for batch in batches:
        for p, first, end in batch.offsets:
            assert first == reached[p] < end
            reached[p] = end
    assert reached == position
    found = [pair for batch in batches for pair in zip(batch.partition.tolist(), batch.offset.tolist(), strict=True)]
    assert found == sent


def test_triggers_are_whole_multiples() -> None:
    schedule = CommitSchedule(10, 4, now=1_003.2)
    assert schedule.due == 1_010
    schedule.on_emit(ends_checkpoint=True, now=1_010.0)
    assert schedule.due == 1_020


def test_clock_set_back_delays_no_commit() -> None:
    schedule = CommitSchedule(10, 4, now=1_003.0)
    assert schedule.seconds_left(1_003.0) == 7
    assert schedule.seconds_left(1_000.5) == 9.5
    assert schedule.seconds_left(403.0) == 7  # ten minutes back
    assert schedule.seconds_left(9_999.0) < 0
    slow = CommitSchedule(3_600, 4, now=5_000.0)
    slow.on_emit(ends_checkpoint=False, now=5_000.0)
    assert slow.seconds_left(4_400.0) == MAX_UNCOMMITTED_SECONDS


def test_full_batches_share_a_commit() -> None:
    schedule, ends = CommitSchedule(3_600, 4, now=0), []
    for _ in range(9):
        ends.append(schedule.full_batch_ends_checkpoint)
        schedule.on_emit(ends[-1], now=1)
    assert ends == [False, False, False, True] * 2 + [False]


def test_uncommitted_batch_does_not_wait_for_a_distant_trigger() -> None:
    schedule = CommitSchedule(3_600, 100, now=7.0)
    schedule.on_emit(ends_checkpoint=False, now=100.0)
    schedule.on_emit(ends_checkpoint=False, now=105.0)
    assert schedule.due == 100.0 + MAX_UNCOMMITTED_SECONDS
    assert schedule.uncommitted == 2
    schedule.on_emit(ends_checkpoint=True, now=110.0)
    assert (schedule.uncommitted, schedule.due) == (0, 3_600)
