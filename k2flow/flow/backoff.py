"""How long a source waits while its epoch is written and committed."""

from collections import deque
from datetime import datetime, timedelta

WAIT_SHARE = 0.95
"""Share of the expected duration to wait, so that a shorter epoch is not overslept by much."""
PROMPT_WAKE_FACTOR = 1.02
"""A wake-up within this multiple of the wait: the epoch was already over, for an unknown time."""
OVERSLEPT_SHARE = 0.7
"""Share of the wait to expect next, after an epoch that was already over."""
MAX_WAIT = timedelta(seconds=5)


class EpochBackoff:
    """Decides how long Bytewax need not call a source that has emitted a batch.

    From the moment that a source names, Bytewax asks as fast as it can whether the epoch is over, and keeps a core
    busy. The duration of an epoch is known only afterwards. The expected duration is the shorter one of the last two,
    so that one slow commit does not delay the next.
    """

    def __init__(self) -> None:
        self._emitted_at: datetime | None = None
        self._wait = timedelta(0)
        self._expected: deque[timedelta] = deque(maxlen=2)

    def on_emit(self, now: datetime) -> timedelta:
        """Note that a batch is emitted, and return how long to wait."""
        self._emitted_at, self._wait = now, min(*self._expected, MAX_WAIT) if self._expected else timedelta(0)
        return self._wait

    def on_wake(self, now: datetime) -> None:
        """Note that Bytewax calls the source: if its last call emitted a batch, the epoch of that batch is over."""
        if self._emitted_at is None:
            return
        took, self._emitted_at = now - self._emitted_at, None
        share = OVERSLEPT_SHARE if took < PROMPT_WAKE_FACTOR * self._wait else WAIT_SHARE
        self._expected.append(share * took)
