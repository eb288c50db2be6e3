"""Partitions that give no message although their log does not end there: refused, unreachable or damaged."""

STALL_SECONDS = 60.0


class StallWatch:
    """Knows since when each partition has given nothing. Times are of a monotonic clock."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}  # of the partitions that are not read to their end
        self._refusals: dict[int, str] = {}
        self._warned: dict[int, float] = {}

    def on_read(self, partition: int, now: float) -> None:
        """Note that a partition is read from here on, or has just given a message."""
        self._since[partition] = self._warned[partition] = now
        self._refusals.pop(partition, None)

    def on_error(self, partition: int, text: str, now: float) -> None:
        """Note that Kafka has refused to give the next message of a partition."""
        self._since.setdefault(partition, now)
        self._warned.setdefault(partition, now)
        self._refusals[partition] = text

    def on_pause(self, partition: int) -> None:
        """Note that a partition is read to its end, or is not read now."""
        for known in (self._since, self._refusals, self._warned):
            known.pop(partition, None)

    def overdue(self, now: float) -> list[tuple[int, float, str]]:
        """Return each partition that has given nothing for STALL_SECONDS, since when, and Kafka's last refusal.

        Each is returned again every STALL_SECONDS.
        """
        found = []
        for p, since in self._since.items():
            if now - self._warned[p] >= STALL_SECONDS:
                self._warned[p] = now
                found.append((p, now - since, self._refusals.get(p, "")))
        return found
