"""Schema ids in record headers, where some serializers put them instead of in front of the value.

k2flow reads the id in front only: Bronze keeps the value, and what a message means must follow from it alone.
"""

from uuid import UUID

_GUID = 1  # the first byte of Confluent's header: a GUID follows, after 0 a schema id
_MAX_SHOWN_BYTES = 32
_CONFLUENT = "value.schema.id.serializer=io.confluent.kafka.serializers.schema.id.PrefixSchemaIdSerializer"
_APICURIO = "apicurio.registry.headers.enabled=false"


def describe_schema_header(name: str, value: bytes) -> str:
    """Return which schema id a record header has, and what the producer must change."""
    remedy = _APICURIO if name.startswith("apicurio") else _CONFLUENT
    return (
        f"the record header {name} has {_show_id(name, value)}, but k2flow reads the schema id in front of the value: "
        f"set {remedy} in the producer"
    )


def _show_id(name: str, value: bytes) -> str:
    if name.startswith("apicurio") and len(value) == 8:
        return f"the {name.rpartition('.')[2]} {int.from_bytes(value, 'big')}"
    if len(value) == 17 and value[0] == _GUID:
        return f"the schema GUID {UUID(bytes=value[1:])}"
    if len(value) == 5 and value[0] == 0:
        return f"the schema id {int.from_bytes(value[1:], 'big')}"
    more = "..." if len(value) > _MAX_SHOWN_BYTES else ""
    return f"the bytes {value[:_MAX_SHOWN_BYTES].hex()}{more}"
