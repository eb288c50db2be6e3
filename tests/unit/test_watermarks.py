"""Watermark alignment: which partitions pause, and until when."""

import numpy as np
import pytest

from k2flow.flow.watermarks import IDLE_TIMEOUT_SECONDS, MAX_WATERMARK_DRIFT_MS, WatermarkAlignment


@pytest.fixture
def alignment() -> WatermarkAlignment:
    """Partition 0 is last, 1 is at the maximum drift, 2 exceeds it."""
    alignment = WatermarkAlignment()
    for partition, time_ms in enumerate((0, MAX_WATERMARK_DRIFT_MS, MAX_WATERMARK_DRIFT_MS + 1)):
        alignment.on_message(partition, time_ms, now=0)
    return alignment


def test_partition_ahead_pauses_until_the_last_catches_up(alignment: WatermarkAlignment) -> None:
    assert alignment.decide(0) == ({2}, set())
    assert alignment.decide(0) == (set(), set())
    alignment.on_message(0, MAX_WATERMARK_DRIFT_MS, now=1)
    assert alignment.decide(1) == (set(), set())
    alignment.on_message(0, MAX_WATERMARK_DRIFT_MS + 1, now=1)
    alignment.on_message(1, MAX_WATERMARK_DRIFT_MS + 1, now=1)
    assert alignment.decide(1) == (set(), {2})


def test_partition_at_its_end_is_not_behind(alignment: WatermarkAlignment) -> None:
    alignment.on_end(0)
    assert alignment.decide(0) == (set(), set())
    alignment.on_message(0, 0, now=0)
    assert alignment.decide(0) == ({2}, set())


def test_paused_partition_resumes_when_the_others_end(alignment: WatermarkAlignment) -> None:
    alignment.decide(0)
    alignment.on_end(0)
    alignment.on_end(1)
    assert alignment.decide(60) == (set(), {2})


def test_idle_partition_holds_no_other_back(alignment: WatermarkAlignment) -> None:
    alignment.decide(0)
    alignment.on_message(1, MAX_WATERMARK_DRIFT_MS + 1, now=IDLE_TIMEOUT_SECONDS)
    assert alignment.decide(IDLE_TIMEOUT_SECONDS) == (set(), {2})


def test_resumed_partition_is_active_again(alignment: WatermarkAlignment) -> None:
    alignment.decide(0)
    alignment.on_end(0)
    alignment.on_end(1)
    alignment.decide(100)
    alignment.on_message(1, 0, now=100)
    assert alignment.decide(100) == ({2}, set())


def test_messages_without_a_time_change_nothing() -> None:
    alignment = WatermarkAlignment()
    alignment.on_message(0, -1, now=0)
    alignment.on_message(1, MAX_WATERMARK_DRIFT_MS * 2, now=0)
    alignment.on_end(2)
    assert alignment.decide(0) == (set(), set())


@pytest.mark.parametrize("seed", range(20))
def test_skewed_partitions_all_reach_their_ends(seed: int) -> None:
    """All are read equally. None is ever further ahead than the drift and one read."""
    chance = np.random.default_rng(seed)
    step = chance.integers(1, MAX_WATERMARK_DRIFT_MS, 5)  # the time that one read of each partition covers
    end = 20 * MAX_WATERMARK_DRIFT_MS
    alignment, reached, aside, now = WatermarkAlignment(), np.zeros(5, np.int64), set[int](), 0.0
    while (reached < end).any():
        reading = [p for p in range(5) if p not in aside and reached[p] < end]
        assert reading
        for p in reading:
            now += 0.01
            reached[p] += step[p]
            alignment.on_message(p, int(reached[p]), now)
            if reached[p] >= end:
                alignment.on_end(p)
        if len(reading) > 1:
            assert (
                reached[reading].max() - reached[reached < end].min(initial=end)
                <= 2 * MAX_WATERMARK_DRIFT_MS + step.max()
            )
        ahead, again = alignment.decide(now)
        aside = (aside | set(ahead)) - set(again)
