"""How long a source waits while an epoch is committed."""

from datetime import UTC, datetime, timedelta

import pytest

from k2flow.flow.batch_buffer import BatchBuffer
from k2flow.flow.schedule import MAX_WAIT, CommitSchedule, EpochBackoff
from k2flow.flow.source import KafkaSourcePartition

START = datetime(2026, 11, 24, tzinfo=UTC)


def epoch(backoff: EpochBackoff, seconds: float) -> tuple[float, float]:
    """Run an epoch of `seconds`. Return how long the source waited, and how long Bytewax was then busy waiting."""
    away = backoff.on_emit(START)
    called = max(START + away, START + timedelta(seconds=seconds))
    backoff.on_wake(called)
    return away.total_seconds(), (called - START - away).total_seconds()


def test_first_epoch_has_no_wait() -> None:
    assert epoch(EpochBackoff(), 1.0) == (0.0, 1.0)


def test_equal_epochs_leave_little_busy_waiting() -> None:
    backoff = EpochBackoff()
    epoch(backoff, 1.0)
    for _ in range(20):
        away, in_vain = epoch(backoff, 1.0)
        assert away < 1.0
        assert in_vain == pytest.approx(0.05)


def test_one_slow_commit_does_not_delay_the_next() -> None:
    backoff = EpochBackoff()
    for _ in range(3):
        epoch(backoff, 0.2)
    epoch(backoff, 30.0)
    assert epoch(backoff, 0.2)[0] < 0.2


def test_wait_adapts_to_shorter_epochs() -> None:
    backoff = EpochBackoff()
    for _ in range(3):
        epoch(backoff, 4.0)
    lengths = [epoch(backoff, 0.1)[0] for _ in range(30)]
    assert lengths[-1] < 0.1
    assert sum(away > 0.1 for away in lengths) < 22


def test_wait_is_bounded() -> None:
    backoff = EpochBackoff()
    epoch(backoff, 600.0)
    assert backoff.on_emit(START) == MAX_WAIT


def test_wake_without_a_batch_changes_nothing() -> None:
    backoff = EpochBackoff()
    epoch(backoff, 1.0)
    backoff.on_wake(START + timedelta(seconds=50))
    assert backoff.on_emit(START) == timedelta(seconds=0.95)


def test_idle_source_does_not_wait_for_an_epoch() -> None:
    """It emits nothing at a trigger, so no epoch ends, and a stop must not wait for one."""
    source = KafkaSourcePartition.__new__(KafkaSourcePartition)
    source._buffer = BatchBuffer(100, 1 << 20)
    source._buffer.begin({0: 5}, {})
    source._schedule = CommitSchedule(10, 10, START.timestamp())
    source._backoff = EpochBackoff()
    epoch(source._backoff, 4.0)
    source._awake_at = START
    assert source._emit(ends_checkpoint=True) == []
    assert source._awake_at == START
