"""Keeps the partitions of a topic near each other in time while they catch up.

Kafka gives each partition about as much as the next, however much each holds. Left to itself a small partition would be
read to its end while a large one is still hours behind: rows of ever more hours would come together, into ever more
files, and the large partition's would be older than Gold's window of deduplication by the time they come. So those that
are ahead are set aside until the others have come as far (the watermark alignment of Flink's sources, FLIP-182).
"""

from collections.abc import Collection
from dataclasses import dataclass

MAX_WATERMARK_DRIFT_MS = 1_800_000
"""How far in Kafka's time a partition may be ahead of the one that is last."""
IDLE_TIMEOUT_SECONDS = 5.0
"""A partition from which nothing has come for so long (its broker may be down) is not waited for."""


@dataclass
class _Partition:
    time_ms: int  # Kafka's time of the message that was read last
    at: float  # when it came, in seconds of a monotonic clock
    at_end: bool = False


class WatermarkAlignment:
    """The partitions of one worker; which to set aside and which to take up again `decide` tells."""

    def __init__(self) -> None:
        self._known: dict[int, _Partition] = {}
        self._aside: set[int] = set()

    def read(self, partition: int, time_ms: int, now: float) -> None:
        """A message of this time was read, and it is not known to be the last. Without a time (-1) it tells nothing."""
        if time_ms >= 0:
            self._known[partition] = _Partition(time_ms, now)

    def ended(self, partition: int) -> None:
        """All there is of this partition was read, so it is not behind."""
        if partition in self._known:
            self._known[partition].at_end = True

    def decide(self, now: float) -> tuple[Collection[int], Collection[int]]:
        """The partitions to set aside, which are MAX_WATERMARK_DRIFT_MS ahead, and those to take up again, which no longer are.

        One that was set aside comes back only when the last one has passed it, so that neither happens often.
        """
        waiting = {
            partition: known.time_ms
            for partition, known in self._known.items()
            if partition in self._aside or (not known.at_end and now - known.at < IDLE_TIMEOUT_SECONDS)
        }
        last = min((time_ms for partition, time_ms in waiting.items() if partition not in self._aside), default=None)
        if last is None:  # those that were waited for are at their ends, or silent
            last = min(waiting.values(), default=0)
        ahead = {p for p, time_ms in waiting.items() if time_ms > last + MAX_WATERMARK_DRIFT_MS} - self._aside
        again = {p for p in self._aside if waiting[p] <= last}
        for p in again:
            self._known[p].at = now
        self._aside = (self._aside | ahead) - again
        return ahead, again
