"""Schemas of the messages by id: from a schema registry, or the ids that the settings declare to mean TradeV2."""

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from typing_extensions import override

from k2flow.avro.decoder import AvroDecoder
from k2flow.config.settings import Settings
from k2flow.errors import RegistryError, SchemaError, without_traceback
from k2flow.trades.bad_ids import WaitAllowance
from k2flow.trades.record_decoder import RecordDecoder
from k2flow.trades.registry_lookup import (
    Found,
    NoSchemaError,
    NoTextError,
    Place,
    RegistryLookup,
    UnknownSchemaError,
    Waits,
)
from k2flow.trades.schema import Json, canonical, trade_schema

if TYPE_CHECKING:
    from k2flow.trades.registry_client import RegistryClient

log = logging.getLogger(__name__)
MAX_STORED_BYTES = 256 << 10
"""The most text of schemas that the tables of an exchange keep: about 150 versions of TradeV2."""


class Schemas(Protocol):
    """Returns the decoder of a schema id."""

    def decoder(self, schema_id: int) -> RecordDecoder:
        """Return the decoder into TradeV2 of messages written with `schema_id`. Raises UnknownSchemaError."""

    def decoders(self, schema_ids: Sequence[int], place: Place[int]) -> Found[int, RecordDecoder]:
        """Return for each of a batch's ids its decoder, or why it has none."""
        found: Found[int, RecordDecoder] = {}
        for schema_id in schema_ids:
            try:
                found[schema_id] = self.decoder(schema_id)
            except UnknownSchemaError as error:
                found[schema_id] = without_traceback(error)
        return found

    def ids_of_guids(self, guids: Sequence[UUID], place: Place[UUID]) -> Found[UUID, int]:
        """Return for each of a batch's schema GUIDs its schema id, or why it has none. Only registries know them."""
        text = "cannot be looked up without a schema registry: set K2FLOW_SCHEMA_REGISTRY_URL"
        return {guid: NoTextError(f"schema GUID {guid} {text}") for guid in guids}

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
    """Writer schemas by id, and ids by GUID, from a registry with Confluent's API.

    RegistryLookup waits for them. An id or GUID that alone has no schema is bad once this lasts for `wait_seconds`.
    Over time, bad ones cost at most WAIT_SHARE of it beyond MAX_WAITS such waits, however many there are.
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
        self._stored = stored or {}
        self._new_texts: dict[int, str] = {}
        self._unanswered = False  # when asked for a stored schema; not asked for others then, each may take a timeout
        waits = Waits(stop, WaitAllowance(wait_seconds))
        self._ids = RegistryLookup("schema id", self._fetch, self._answers_others, waits)
        self._guids = RegistryLookup("schema GUID", self._fetch_id, self._answers_others, waits)

    @override
    def decoder(self, schema_id: int) -> RecordDecoder:
        found = self.decoders([schema_id], lambda _: f"a message of schema id {schema_id}")[schema_id]
        if isinstance(found, UnknownSchemaError):
            raise type(found)(str(found))
        return found

    @override
    def decoders(self, schema_ids: Sequence[int], place: Place[int]) -> Found[int, RecordDecoder]:
        return self._ids.find(schema_ids, place)

    @override
    def ids_of_guids(self, guids: Sequence[UUID], place: Place[UUID]) -> Found[UUID, int]:
        return self._guids.find(guids, place)

    @override
    def new_texts(self) -> Mapping[int, str]:
        return dict(self._new_texts)

    @cached_property
    def _client(self) -> "RegistryClient":
        from k2flow.trades.registry_client import RegistryClient

        return RegistryClient(self._properties)

    def _answers_others(self, after_server_error: bool) -> bool:
        known = next(reversed(self._ids.known), next(iter(self._stored), 1))
        return self._client.answers_others(known, after_server_error)

    def _fetch_id(self, guid: UUID) -> int:
        return self._client.id_of_guid(guid)

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
