"""How long a source stays away from an epoch that is being written or committed."""

from collections import deque
from datetime import datetime, timedelta

SHARE = 0.95
"""Of the time the epoch is expected to take, so that a shorter one is not overslept by much."""
AT_ONCE = 1.02
"""Called within so many times the time away: the epoch was over by then, nobody knows for how long."""
OVERSLEPT_SHARE = 0.7
"""Of the time away, where the epoch was over before its end."""
LONGEST = timedelta(seconds=5)


class EpochBackoff:
    """For how long a source that has emitted a batch need not be looked at again.

    Bytewax asks whether the epoch is over as fast as it can, on a core, from the moment on that the source has named.
    How long an epoch takes is known only afterwards; it is expected to take what the shorter of the last two took, so
    that one slow commit does not delay the next.
    """

    def __init__(self) -> None:
        self._left: datetime | None = None
        self._away = timedelta(0)
        self._expected: deque[timedelta] = deque(maxlen=2)

    def leave(self, now: datetime) -> timedelta:
        """A batch is emitted; returns for how long to stay away."""
        self._left, self._away = now, min(*self._expected, LONGEST) if self._expected else timedelta(0)
        return self._away

    def back(self, now: datetime) -> None:
        """The source is called, so that the epoch of its last batch, if it was the last call's, is over."""
        if self._left is None:
            return
        took, self._left = now - self._left, None
        share = OVERSLEPT_SHARE if took < AT_ONCE * self._away else SHARE
        self._expected.append(share * took)
