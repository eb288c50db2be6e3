"""Which Avro schema a message was written with: from the schema registry, or the ids that settings say mean TradeV2."""

import logging
import threading
from http import HTTPStatus
from typing import Protocol

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_when_event_set,
    wait_exponential_jitter,
)

from k2flow.avro.decoder import AvroDecoder
from k2flow.config.settings import Settings, mask
from k2flow.errors import RegistryError, SchemaError
from k2flow.trades.record_decoder import RecordDecoder
from k2flow.trades.schema import trade_schema

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = (5, 20)  # connect, read
SCHEMA_NOT_FOUND = 40403
"""What a registry says of an id that it does not know. Whatever else is at the address says 404 alone."""


class UnknownSchemaError(Exception):
    """A schema id that does not mean TradeV2: the message is a bad one. The text says why, for its dead-letter row."""


class Schemas(Protocol):
    """Gives the decoder of a schema id."""

    def decoder(self, schema_id: int) -> RecordDecoder:
        """The decoder into TradeV2 of messages written with `schema_id`. Raises UnknownSchemaError."""


def open_schemas(settings: Settings, stop: threading.Event | None = None) -> Schemas:
    """The registry where one is set, which is waited for until `stop`, else the fixed ids."""
    if settings.schema_registry_url:
        return RegistrySchemas(settings.schema_registry_url, stop or threading.Event())
    return FixedSchemas(settings.schema_ids)


class FixedSchemas:
    """The ids of K2FLOW_SCHEMA_IDS, all of which mean TradeV2 itself."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._ids = ids
        self._decoder = AvroDecoder(trade_schema())

    def decoder(self, schema_id: int) -> RecordDecoder:
        if schema_id not in self._ids:
            raise UnknownSchemaError(f"schema id {schema_id} is not one of {', '.join(map(str, self._ids))}")
        return self._decoder


class RegistrySchemas:
    """Writer schemas by id, from a registry that speaks Confluent's API; kept for ever, since an id never changes.

    A registry that cannot be reached is an outage: `decoder` waits until it is back, and says so in the log. Once
    `stop` is set it waits no more, and raises RegistryError.
    """

    def __init__(self, url: str, stop: threading.Event) -> None:
        self._url = url.rstrip("/")
        self._stop = stop
        self._decoders: dict[int, RecordDecoder | UnknownSchemaError] = {}

    def decoder(self, schema_id: int) -> RecordDecoder:
        if schema_id not in self._decoders:
            self._decoders[schema_id] = self._fetch(schema_id)
        found = self._decoders[schema_id]
        if isinstance(found, UnknownSchemaError):
            raise found
        return found

    def _fetch(self, schema_id: int) -> RecordDecoder | UnknownSchemaError:
        waiting = Retrying(
            retry=retry_if_exception_type(RegistryError),
            wait=wait_exponential_jitter(initial=0.5, max=15),
            stop=stop_when_event_set(self._stop),
            sleep=sleep_using_event(self._stop),
            before_sleep=self._say_waiting,
            reraise=True,
        )
        schema = waiting(self._get, schema_id)
        if isinstance(schema, UnknownSchemaError):
            return schema
        try:
            decoder = AvroDecoder(schema, trade_schema(), keep_unknown=True)
            if "message_id" not in decoder.schema.names:
                raise SchemaError("it is a union, not a record")
            return decoder
        except SchemaError as error:
            return UnknownSchemaError(f"schema id {schema_id} does not resolve to TradeV2: {error}")

    def _get(self, schema_id: int) -> str | UnknownSchemaError:
        """The schema's text, or why there is none. Raises RegistryError for anything that is no registry's answer."""
        import requests  # where there is no registry, no flow need wait for it when it starts

        try:
            answer = requests.get(f"{self._url}/schemas/ids/{schema_id}", timeout=TIMEOUT_SECONDS)
            if answer.status_code != HTTPStatus.NOT_FOUND:
                answer.raise_for_status()
            body = answer.json()
            if answer.status_code == HTTPStatus.NOT_FOUND:
                if isinstance(body, dict) and body.get("error_code") == SCHEMA_NOT_FOUND:
                    return UnknownSchemaError(f"schema id {schema_id} is not in the registry")
                answer.raise_for_status()  # there is something else at the address
            if not isinstance(body, dict) or not isinstance(body.get("schema"), str):
                raise ValueError("an answer without a schema")
        except (requests.RequestException, ValueError) as error:
            reason = mask("", " ".join(str(error).split()))
            raise RegistryError(
                f"schema registry {mask('', self._url)}: no schema {schema_id} yet ({reason})"
            ) from error
        kind = body.get("schemaType", "AVRO")
        if kind != "AVRO":
            return UnknownSchemaError(f"schema id {schema_id} is {kind}, not Avro")
        return str(body["schema"])

    def _say_waiting(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s; waiting, no message is rejected for it", error)
