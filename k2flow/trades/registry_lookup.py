"""Looks up in a schema registry what a key means, be it a schema id or a GUID: waits for it, and finds bad keys."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from k2flow.errors import RegistryError, without_traceback
from k2flow.trades.bad_ids import BadIds, WaitAllowance

log = logging.getLogger(__name__)
MAX_ASKED = 200
"""The most unknown keys of a batch that are asked for."""
MAX_ASKED_AGAIN = 20
"""The most keys of a batch that are asked for more than once; the smallest: registries count upwards."""
_FIRST_DELAY, _MAX_DELAY, _MAX_OUTAGE_DELAY = 0.5, 2.0, 15.0


class UnknownSchemaError(Exception):
    """A key that does not mean TradeV2: its messages are dead letters. The text is their detail."""


class NoTextError(UnknownSchemaError):
    """A key whose schema is not known. It may have been, or may be later."""


class NoSchemaError(Exception):
    """The registry answers for a key, but with no schema: the key is bad, unless the registry answers for no id.

    `answer` is what it says, `not_found` whether that it has no such key, `server_error` whether that it failed.
    """

    def __init__(self, text: str, answer: str, not_found: bool, server_error: bool) -> None:
        super().__init__(text)
        self.answer = answer
        self.not_found = not_found
        self.server_error = server_error


Key = TypeVar("Key")
Value = TypeVar("Value")
Place = Callable[[Collection[Key]], str]
"""Names the first message of a batch that has one of some keys."""
Found = dict[Key, Value | UnknownSchemaError]


@dataclass(eq=False)
class Waits:
    """How the look-ups in one registry wait: until `stop`, within one allowance, one worker of a process at a time."""

    stop: threading.Event
    allowance: WaitAllowance
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False)
class RegistryLookup(Generic[Key, Value]):
    """Finds the values of keys in a registry; cached forever, since a key never changes its meaning.

    A registry that answers for no id is an outage: `find` waits until it does, and logs that it waits. A key that alone
    has no value is bad once this lasts for the allowance: a replica may lag. All keys of a batch wait together. A bad
    key is asked for again every ASK_AGAIN_SECONDS, without a wait.

    Once `stop` is set, nothing waits any longer: RegistryError is raised.
    """

    kind: str  # of the keys, for texts
    fetch: Callable[[Key], Value]
    """Asks once. Raises UnknownSchemaError, NoSchemaError, or RegistryError if the registry does not answer."""
    answers_others: Callable[[bool], bool]
    """Returns whether the registry answers for other ids now; takes whether it had a server error."""
    waits: Waits
    known: dict[Key, Value] = field(default_factory=dict)
    _bad: BadIds[Key] = field(default_factory=BadIds)

    def find(self, keys: Sequence[Key], place: Place[Key]) -> Found[Key, Value]:
        """Return for each of a batch's keys its value, or why it has none. Raises RegistryError once `stop` is set."""
        found: Found[Key, Value] = {}
        if unknown := self._recall(keys, found):
            with self.waits.lock:
                unknown = self._recall(unknown, found)  # another worker may have asked meanwhile
                for key in unknown[MAX_ASKED:]:
                    text = f"{self.kind} {key} was not asked for: its batch has more than {MAX_ASKED:,} unknown ids"
                    found[key] = NoTextError(text)
                self._settle(unknown[:MAX_ASKED], place, found)
        return found

    def _recall(self, keys: Sequence[Key], found: Found[Key, Value]) -> list[Key]:
        """Add what is known to `found`, and return the other keys."""
        unknown = []
        for key in keys:
            if (value := self.known.get(key)) is not None:
                found[key] = value
            elif (error := self._bad.current(key)) is not None:
                found[key] = error
            else:
                unknown.append(key)
        return unknown

    def _settle(self, pending: Sequence[Key], place: Place[Key], found: Found[Key, Value]) -> None:
        """Ask for keys until each has a value in `found`, or is bad."""
        ends: float | None = None
        for attempt in itertools.count() if pending else ():
            refused, outage = self._ask(pending, found)
            outage = outage or self._outage(refused)
            if outage is not None:
                ends = None
                bad = {i: self._bad[i] for i in pending if i in self._bad and i not in found}
                found |= {i: self._bad.remember(i, error, answered=False) for i, error in bad.items()}
            else:
                now = time.monotonic()
                ends = now + self.waits.allowance.left() if ends is None else ends
                new = [i for i in refused if i not in self._bad]
                again = new[:MAX_ASKED_AGAIN] if now < ends else []
                if new and not again:
                    log.warning("%s; its messages are dead letters, first %s", refused[new[0]], place(new))
                found |= {i: self._bad.remember(i, self._bad_key(i, refused[i])) for i in refused if i not in again}
            pending = [i for i in pending if i not in found]
            if not pending:
                return
            self._wait(attempt, outage or refused[pending[0]], ends, place(pending))

    def _ask(
        self, keys: Sequence[Key], found: Found[Key, Value]
    ) -> tuple[dict[Key, NoSchemaError], RegistryError | None]:
        """Ask for each key once. Return those that the registry refused, and its failure, which ends the asking."""
        refused: dict[Key, NoSchemaError] = {}
        for key in keys:
            try:
                found[key] = self.known[key] = self.fetch(key)
                self._bad.forget(key)
            except UnknownSchemaError as error:
                found[key] = self._bad.remember(key, without_traceback(error))
            except NoSchemaError as error:
                refused[key] = without_traceback(error)
            except RegistryError as error:
                return refused, without_traceback(error)
        return refused, None

    def _outage(self, refused: Mapping[Key, NoSchemaError]) -> RegistryError | None:
        """Return the failure of a registry that answers for no id, so that what it refused proves nothing."""
        doubtful = [error for error in refused.values() if not error.not_found]
        if not doubtful or self.answers_others(any(error.server_error for error in doubtful)):
            return None
        return RegistryError(str(doubtful[0]))

    def _wait(self, attempt: int, error: Exception, ends: float | None, first: str) -> None:
        """Wait before the next attempt, for a lagging replica or, without `ends`, for the end of an outage."""
        delay = _FIRST_DELAY * 2 ** min(attempt, 10) * random.uniform(0.7, 1)
        if ends is None:
            log.warning("%s; waiting, no message is rejected for it; first %s", error, first)
            delay = min(delay, _MAX_OUTAGE_DELAY)
        else:
            left = ends - time.monotonic()
            level = logging.DEBUG if attempt else logging.WARNING
            log.log(
                level, "%s; asking again for %.0f s, before its messages are dead letters; first %s", error, left, first
            )
            delay = max(0, min(delay, _MAX_DELAY, left))
            self.waits.allowance.spend(delay)
        if self.waits.stop.wait(delay):
            raise RegistryError(str(error)) from error

    def _bad_key(self, key: Key, error: NoSchemaError) -> NoTextError:
        if error.not_found:
            return NoTextError(f"{self.kind} {key} is not in the registry ({error.answer})")
        return NoTextError(f"{self.kind} {key}: the registry answers for others, but has none ({error.answer})")
