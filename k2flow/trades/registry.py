"""Schemas of the messages by id: from a schema registry, or the ids that the settings declare to mean TradeV2."""

import logging
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_when_event_set,
    wait_exponential_jitter,
)
from typing_extensions import override

from k2flow.avro.decoder import AvroDecoder
from k2flow.config.settings import Settings
from k2flow.errors import RegistryError, SchemaError
from k2flow.trades.record_decoder import RecordDecoder
from k2flow.trades.schema import trade_schema

if TYPE_CHECKING:
    from k2flow.trades.registry_client import RegistryClient

log = logging.getLogger(__name__)


class UnknownSchemaError(Exception):
    """A schema id that does not mean TradeV2: its messages are dead letters. The text is their detail."""


class Schemas(Protocol):
    """Returns the decoder of a schema id."""

    def decoder(self, schema_id: int) -> RecordDecoder:
        """Return the decoder into TradeV2 of messages written with `schema_id`. Raises UnknownSchemaError."""


def open_schemas(settings: Settings, stop: threading.Event | None = None) -> Schemas:
    """Return the registry's schemas if a registry is set, else the fixed ids; `stop` ends the wait for a registry."""
    if settings.schema_registry_url:
        return RegistrySchemas(settings.schema_registry, stop or threading.Event())
    return FixedSchemas(settings.schema_ids)


class FixedSchemas(Schemas):
    """The ids of K2FLOW_SCHEMA_IDS; each means TradeV2 itself."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._ids = ids
        self._decoder = AvroDecoder(trade_schema())

    @override
    def decoder(self, schema_id: int) -> RecordDecoder:
        if schema_id not in self._ids:
            raise UnknownSchemaError(f"schema id {schema_id} is not one of {', '.join(map(str, self._ids))}")
        return self._decoder


class RegistrySchemas(Schemas):
    """Writer schemas by id, from a registry with Confluent's API; cached forever, since an id never changes.

    A registry that does not answer is an outage: `decoder` waits until it does, and logs that it waits. Once `stop` is
    set, it waits no longer and raises RegistryError.
    """

    def __init__(self, properties: Mapping[str, str], stop: threading.Event) -> None:
        """Take the properties of Confluent's SchemaRegistryClient. `url` is required."""
        self._properties = properties
        self._stop = stop
        self._decoders: dict[int, RecordDecoder | UnknownSchemaError] = {}

    @override
    def decoder(self, schema_id: int) -> RecordDecoder:
        if schema_id not in self._decoders:
            try:
                self._decoders[schema_id] = self._fetch(schema_id)
            except UnknownSchemaError as error:
                self._decoders[schema_id] = error
        found = self._decoders[schema_id]
        if isinstance(found, UnknownSchemaError):
            raise found
        return found

    @cached_property
    def _client(self) -> "RegistryClient":
        from k2flow.trades.registry_client import RegistryClient

        return RegistryClient(self._properties)

    def _fetch(self, schema_id: int) -> RecordDecoder:
        retrying = Retrying(
            retry=retry_if_exception_type(RegistryError),
            wait=wait_exponential_jitter(initial=0.5, max=15),
            stop=stop_when_event_set(self._stop),
            sleep=sleep_using_event(self._stop),
            before_sleep=_log_waiting,
            reraise=True,
        )
        schema = retrying(self._client.fetch, schema_id)
        try:
            decoder = AvroDecoder(schema, trade_schema(), keep_unknown=True)
            if "message_id" not in decoder.schema.names:
                raise SchemaError("it is a union, not a record")
            return decoder
        except SchemaError as error:
            raise UnknownSchemaError(f"schema id {schema_id} does not resolve to TradeV2: {error}") from error


def _log_waiting(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("%s; waiting, no message is rejected for it", error)
