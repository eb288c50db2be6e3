"""Keeps a worker from busy waiting while an epoch is written and committed."""

import time
from datetime import UTC, datetime

AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)
"""Bytewax compares with the host's clock: with the current time, a clock set back would stop a step for as long."""
EAGER_QUESTIONS = 50  # take less than a millisecond together
SLEEP_SECONDS = 0.001


class EpochWait:
    """Lets one worker sleep between Bytewax's questions whether the epoch is over.

    Bytewax calls a source again once the epoch is over in all processes. Until then each of its workers asks as fast as
    it can, which keeps a core busy. After each question it notifies the steps that are due. So a step of the same
    worker is always due meanwhile, and sleeps.
    """

    def __init__(self) -> None:
        self._waiting = False
        self._questions = 0

    def begin(self) -> None:
        """Note that an item of the epoch was processed: from now on this worker may have nothing to do."""
        self._waiting, self._questions = True, 0

    def end(self) -> None:
        """Note that Bytewax calls the source: the epoch is over."""
        self._waiting = False

    def sleep(self) -> None:
        """Sleep for a moment, but not after the first questions: most epochs without a commit are short."""
        self._questions += 1
        if self._waiting and self._questions > EAGER_QUESTIONS:
            time.sleep(SLEEP_SECONDS)

    def next_sleep(self) -> datetime | None:
        """Return when to call `sleep`: at once, or None if Bytewax asks nothing."""
        return AT_ONCE if self._waiting else None
