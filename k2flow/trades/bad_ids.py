"""Schema ids that a registry does not have: how long they count as bad, and how much time they may cost."""

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from k2flow.trades.registry_lookup import UnknownSchemaError

ASK_AGAIN_SECONDS = 30.0
"""How long an id counts as bad before the registry is asked again, without a wait."""
AFTER_OUTAGE_SECONDS = 300.0
"""The same, if the registry did not answer that time."""
MAX_BAD_IDS = 10_000  # that are remembered
MAX_WAITS = 3  # for new bad ids, one after the other
WAIT_SHARE = 0.1  # of the time: what waits for bad ids may take beyond these


Key = TypeVar("Key")


@dataclass(frozen=True)
class _BadId:
    error: "UnknownSchemaError"
    until: float  # by the monotonic clock: then the registry is asked again


class BadIds(Generic[Key]):
    """The bad ids (schema ids or GUIDs) of one registry. Memory: MAX_BAD_IDS of them."""

    def __init__(self) -> None:
        self._ids: OrderedDict[Key, _BadId] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, key: Key) -> bool:
        return key in self._ids

    def __getitem__(self, key: Key) -> "UnknownSchemaError":
        return self._ids[key].error

    def current(self, key: Key) -> "UnknownSchemaError | None":
        """Return why an id is bad; None if it is not, or is to be asked for again."""
        bad = self._ids.get(key)
        return bad.error if bad is not None and time.monotonic() < bad.until else None

    def remember(self, key: Key, error: "UnknownSchemaError", answered: bool = True) -> "UnknownSchemaError":
        """Remember that an id is bad, and return why; `answered`: whether the registry has just said so."""
        until = time.monotonic() + (ASK_AGAIN_SECONDS if answered else AFTER_OUTAGE_SECONDS)
        self._ids[key] = _BadId(error, until)
        self._ids.move_to_end(key)
        while len(self._ids) > MAX_BAD_IDS:
            self._ids.popitem(last=False)
        return error

    def forget(self, key: Key) -> None:
        """Forget an id: it is good."""
        self._ids.pop(key, None)


class WaitAllowance:
    """The seconds that waits for bad ids may still take: at first MAX_WAITS waits, and WAIT_SHARE of the time since."""

    def __init__(self, wait: float) -> None:
        self._wait = wait
        self._left = MAX_WAITS * wait
        self._at = time.monotonic()

    def left(self) -> float:
        """Return how long the next wait may take."""
        now = time.monotonic()
        self._left = min(MAX_WAITS * self._wait, self._left + (now - self._at) * WAIT_SHARE)
        self._at = now
        return min(self._wait, self._left)

    def spend(self, seconds: float) -> None:
        """Count the seconds of a wait."""
        self._left = max(0, self._left - seconds)
