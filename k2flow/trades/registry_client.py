"""Writer schemas from a schema registry, by Confluent's own client.

Only flows with a registry import this module: the client takes about a second of CPU to import.
"""

import json
from collections.abc import Mapping
from typing import Any

import httpx2
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient, SchemaRegistryError
from confluent_kafka.schema_registry.error import OAuthTokenError
from fastavro.repository.base import AbstractSchemaRepository, SchemaRepositoryError
from fastavro.schema import load_schema

from k2flow.config.settings import REGISTRY_PREFIX, mask
from k2flow.errors import RegistryError, SettingsError
from k2flow.trades.registry import UnknownSchemaError

TIMEOUTS_SECONDS = (5.0, 20.0, 20.0, 5.0)  # to connect, to read, to write, and to wait for a connection
SCHEMA_NOT_FOUND = 40403
"""The error code of a registry for an unknown id. Anything else at the address answers 404 without it."""
_ROOT = ""
_FAILURES = (SchemaRegistryError, OAuthTokenError, httpx2.HTTPError, httpx2.InvalidURL, OSError)
_NO_ANSWERS = (ValueError, TypeError, AttributeError, KeyError)
"""Raised by the client for a body that is no answer of a registry."""
Json = Any


class RegistryClient:
    """Fetches Avro schemas by id. The caller retries and caches."""

    def __init__(self, properties: Mapping[str, str]) -> None:
        """Connect to nothing yet; `properties` are those of SchemaRegistryClient. Raises SettingsError."""
        self._url = mask("", properties["url"])
        try:
            self._client = SchemaRegistryClient({**properties, "timeout": TIMEOUTS_SECONDS, "max.retries": 0})
        except (ValueError, TypeError, OSError) as error:  # a certificate that cannot be read is an OSError
            raise SettingsError(f"a {REGISTRY_PREFIX}* setting is wrong: {mask('', str(error))}") from error

    def fetch(self, schema_id: int) -> Json:
        """Return the schema with this id, as JSON text, or as parsed JSON with its references in place.

        Raises UnknownSchemaError if the registry has no such schema or it is not Avro, RegistryError for anything else.
        """
        try:
            return self._resolved(self._client.get_schema(schema_id), schema_id)
        except SchemaRegistryError as error:
            if error.error_code == SCHEMA_NOT_FOUND:
                raise UnknownSchemaError(f"schema id {schema_id} is not in the registry") from error
            raise self._unanswered(schema_id, error) from error
        except _FAILURES as error:
            raise self._unanswered(schema_id, error) from error
        except _NO_ANSWERS as error:
            self._client.clear_caches()  # the client keeps every answer, also one without a schema
            raise self._unanswered(schema_id, error) from error

    def _unanswered(self, schema_id: int, error: Exception) -> RegistryError:
        reason = mask("", " ".join(str(error).split()) or type(error).__name__)
        return RegistryError(f"schema registry {self._url}: no schema {schema_id} yet ({reason})")

    def _resolved(self, schema: Schema, schema_id: int) -> Json:
        text = _text(schema)
        if (kind := schema.schema_type or "AVRO") != "AVRO":
            raise UnknownSchemaError(f"schema id {schema_id} is {kind}, not Avro")
        if not schema.references:
            return text
        named: dict[str, Json] = {}
        self._add_references(schema, named)
        try:
            return load_schema(_ROOT, repo=_Repository({**named, _ROOT: json.loads(text)}))
        except (SchemaRepositoryError, ValueError) as error:
            raise UnknownSchemaError(f"schema id {schema_id} is not valid with its references: {error}") from error

    def _add_references(self, schema: Schema, named: dict[str, Json]) -> None:
        """Add the schemas that `schema` refers to, directly or not, by the full names of their types."""
        for reference in schema.references or ():
            if reference.name not in named:
                found = self._client.get_version(reference.subject, reference.version, deleted=True).schema
                named[reference.name] = json.loads(_text(found))
                self._add_references(found, named)


class _Repository(AbstractSchemaRepository):  # type: ignore[misc]
    def __init__(self, named: Mapping[str, Json]) -> None:
        self._named = named

    def load(self, name: str) -> Json:
        if name not in self._named:
            raise SchemaRepositoryError(f"type {name} is neither defined nor referenced")
        return self._named[name]


def _text(schema: Schema) -> str:
    if not isinstance(schema.schema_str, str):
        raise ValueError("an answer without a schema")
    return schema.schema_str
