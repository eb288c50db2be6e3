"""Readers of manifests: PyIceberg derives them from the Avro schema of each file again.

That takes 2 to 3 ms a file, as much as fifty entries, and a commit reads several manifests. The manifests of a table
have a few schemas between them. So each schema is parsed once, and its reader is made once.
"""

import json
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Any

import pyiceberg.avro.file
from pyiceberg.avro.file import AvroFileHeader
from pyiceberg.avro.reader import Reader
from pyiceberg.schema import Schema
from pyiceberg.utils.schema_conversion import AvroSchemaConversion

from k2flow.compat.pyiceberg.identity import Same

CAPACITY = 64  # schemas, and readers
SCHEMA_KEY = "avro.schema"  # in the header of an Avro file
_resolve = pyiceberg.avro.file.resolve_reader  # type: ignore[attr-defined]
_get_schema = AvroFileHeader.get_schema


def install_manifest_readers() -> None:
    """Install the cache for this whole process. Readers keep no state, so threads may share one."""
    AvroFileHeader.get_schema = _cached_schema  # type: ignore[method-assign]
    pyiceberg.avro.file.resolve_reader = _cached_reader  # type: ignore[attr-defined, assignment]


def _cached_schema(self: AvroFileHeader) -> Schema:
    text = self.meta.get(SCHEMA_KEY)
    return _parse(text) if text else _get_schema(self)


@lru_cache(CAPACITY)
def _parse(text: str) -> Schema:
    return AvroSchemaConversion().avro_to_iceberg(json.loads(text))


def _cached_reader(
    file_schema: Any,
    read_schema: Any,
    read_types: dict[int, Callable[..., Any]],
    read_enums: dict[int, Callable[..., Enum]],
) -> Reader:
    return _reader(Same(file_schema), Same(read_schema), tuple(read_types.items()), tuple(read_enums.items()))


@lru_cache(CAPACITY)
def _reader(
    file_schema: Same,
    read_schema: Same,
    read_types: tuple[tuple[int, Callable[..., Any]], ...],
    read_enums: tuple[tuple[int, Callable[..., Enum]], ...],
) -> Reader:
    return _resolve(file_schema.value, read_schema.value, dict(read_types), dict(read_enums))
