"""Confluent's registry client: a request of the registry's API that it has no method for."""

from importlib.metadata import version
from typing import Any
from uuid import UUID

from confluent_kafka.schema_registry import SchemaRegistryClient

from k2flow.compat import require_version

require_version("confluent-kafka", version("confluent-kafka"), (2, 16, 0), (2, 17, 0))


def schema_ids_of_guid(client: SchemaRegistryClient, guid: UUID) -> Any:
    """Return the registry's answer: objects with `context` and `id`, if it is one. Raises what the client raises."""
    return client._rest_client.get(f"schemas/guids/{guid}/ids")
