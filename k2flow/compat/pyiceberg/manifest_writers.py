"""Writers of manifests: PyIceberg derives schemas and writers from the table's schema again for each file.

That takes as long as writing fifty entries, and a commit writes three manifests or more, and their list. All depends on
the schema and the partition spec alone. So it is derived once for each of them.
"""

from functools import lru_cache
from typing import Any

import pyiceberg.avro.file
from pyiceberg.avro.writer import Writer
from pyiceberg.manifest import ManifestWriter
from pyiceberg.schema import Schema
from pyiceberg.typedef import TableVersion
from pyiceberg.utils.schema_conversion import AvroSchemaConversion

from k2flow.compat.pyiceberg.identity import Same

CAPACITY = 64  # schemas, and writers
_resolve, _construct = pyiceberg.avro.file.resolve_writer, pyiceberg.avro.file.construct_writer  # type: ignore[attr-defined]
_with_partition = ManifestWriter._with_partition
_to_avro = AvroSchemaConversion.iceberg_to_avro


def install_manifest_writers() -> None:
    """Install the cache for this whole process. Writers keep no state, so threads may share one."""
    ManifestWriter._with_partition = _cached_schema  # type: ignore[method-assign]
    AvroSchemaConversion.iceberg_to_avro = _cached_avro  # type: ignore[method-assign]
    pyiceberg.avro.file.resolve_writer = _cached_resolved  # type: ignore[attr-defined]
    pyiceberg.avro.file.construct_writer = _cached_constructed  # type: ignore[attr-defined]


def _cached_schema(self: ManifestWriter, format_version: TableVersion) -> Schema:
    return _schema(Same(self._schema), Same(self._spec), format_version, type(self))


@lru_cache(CAPACITY)
def _schema(schema: Same, spec: Same, format_version: TableVersion, kind: type[ManifestWriter]) -> Schema:
    writer = kind.__new__(kind)
    writer._schema, writer._spec = schema.value, spec.value
    return _with_partition(writer, format_version)


def _cached_avro(self: AvroSchemaConversion, schema: Schema, schema_name: str | None = None) -> Any:
    return _avro(Same(schema), schema_name)


@lru_cache(CAPACITY)
def _avro(schema: Same, schema_name: str | None) -> Any:
    return _to_avro(AvroSchemaConversion(), schema.value, schema_name)


def _cached_resolved(record_schema: Any, file_schema: Any) -> Writer:
    return _resolved(Same(record_schema), Same(file_schema))


@lru_cache(CAPACITY)
def _resolved(record_schema: Same, file_schema: Same) -> Writer:
    return _resolve(record_schema.value, file_schema.value)


def _cached_constructed(file_schema: Any) -> Writer:
    return _constructed(Same(file_schema))


@lru_cache(CAPACITY)
def _constructed(file_schema: Same) -> Writer:
    return _construct(file_schema.value)
