"""Watermark alignment: keeps the partitions of a topic near each other in time while they catch up.

Kafka delivers about as much from each partition, however much each holds. Without alignment a small partition would be
read to its end while a large one is still hours behind. Rows of more and more hours would come together, into more and
more files. And the large partition's rows would come later than Gold's deduplication window. So partitions that are
ahead pause until the others have caught up (watermark alignment of Flink's sources, FLIP-182).
"""

from collections.abc import Collection
from dataclasses import dataclass

MAX_WATERMARK_DRIFT_MS = 1_800_000  # how far in Kafka's time a partition may be ahead of the last one
IDLE_TIMEOUT_SECONDS = 5.0
"""A partition without a message for this long (its broker may be down) does not hold the others back."""


@dataclass
class _Watermark:
    time_ms: int  # Kafka's time of the last message
    received_at: float  # in seconds of a monotonic clock
    at_end: bool = False


class WatermarkAlignment:
    """The watermarks of one worker's partitions. `decide` says which to pause and which to resume."""

    def __init__(self) -> None:
        self._watermarks: dict[int, _Watermark] = {}
        self._paused: set[int] = set()

    def on_message(self, partition: int, time_ms: int, now: float) -> None:
        """Note a message with this time. One without a time (-1) changes nothing."""
        if time_ms >= 0:
            self._watermarks[partition] = _Watermark(time_ms, now)

    def on_end(self, partition: int) -> None:
        """Note that this partition is read to its end, so it is not behind."""
        if partition in self._watermarks:
            self._watermarks[partition].at_end = True

    def is_at_end(self, partition: int) -> bool:
        """Return whether this partition was read to its end: its next message is a fresh one."""
        watermark = self._watermarks.get(partition)
        return watermark is not None and watermark.at_end

    def is_paused(self, partition: int) -> bool:
        """Return whether this partition is not read now."""
        return partition in self._paused

    def decide(self, now: float) -> tuple[Collection[int], Collection[int]]:
        """Return the partitions to pause, which are MAX_WATERMARK_DRIFT_MS ahead, and those to resume.

        A paused partition resumes only when the last one has passed it, so that neither happens often.
        """
        active = {
            partition: watermark.time_ms
            for partition, watermark in self._watermarks.items()
            if partition in self._paused
            or (not watermark.at_end and now - watermark.received_at < IDLE_TIMEOUT_SECONDS)
        }
        last = min((time_ms for partition, time_ms in active.items() if partition not in self._paused), default=None)
        if last is None:  # all others are at their ends, or idle
            last = min(active.values(), default=0)
        pause = {p for p, time_ms in active.items() if time_ms > last + MAX_WATERMARK_DRIFT_MS} - self._paused
        resume = {p for p in self._paused if active[p] <= last}
        for p in resume:
            self._watermarks[p].received_at = now
        self._paused = (self._paused | pause) - resume
        return pause, resume
