"""Named points in the code at which a test can make a process die, fail, hang or stop.

K2FLOW_FAILPOINTS arms them: `commit.landed=die@3,gold.load=raise`. An action runs once, when a process reaches its
point for the nth time (`@n`, default 1):

- `die`: the process kills itself with SIGKILL;
- `raise`: InjectedError, an OSError, as an unreachable storage would raise;
- `hang`: the thread sleeps until the process is killed;
- `stop`: the process stops itself with SIGSTOP, and continues there after SIGCONT.

An unarmed point costs one look into an empty dict, a few times per batch.
"""

import logging
import os
import signal
import time
from collections import Counter
from enum import StrEnum
from threading import Lock, get_ident

from k2flow.errors import SettingsError

log = logging.getLogger(__name__)


class Point(StrEnum):
    """All points, in the order in which a batch passes them; the last four only where rows are replaced."""

    OPENED = "opened"
    SOURCE_EMITTED = "source.emitted"
    FILE_WRITTEN = "file.written"
    GOLD_LOAD = "gold.load"
    GOLD_READ = "gold.read"
    GOLD_WRITTEN = "gold.written"
    RUN_WRITTEN = "window.run-written"
    CACHE_WRITTEN = "window.cache-written"
    CACHE_REPLACED = "window.cache-replaced"
    EPOCH_COMPLETE = "epoch.complete"
    FENCE = "fence"
    COMMIT_BEGUN = "commit.begun"
    MANIFEST_WRITTEN = "commit.manifest-written"
    COMMIT_LANDED = "commit.landed"
    COMMIT_DONE = "commit.done"
    SHUTDOWN = "shutdown"
    REWRITTEN = "reprocess.rewritten"
    STAGED = "staging.staged"
    COMMITTED = "staging.committed"
    PUBLISHED = "staging.published"


class Action(StrEnum):
    """An action at a point."""

    DIE = "die"
    RAISE = "raise"
    HANG = "hang"
    STOP = "stop"


class InjectedError(OSError):
    """The error that `raise` injects."""


_lock = Lock()
_armed: dict[Point, tuple[Action, int]] = {}
_reached: Counter[Point] = Counter()


def arm(text: str) -> None:
    """Arm the points in `text`, the value of K2FLOW_FAILPOINTS, and disarm all others. Raises SettingsError."""
    armed = {}
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            name, _, rest = part.partition("=")
            action, _, count = rest.partition("@")
            armed[Point(name)] = (Action(action), int(count or 1))
        except ValueError as error:
            raise SettingsError(
                f"K2FLOW_FAILPOINTS: {part!r} is not point=action or point=action@n with a point of "
                f"{', '.join(Point)} and an action of {', '.join(Action)}"
            ) from error
    with _lock:
        _armed.clear()
        _armed.update(armed)
        _reached.clear()


def reach(point: Point) -> None:
    """Run the action that is armed at `point`, if any. `raise` raises InjectedError."""
    if not _armed or point not in _armed:
        return
    with _lock:
        _reached[point] += 1
        action, due = _armed[point]
        if _reached[point] != due:
            return
    log.warning("failpoint %s: %s", point, action)
    match action:
        case Action.DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.STOP:
            # A signal to the process could arrive after the next steps.
            signal.pthread_kill(get_ident(), signal.SIGSTOP)
        case Action.RAISE:
            raise InjectedError(f"failpoint {point}")
        case Action.HANG:
            while True:
                time.sleep(60)
