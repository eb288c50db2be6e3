"""Schemas of the messages by id: from a schema registry, or the ids that the settings declare to mean TradeV2."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from typing_extensions import override

from k2flow.avro.decoder import AvroDecoder
from k2flow.config.settings import Settings
from k2flow.errors import RegistryError, SchemaError
from k2flow.trades.bad_ids import BadIds, WaitAllowance
from k2flow.trades.record_decoder import RecordDecoder
from k2flow.trades.schema import Json, canonical, trade_schema

if TYPE_CHECKING:
    from k2flow.trades.registry_client import RegistryClient

log = logging.getLogger(__name__)
MAX_ASKED = 200
"""The most unknown ids of a batch that are asked for."""
MAX_ASKED_AGAIN = 20
"""The most ids of a batch that are asked for more than once; the smallest: registries count upwards."""
MAX_STORED_BYTES = 256 << 10
"""The most text of schemas that the tables of an exchange keep: about 150 versions of TradeV2."""
_FIRST_DELAY, _MAX_DELAY, _MAX_OUTAGE_DELAY = 0.5, 2.0, 15.0


class UnknownSchemaError(Exception):
    """A schema id that does not mean TradeV2: its messages are dead letters. The text is their detail."""


class NoTextError(UnknownSchemaError):
    """A schema id whose schema is not known. It may have been, or may be later."""


class NoSchemaError(Exception):
    """The registry answers for an id, but with no schema: the id is bad, unless the registry answers for no id.

    `answer` is what it says, `not_found` whether that it has no such id, `server_error` whether that it failed.
    """

    def __init__(self, text: str, answer: str, not_found: bool, server_error: bool) -> None:
        super().__init__(text)
        self.answer = answer
        self.not_found = not_found
        self.server_error = server_error


Place = Callable[[Collection[int]], str]
"""Names the first message of a batch that has one of some schema ids."""
Found = dict[int, RecordDecoder | UnknownSchemaError]


class Schemas(Protocol):
    """Returns the decoder of a schema id."""

    def decoder(self, schema_id: int) -> RecordDecoder:
        """Return the decoder into TradeV2 of messages written with `schema_id`. Raises UnknownSchemaError."""

    def decoders(self, schema_ids: Sequence[int], place: Place) -> Mapping[int, RecordDecoder | UnknownSchemaError]:
        """Return for each of a batch's ids its decoder, or why it has none."""
        found: Found = {}
        for schema_id in schema_ids:
            try:
                found[schema_id] = self.decoder(schema_id)
            except UnknownSchemaError as error:
                found[schema_id] = error
        return found

    def new_texts(self) -> Mapping[int, str]:
        """Return the texts to store with the tables, by id: of the schemas used that they do not have."""
        return {}


def open_schemas(
    settings: Settings, stop: threading.Event | None = None, stored: Mapping[int, str] | None = None
) -> Schemas:
    """Return the registry's schemas if a registry is set, else the fixed ids.

    `stop` ends the wait for a registry; without it nothing waits. `stored` has the texts of the tables: a schema that
    is another one now is an error.
    """
    if not settings.schema_registry_url:
        return FixedSchemas(settings.schema_ids, stored)
    if stop is not None:
        return RegistrySchemas(settings.schema_registry, stop, settings.schema_wait_seconds, stored)
    stop = threading.Event()
    stop.set()
    return RegistrySchemas(settings.schema_registry, stop, 0, stored)


class FixedSchemas(Schemas):
    """The ids of K2FLOW_SCHEMA_IDS; each means TradeV2 itself."""

    def __init__(self, ids: tuple[int, ...], stored: Mapping[int, str] | None = None) -> None:
        self._ids = ids
        self._decoder = AvroDecoder(trade_schema())
        for schema_id in ids:
            _check_same(schema_id, trade_schema(), stored or {})

    @override
    def decoder(self, schema_id: int) -> RecordDecoder:
        if schema_id not in self._ids:
            raise NoTextError(f"schema id {schema_id} is not one of {', '.join(map(str, self._ids))}")
        return self._decoder


