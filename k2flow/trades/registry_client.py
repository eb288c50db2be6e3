"""Writer schemas from a schema registry, by Confluent's own client.

Only flows with a registry import this module: the client takes about a second of CPU to import.
"""

import json
import random
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar
from uuid import UUID

import httpx2
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient, SchemaRegistryError
from confluent_kafka.schema_registry.error import OAuthTokenError

from k2flow.compat.schema_registry import schema_ids_of_guid
from k2flow.config.settings import REGISTRY_PREFIX, mask
from k2flow.errors import RegistryError, SettingsError
from k2flow.trades.references import inline
from k2flow.trades.registry_lookup import NoSchemaError, UnknownSchemaError

TIMEOUTS_SECONDS = (5.0, 20.0, 20.0, 5.0)  # to connect, to read, to write, and to wait for a connection
SCHEMA_NOT_FOUND = 40403
"""The error code of a registry for an unknown id. Anything else at the address answers 404 without it."""
MAX_REFERENCES = 256
MAX_IDS_OF_GUID = 20  # that are tried
DEFAULT_CONTEXT = "."
_DENIED = (401, 403, 407)
_BUSY = (408, 425, 429)
_SERVER_ERROR = 500
_MAX_CHARACTERS = 300  # of an answer in a text
_FAILURES = (SchemaRegistryError, OAuthTokenError, httpx2.HTTPError, httpx2.InvalidURL, OSError)
_NO_ANSWERS = (ValueError, TypeError, AttributeError, KeyError, RecursionError)
"""Raised by the client for a body that is no answer of a registry."""
Json = Any
Answer = TypeVar("Answer")


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

        Raises UnknownSchemaError if it is not Avro, NoSchemaError if the registry answers with anything but a schema,
        RegistryError if it does not answer, is busy or denies access.
        """
        return self._ask(schema_id, lambda: self._resolved(self._client.get_schema(schema_id), schema_id))

    def id_of_guid(self, guid: UUID) -> int:
        """Return the id of the schema with this GUID. Raises as `fetch`.

        A schema may have an id in each context of a registry, and an id may name another schema in each. So only an id
        counts that gives the schema of the GUID by `fetch`, first of the default context.
        """
        return self._ask(guid, lambda: self._match(guid))

    def _match(self, guid: UUID) -> int:
        ids = _ids_in(schema_ids_of_guid(self._client, guid))
        if not ids:
            raise self._no_schema(guid, "it has no id with this GUID", not_found=True)
        wanted = self._resolved(self._client.get_schema_by_guid(str(guid)), guid)
        for schema_id in ids[:MAX_IDS_OF_GUID]:
            try:
                if self._resolved(self._client.get_schema(schema_id), schema_id) == wanted:
                    return schema_id
            except UnknownSchemaError:
                continue
            except SchemaRegistryError as error:
                if error.http_status_code != HTTPStatus.NOT_FOUND:
                    raise
        raise self._no_schema(guid, f"its ids {ids[:MAX_IDS_OF_GUID]} name other schemas at this address")

    def _ask(self, key: int | UUID, ask: Callable[[], Answer]) -> Answer:
        self._client.clear_caches()  # the client keeps every answer, also one without a schema
        try:
            return ask()
        except SchemaRegistryError as error:
            raise self._refusal(key, error) from error
        except _FAILURES as error:
            raise self._unanswered(key, _text_of(error)) from error
        except _NO_ANSWERS as error:
            raise self._no_schema(key, f"not a registry's answer: {_text_of(error)}") from error

    def answers_others(self, known: int, after_server_error: bool) -> bool:
        """Return whether the registry answers now, so that only the one id that it refused can be wrong.

        It asks for an id that no registry gives, since a registry whose storage is down may answer for the ids in its
        memory. Registries that answer such an id like an absurd one must know `known`, or list their types or subjects.
        That is no proof after a server error.
        """
        if self._looks_up(random.randrange(1 << 30, 1 << 31)):
            return True
        if after_server_error:
            return False
        lists: tuple[Callable[[], Any], ...] = (self._client.get_schema_types, self._client.get_subjects)
        return self._looks_up(known) or any(_has_names(ask) for ask in lists)

    def _looks_up(self, schema_id: int) -> bool:
        """Return whether the registry answers for an id: with its schema, or that it has none."""
        try:
            self.fetch(schema_id)
        except NoSchemaError as error:
            return error.not_found
        except UnknownSchemaError:
            return True
        except RegistryError:
            return False
        return True

    def _refusal(self, key: int | UUID, error: SchemaRegistryError) -> Exception:
        status, text = error.http_status_code, _text_of(error)
        if 300 <= status < 400:
            hint = f"it redirects: set {REGISTRY_PREFIX}URL to the address that it leads to"
        elif status in _DENIED:
            hint = f"it denies access: check the credentials in {REGISTRY_PREFIX}* and their rights"
        elif status in _BUSY:
            hint = "it is busy"
        else:
            not_found = error.error_code == SCHEMA_NOT_FOUND
            return self._no_schema(key, text, not_found, status >= _SERVER_ERROR)
        return self._unanswered(key, f"{hint}: {text}")

    def _no_schema(
        self, key: int | UUID, answer: str, not_found: bool = False, server_error: bool = False
    ) -> NoSchemaError:
        return NoSchemaError(str(self._unanswered(key, answer)), answer, not_found, server_error)

    def _unanswered(self, key: int | UUID, reason: str) -> RegistryError:
        return RegistryError(f"schema registry {self._url}: no schema {key} yet ({reason})")

    def _resolved(self, schema: Schema, key: int | UUID) -> Json:
        text = _schema_text(schema)
        if (kind := schema.schema_type or "AVRO") != "AVRO":
            raise UnknownSchemaError(f"schema {'id' if isinstance(key, int) else 'GUID'} {key} is {kind}, not Avro")
        if not schema.references:
            return text
        found: dict[tuple[str, int], Json] = {}
        self._add_references(schema, found)
        return inline(json.loads(text), list(found.values()))

    def _add_references(self, schema: Schema, found: dict[tuple[str, int], Json]) -> None:
        """Add the schemas that `schema` refers to, directly or not, by subject and version."""
        for reference in schema.references or ():
            key = (reference.subject, reference.version)
            if key not in found:
                if len(found) == MAX_REFERENCES:
                    raise ValueError(f"more than {MAX_REFERENCES} references")
                referenced = self._client.get_version(*key, deleted=True).schema
                found[key] = json.loads(_schema_text(referenced))
                self._add_references(referenced, found)


def _ids_in(answer: Any) -> list[int]:
    """Return the ids of a registry's contexts, of the default context first."""
    if not isinstance(answer, list):
        raise TypeError("no list of ids")
    ids = [each["id"] for each in sorted(answer, key=lambda each: each["context"] != DEFAULT_CONTEXT)]
    if not all(type(each) is int and 0 <= each < 1 << 32 for each in ids):
        raise ValueError(f"ids {ids}")
    return list(dict.fromkeys(ids))


def _has_names(ask: Callable[[], Any]) -> bool:
    """Return whether the answer is a list of names."""
    try:
        answer = ask()
    except (*_FAILURES, *_NO_ANSWERS):
        return False
    return isinstance(answer, list) and bool(answer) and all(isinstance(name, str) for name in answer)


def _text_of(error: Exception) -> str:
    """Return an error on one line, without secrets, as short as a dead letter's detail."""
    text = mask("", " ".join(str(error).split()) or type(error).__name__)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def _schema_text(schema: Schema) -> str:
    if not isinstance(schema.schema_str, str):
        raise ValueError("an answer without a schema")
    return schema.schema_str
