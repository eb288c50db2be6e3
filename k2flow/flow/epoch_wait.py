"""Keeps a worker from busy waiting while an epoch is written and committed."""

import time
from datetime import UTC, datetime

AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)
"""Bytewax compares with the host's clock: with the current time, a clock set back would stop a step for as long."""
EAGER_QUESTIONS = 50  # take less than a millisecond together
SLEEP_SHARE = 1 / 16
SHORTEST_SLEEP_SECONDS, LONGEST_SLEEP_SECONDS = 0.001, 0.005


class EpochWait:
    """Lets one worker sleep between Bytewax's questions whether the epoch is over.

    Bytewax calls a source again once the epoch is over in all processes. Until then each of its workers asks as fast as
    it can, which keeps a core busy. After each question it notifies the steps that are due. So a step of the same
    worker is always due, and sleeps. It does so too in an epoch in which the worker has no item of its own: another
    worker may still decode a batch.
    """

    def __init__(self) -> None:
        self._questions = 0
        self._since = 0.0  # monotonic, of the first sleep

    def restart(self) -> None:
        """Note that this worker did something: it read messages, or processed an item."""
        self._questions = 0

    def sleep(self) -> None:
        """Sleep for a moment, longer in a long wait. Not after the first questions: most epochs are short."""
        self._questions += 1
        if self._questions <= EAGER_QUESTIONS:
            self._since = time.monotonic()
            return
        waited = time.monotonic() - self._since
        time.sleep(min(max(waited * SLEEP_SHARE, SHORTEST_SLEEP_SECONDS), LONGEST_SLEEP_SECONDS))
