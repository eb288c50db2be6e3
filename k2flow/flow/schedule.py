"""When a source emits, when the tables commit, and how long a call of the source lasts."""

import math

MAX_UNCOMMITTED_SECONDS = 10.0
"""Maintenance deletes old files that no table names, so no batch waits longer for its commit, whatever the trigger."""
TURN_SECONDS = 0.5
"""How long a source gathers messages before Bytewax asks all processes again whether the epoch is over."""
BUSY_TURN_SECONDS = 0.05
"""The same while any process catches up: it waits for the others' turns."""
BUSY_SECONDS = 5.0


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


class Turns:
    """Decides how long a source gathers messages in one call.

    Each call ends an epoch, even one without a batch, and an epoch ends once all processes have ended it. Meanwhile
    Bytewax keeps a core of each busy. So the calls of all processes end together, at whole multiples of TURN_SECONDS on
    the clock. While one of them catches up, they are short.
    """

    def __init__(self) -> None:
        self._busy_until = -math.inf

    def on_full_batch(self, now: float) -> None:
        """Note that a process has emitted a batch before its trigger; `now` is a monotonic time in seconds."""
        self._busy_until = now + BUSY_SECONDS

    def seconds(self, now: float, clock: float) -> float:
        """Return the length of a call that begins at monotonic time `now`, and at `clock` in seconds since 1970."""
        return BUSY_TURN_SECONDS if now < self._busy_until else TURN_SECONDS - clock % TURN_SECONDS
