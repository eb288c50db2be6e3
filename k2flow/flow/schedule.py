"""When a source emits, when the tables commit, and how long the source waits while they do."""

import math
from collections import deque
from datetime import datetime, timedelta

MAX_UNCOMMITTED_SECONDS = 10.0
"""Maintenance deletes old files that no table names, so no batch waits longer for its commit, whatever the trigger."""
WAIT_SHARE = 0.95  # share of the expected duration to wait, so that a shorter epoch is not overslept by much
PROMPT_WAKE_FACTOR = 1.02  # a wake-up within this multiple of the wait: the epoch was already over, for an unknown time
OVERSLEPT_SHARE = 0.7  # share of the wait to expect next, after an epoch that was already over
MAX_WAIT = timedelta(seconds=5)


class CommitSchedule:
    """Batches are due at each trigger: moments that are whole multiples of it, so that all workers emit together.

    If the clock is set back meanwhile, the next trigger is due by the new clock, and at most one trigger later.

    The tables commit on every trigger. During catch-up, when full batches arrive back to back, they commit once per
    `commit_batches` batches: four commits cost about a tenth of a batch.
    """

    def __init__(self, trigger_seconds: float, commit_batches: int, now: float) -> None:
        self.uncommitted = 0  # batches emitted since the last one that ended a checkpoint
        self._trigger_seconds = trigger_seconds
        self._commit_batches = commit_batches
        self.due = self._next_trigger(now)  # the time of the next commit, in seconds since 1970

    @property
    def full_batch_ends_checkpoint(self) -> bool:
        """Whether the tables commit after the next full batch."""
        return self.uncommitted + 1 >= self._commit_batches

    def seconds_left(self, now: float) -> float:
        """Return the seconds until the next commit is due; 0 or less if it is due."""
        longest = min(self._trigger_seconds, MAX_UNCOMMITTED_SECONDS) if self.uncommitted else self._trigger_seconds
        if self.due - now > longest:  # the clock was set back
            self.due = min(self._next_trigger(now), now + longest)
        return self.due - now

    def on_emit(self, ends_checkpoint: bool, now: float) -> None:
        """Note that a batch is emitted."""
        if ends_checkpoint:
            self.uncommitted, self.due = 0, self._next_trigger(now)
        else:
            self.uncommitted += 1
            self.due = min(self.due, now + MAX_UNCOMMITTED_SECONDS)

    def _next_trigger(self, now: float) -> float:
        return (math.floor(now / self._trigger_seconds) + 1) * self._trigger_seconds


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
