"""When a source emits a batch, and after which batches the tables commit."""

import math

MAX_UNCOMMITTED_SECONDS = 10.0
"""Maintenance deletes old files that no table names, so no batch waits longer for its commit, whatever the trigger."""


class CommitSchedule:
    """Batches are due at each trigger: moments that are whole multiples of it, so that all workers emit together.

    The tables commit on every trigger. During catch-up, when full batches arrive back to back, they commit once per
    `commit_batches` batches: four commits cost about a tenth of a batch.

    Attributes:
        due: The time of the next commit, in seconds since 1970.
        uncommitted: Batches emitted since the last one that ended a checkpoint.
    """

    def __init__(self, trigger_seconds: float, commit_batches: int, now: float) -> None:
        self.uncommitted = 0
        self._trigger_seconds = trigger_seconds
        self._commit_batches = commit_batches
        self.due = self._next_trigger(now)

    @property
    def full_batch_ends_checkpoint(self) -> bool:
        """Whether the tables commit after the next full batch."""
        return self.uncommitted + 1 >= self._commit_batches

    def on_emit(self, ends_checkpoint: bool, now: float) -> None:
        """Note that a batch is emitted."""
        if ends_checkpoint:
            self.uncommitted, self.due = 0, self._next_trigger(now)
        else:
            self.uncommitted += 1
            self.due = min(self.due, now + MAX_UNCOMMITTED_SECONDS)

    def _next_trigger(self, now: float) -> float:
        return (math.floor(now / self._trigger_seconds) + 1) * self._trigger_seconds