class RegistrySchemas(Schemas):
    """Writer schemas by id, from a registry with Confluent's API; cached forever, since an id never changes.

    A registry that answers for no id is an outage: `decoders` waits until it does, and logs that it waits. An id that
    alone has no schema is bad once this lasts for `wait_seconds`: a replica may lag. All ids of a batch wait together.
    Over time, bad ids cost at most WAIT_SHARE of it beyond MAX_WAITS such waits, however many there are. A bad id is
    asked for again every ASK_AGAIN_SECONDS, without a wait.

    Once `stop` is set, nothing waits any longer: RegistryError is raised.
    """

    def __init__(
        self,
        properties: Mapping[str, str],
        stop: threading.Event,
        wait_seconds: float = 10,
        stored: Mapping[int, str] | None = None,
    ) -> None:
        """Take the properties of Confluent's SchemaRegistryClient; `url` is required. `stored`: see `open_schemas`."""
        self._properties = properties
        self._stop = stop
        self._stored = stored or {}
        self._new_texts: dict[int, str] = {}
        self._unanswered = False  # when asked for a stored schema; not asked for others then, each may take a timeout
        self._decoders: dict[int, RecordDecoder] = {}
        self._bad = BadIds()
        self._allowance = WaitAllowance(wait_seconds)
        self._lock = threading.Lock()  # the workers of a process wait together

    @override
    def decoder(self, schema_id: int) -> RecordDecoder:
        found = self.decoders([schema_id], lambda _: f"a message of schema id {schema_id}")[schema_id]
        if isinstance(found, UnknownSchemaError):
            raise found
        return found

    @override
    def decoders(self, schema_ids: Sequence[int], place: Place) -> Mapping[int, RecordDecoder | UnknownSchemaError]:
        found: Found = {}
        if unknown := self._recall(schema_ids, found):
            with self._lock:
                unknown = self._recall(unknown, found)  # another worker may have asked meanwhile
                for schema_id in unknown[MAX_ASKED:]:
                    text = f"schema id {schema_id} was not asked for: its batch has more than {MAX_ASKED:,} unknown ids"
                    found[schema_id] = NoTextError(text)
                self._settle(unknown[:MAX_ASKED], place, found)
        return found

    def _recall(self, schema_ids: Sequence[int], found: Found) -> list[int]:
        """Add what is known to `found`, and return the other ids."""
        unknown = []
        for schema_id in schema_ids:
            if (decoder := self._decoders.get(schema_id)) is not None:
                found[schema_id] = decoder
            elif (error := self._bad.current(schema_id)) is not None:
                found[schema_id] = error
            else:
                unknown.append(schema_id)
        return unknown

    @override
    def new_texts(self) -> Mapping[int, str]:
        return dict(self._new_texts)

    @cached_property
    def _client(self) -> "RegistryClient":
        from k2flow.trades.registry_client import RegistryClient

        return RegistryClient(self._properties)

    def _settle(self, pending: Sequence[int], place: Place, found: Found) -> None:
        """Ask for ids until each has a decoder in `found`, or is bad."""
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
                ends = now + self._allowance.left() if ends is None else ends
                new = [i for i in refused if i not in self._bad]
                again = new[:MAX_ASKED_AGAIN] if now < ends else []
                if new and not again:
                    log.warning("%s; its messages are dead letters, first %s", refused[new[0]], place(new))
                found |= {i: self._bad.remember(i, _bad_id(i, refused[i])) for i in refused if i not in again}
            pending = [i for i in pending if i not in found]
            if not pending:
                return
            self._wait(attempt, outage or refused[pending[0]], ends, place(pending))

    def _ask(self, schema_ids: Sequence[int], found: Found) -> tuple[dict[int, NoSchemaError], RegistryError | None]:
        """Ask for each id once. Return those that the registry refused, and its failure, which ends the asking."""
        refused: dict[int, NoSchemaError] = {}
        for schema_id in schema_ids:
            try:
                found[schema_id] = self._decoders[schema_id] = self._fetch(schema_id)
                self._bad.forget(schema_id)
            except UnknownSchemaError as error:
                found[schema_id] = self._bad.remember(schema_id, error)
            except NoSchemaError as error:
                refused[schema_id] = error
            except RegistryError as error:
                return refused, error
        return refused, None

    def _outage(self, refused: Mapping[int, NoSchemaError]) -> RegistryError | None:
        """Return the failure of a registry that answers for no id, so that what it refused proves nothing."""
        doubtful = [error for error in refused.values() if not error.not_found]
        known = next(reversed(self._decoders), next(iter(self._stored), 1))
        if not doubtful or self._client.answers_others(known, any(error.server_error for error in doubtful)):
            return None
        return RegistryError(str(doubtful[0]))

    def _fetch(self, schema_id: int) -> RecordDecoder:
        """Return the decoder of the registry's schema. If the registry does not have it, the tables' text will do."""
        stored = self._stored.get(schema_id)
        if stored is not None and self._unanswered:
            return trade_decoder(schema_id, stored)
        try:
            schema = self._client.fetch(schema_id)
        except (NoSchemaError, RegistryError) as error:
            if stored is None:
                raise
            log.warning("%s; the tables have its text, which is used", error)
            self._unanswered = isinstance(error, RegistryError)
            return trade_decoder(schema_id, stored)
        except UnknownSchemaError as error:
            if stored is None:
                raise
            raise _changed(schema_id) from error
        _check_same(schema_id, schema, self._stored)
        decoder = trade_decoder(schema_id, schema)
        self._keep(schema_id, schema)
        return decoder

    def _keep(self, schema_id: int, schema: Json) -> None:
        """Keep the text of a schema for the tables, if they lack it and have room."""
        if schema_id in self._stored:
            return
        text = canonical(schema)
        size = sum(map(len, [*self._stored.values(), *self._new_texts.values(), text]))
        if size <= MAX_STORED_BYTES:
            self._new_texts[schema_id] = text
        else:
            log.warning(
                "schema id %d: the tables hold %d KiB of schemas and take no more: the audit will need the registry",
                *(schema_id, MAX_STORED_BYTES >> 10),
            )

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
            self._allowance.spend(delay)
        if self._stop.wait(delay):
            raise RegistryError(str(error)) from error


