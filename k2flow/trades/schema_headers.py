"""Schema ids in record headers, where some serializers put them instead of in front of the value.

They are put in front before anything else reads the values. So Bronze and the dead letters have one format, and what a
message means follows from them alone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.trades.messages import HEADER_BYTES, MessageBatch, read_headers
from k2flow.trades.reasons import Reason
from k2flow.trades.registry import Schemas
from k2flow.trades.registry_lookup import NoTextError, UnknownSchemaError

Header = tuple[str, bytes]  # name and value
Ints = npt.NDArray[np.int64]
_ID, _GUID = 0, 1  # the first byte of Confluent's header
_GUID_BYTES = 17
_MAX_SHOWN_BYTES = 32
_CONFLUENT = "value.schema.id.serializer=io.confluent.kafka.serializers.schema.id.PrefixSchemaIdSerializer"
_APICURIO = "apicurio.registry.headers.enabled=false"


def schema_key(header: Header) -> int | UUID | None:
    """Return the schema id or the GUID that a record header has; None if it has neither.

    Apicurio's headers have none: their ids are not those of Confluent's API, or only by a setting of the registry.
    """
    name, value = header
    if name.startswith("apicurio") or not value:
        return None
    if value[0] == _ID and len(value) == HEADER_BYTES:
        return int.from_bytes(value[1:], "big")
    if value[0] == _GUID and len(value) == _GUID_BYTES:
        return UUID(bytes=value[1:])
    return None


def put_ids_in_front(messages: MessageBatch, schemas: Schemas, topic: str) -> MessageBatch:
    """Return n messages, with the schema ids of their record headers in front of the values, as 0 and 4 bytes.

    The value of a message without such an id stays; `header_details` says why. Waits for a registry that does not
    answer, and a bounded time for a GUID or id that it does not know. Raises RegistryError if the flow is stopped
    meanwhile.
    """
    if not messages.schema_headers:
        return messages
    places = list(zip(messages.partition.tolist(), messages.offset.tolist(), strict=True))
    numbers: dict[Header, int] = {}
    of_row = np.full(len(places), -1)
    for row, place in enumerate(places):
        if (header := messages.schema_headers.get(place)) is not None:
            of_row[row] = numbers.setdefault(header, len(numbers))
    if not numbers:  # the messages with headers are not in this part
        return replace(messages, schema_headers={})
    headers = list(numbers)
    of_row[_have_id_in_front(messages, headers, of_row, schemas, topic)] = -1
    used = [headers[n] for n in np.unique(of_row).tolist() if n >= 0]
    found = _schema_ids(used, schemas, lambda wanted: _first(messages, wanted, topic))
    ids = [each if isinstance(each := found.get(header), int) else None for header in headers]
    fronts = pa.array([b"" if i is None else b"\0" + i.to_bytes(4, "big") for i in [*ids, None]], pa.binary())
    key, value, timestamp = messages.rows.columns
    # Rows without a header have -1: the last one, with nothing to put in front.
    framed = pc.binary_join_element_wise(
        fronts.take(pa.array(of_row % len(fronts))), value, pa.scalar(b"", pa.binary())
    )
    unread = np.flatnonzero(np.isin(of_row, [n for n, i in enumerate(ids) if i is None])).tolist()
    return replace(
        messages,
        rows=pa.RecordBatch.from_arrays([key, framed, timestamp], schema=messages.rows.schema),
        schema_headers={},
        header_details={places[row]: str(found[headers[of_row[row]]]) for row in unread},
    )


def _have_id_in_front(
    messages: MessageBatch, headers: Sequence[Header], of_row: Ints, schemas: Schemas, topic: str
) -> npt.NDArray[np.bool_]:
    """Return for each of n messages whether its value has a known id in front, or its header's, besides a header."""
    reasons, ids = read_headers(messages.rows.column("value"))
    doubtful = (reasons == Reason.VALID) & (of_row >= 0)
    keys = np.array([key if isinstance(key := schema_key(header), int) else -1 for header in headers], np.int64)
    same = doubtful & (keys[of_row] == ids)
    asked = np.unique(ids[doubtful & ~same]).tolist()

    def place(wanted: Collection[int]) -> str:
        row = np.flatnonzero(doubtful & np.isin(ids, list(wanted)))[0]
        return f"{topic}[{messages.partition[row]}] offset {messages.offset[row]}"

    found = schemas.decoders(asked, place)
    known = [schema_id for schema_id, decoder in found.items() if not isinstance(decoder, NoTextError)]
    in_front: npt.NDArray[np.bool_] = same | (doubtful & np.isin(ids, known))
    return in_front


def _schema_ids(
    headers: Sequence[Header], schemas: Schemas, place: Callable[[Collection[Header]], str]
) -> dict[Header, int | str]:
    """Return the schema id of each header, or why it has none."""
    keys = [schema_key(header) for header in headers]
    with_guid: dict[UUID, list[Header]] = {}
    for header, key in zip(headers, keys, strict=True):
        if isinstance(key, UUID):
            with_guid.setdefault(key, []).append(header)
    of_guid: Mapping[UUID, int | UnknownSchemaError] = {}
    if with_guid:
        of_guid = schemas.ids_of_guids(list(with_guid), lambda guids: place([h for g in guids for h in with_guid[g]]))
    found: dict[Header, int | str] = {}
    for header, key in zip(headers, keys, strict=True):
        each = of_guid[key] if isinstance(key, UUID) else key
        if isinstance(each, UnknownSchemaError):
            found[header] = f"the record header {header[0]} has a schema GUID, and {each}"
        else:
            found[header] = _describe(header) if each is None else each
    return found


def _first(messages: MessageBatch, headers: Collection[Header], topic: str) -> str:
    """Return topic, partition and offset of the first message that has one of some headers."""
    places = zip(messages.partition.tolist(), messages.offset.tolist(), strict=True)
    partition, offset = next(place for place in places if messages.schema_headers.get(place) in headers)
    return f"{topic}[{partition}] offset {offset}"


def _describe(header: Header) -> str:
    """Return what a record header without a schema id has, and what the producer must change."""
    name, value = header
    if name.startswith("apicurio"):
        kind = name.rpartition(".")[2]
        has = f"the {kind} {int.from_bytes(value, 'big')}" if len(value) == 8 else _show(value)
        why = "which need not be the schema id of Confluent's API"
        return f"the record header {name} has {has}, {why}: set {_APICURIO} in the producer"
    why = "not 0x00 and a 4-byte schema id, and not 0x01 and a 16-byte GUID"
    return f"the record header {name} has {_show(value)}, {why}: if the producer means none of these, set {_CONFLUENT}"


def _show(value: bytes) -> str:
    if not value:
        return "no bytes"
    if len(value) > _MAX_SHOWN_BYTES:
        return f"more than {_MAX_SHOWN_BYTES} bytes ({value[:_MAX_SHOWN_BYTES].hex()}...)"
    return f"{len(value)} bytes ({value.hex()})"