def trade_decoder(schema_id: int, schema: Json) -> RecordDecoder:
    """Return the decoder of a writer's schema into TradeV2. Raises UnknownSchemaError if it does not resolve."""
    try:
        decoder = AvroDecoder(schema, trade_schema(), keep_unknown=True)
        if "message_id" not in decoder.schema.names:
            raise SchemaError("it is a union, not a record")
    except SchemaError as error:
        raise UnknownSchemaError(f"schema id {schema_id} does not resolve to TradeV2: {error}") from error
    if decoder.left_out:
        log.warning("schema id %d has fields that are left out of vendor_data: %s", schema_id, decoder.left_out)
    return decoder


def _bad_id(schema_id: int, error: NoSchemaError) -> NoTextError:
    if error.not_found:
        return NoTextError(f"schema id {schema_id} is not in the registry ({error.answer})")
    return NoTextError(f"schema id {schema_id}: the registry answers for others, but has none ({error.answer})")


def _check_same(schema_id: int, schema: Json, stored: Mapping[int, str]) -> None:
    """Raise SchemaError if the tables have another text of this id: its messages would get wrong values."""
    if schema_id not in stored:
        return
    try:
        same = canonical(schema) == canonical(stored[schema_id])
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise _changed(schema_id)


def _changed(schema_id: int) -> SchemaError:
    return SchemaError(
        f"schema id {schema_id} has another schema than the one that the tables' rows were written with: set the "
        "registry that gave the ids. If the new schema is right, remove Bronze's property of this id "
        "(k2flow.schema.<exchange>.<id>); older rows of the id can then not be checked"
    )
