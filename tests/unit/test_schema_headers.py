"""Schema ids in record headers: put in front of the value before it is stored, or named in the dead letter."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st
from pyiceberg.catalog import Catalog

from k2flow.audit.report import AuditReport, Severity
from k2flow.errors import RegistryError
from k2flow.iceberg.catalog import load_table
from k2flow.kafka.schema_headers import schema_header
from k2flow.layers import BRONZE, DLQ
from k2flow.trades import bad_ids, registry_lookup
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import MessageBatch
from k2flow.trades.registry import FixedSchemas, RegistrySchemas, Schemas
from k2flow.trades.schema import trade_schema
from k2flow.trades.schema_headers import put_ids_in_front, schema_key
from tests.audited_lake import AuditedLake
from tests.messages import BINANCE, evolved, messages, value, written
from tests.pipeline import PipelineRun
from tests.registry import NO_SUCH_PATH, NOT_FOUND, Registry

OURS = "__value_schema_id"
GUID = UUID("00010203-0405-0607-0809-0a0b0c0d0e0f")
OTHER_GUID = UUID("ffffffff-ffff-ffff-ffff-ffffffffffff")
TOPIC = BINANCE.settings.topic
Header = tuple[str, bytes]
FRONT = 5  # bytes


def by_id(schema_id: int) -> Header:
    return OURS, b"\0" + schema_id.to_bytes(4, "big")


def by_guid(guid: UUID) -> Header:
    return OURS, b"\1" + guid.bytes


def with_headers(*rows: tuple[bytes | None, Header | None]) -> MessageBatch:
    """Return messages with these values and record headers, from offset 0 of each partition on."""
    batch = messages([raw for raw, _ in rows])
    batch = replace(batch, offset=batch.offset - 100, offsets=[(p, 0, len(rows)) for p in range(3)])
    places = zip(batch.partition.tolist(), batch.offset.tolist(), strict=True)
    headers = {place: header for place, (_, header) in zip(places, rows, strict=True) if header}
    return replace(batch, schema_headers=headers)


def letters(batch: MessageBatch, schemas: Schemas) -> list[tuple[int, str, str]]:
    """Return number, reason and detail of each dead letter."""
    decoded = TradeDecoder(BINANCE, schemas).decode(put_ids_in_front(batch, schemas, TOPIC))
    assert decoded.trades.rows.num_rows + decoded.dead_letters.rows.num_rows == batch.rows.num_rows
    return [(row["offset"], row["reason"], row["detail"]) for row in decoded.dead_letters.rows.to_pylist()]


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry()
    made.register(1, trade_schema())
    with made.running():
        yield made


def at_once(registry: Registry, wait_seconds: float = 0, stop: threading.Event | None = None) -> RegistrySchemas:
    return RegistrySchemas({"url": registry.url}, stop or threading.Event(), wait_seconds)


@pytest.mark.parametrize(
    ("raw", "headers", "found"),
    [
        (b"Habc", [("trace", b"x"), by_guid(GUID), ("apicurio.value.globalId", b"5")], by_guid(GUID)),
        (b"H", [(OURS, b"old"), (OURS, None)], (OURS, b"")),
        (b"H", [(OURS, b"old"), by_id(1)], by_id(1)),
        (b"H", [(OURS, b"x" * 10_000)], (OURS, b"x" * 33)),
        (b"H", [("apicurio.value.contentId", b"5")], ("apicurio.value.contentId", b"5")),
        (b"\0\0\0\0\1a", [by_id(1)], by_id(1)),
        (b"Habc", [("trace", b"x")], None),
        (b"Habc", None, None),
        (b"", [by_id(1)], None),
        (None, [by_id(1)], None),
    ],
)
def test_audit_reads_the_header_that_the_flow_reads(
    raw: bytes | None, headers: list[tuple[str, bytes | None]] | None, found: Header | None
) -> None:
    """As tests/integration/test_librdkafka.py has it for the flow."""
    assert schema_header(Message(value=raw, headers=headers)) == found


def test_messages_without_headers_are_returned_unchanged() -> None:
    batch = messages([value(), None, b""])
    assert put_ids_in_front(batch, FixedSchemas((1,)), TOPIC) is batch


def test_id_goes_in_front_of_its_value_alone() -> None:
    """All other values stay as they are, also null and empty ones, and those whose header has no id."""
    bare = value()[FRONT:]
    batch = with_headers(
        (value(), None), (bare, by_id(2**32 - 1)), (None, None), (b"", None), (bare, (OURS, b"?")), (b"x", by_id(1))
    )
    framed = put_ids_in_front(batch, FixedSchemas((1,)), TOPIC)
    assert framed.rows.schema == batch.rows.schema
    framed.rows.validate(full=True)
    values = framed.rows["value"].to_pylist()
    assert values == [value(), value(2**32 - 1), None, b"", bare, b"\0\0\0\0\1x"]
    assert framed.schema_headers == {}
    assert list(framed.header_details) == [(1, 4)]
    assert framed.rows["timestamp"].equals(batch.rows["timestamp"])
    assert framed.offsets == batch.offsets


def test_part_of_a_batch_is_framed_like_the_whole(registry: Registry) -> None:
    """Slices, filtered rows, and headers of messages that are committed already."""
    rows = [(value(trade_id=str(i))[FRONT:], by_id(1) if i % 2 else None) for i in range(9)]
    whole = put_ids_in_front(with_headers(*rows), FixedSchemas((1,)), TOPIC)
    part = with_headers(*rows).after({0: 3, 1: 4, 2: 9})
    assert part.rows.num_rows == 4
    framed = put_ids_in_front(part, FixedSchemas((1,)), TOPIC)
    assert framed.rows["value"].to_pylist() == whole.after({0: 3, 1: 4, 2: 9}).rows["value"].to_pylist()
    sliced = replace(part, rows=part.rows.slice(1), partition=part.partition[1:], offset=part.offset[1:])
    assert put_ids_in_front(sliced, FixedSchemas((1,)), TOPIC).rows["value"].equals(framed.rows["value"].slice(1))
    without = part.filter(np.isin(part.offset, [4, 6]))
    assert without.schema_headers
    assert put_ids_in_front(without, FixedSchemas((1,)), TOPIC).rows.equals(without.rows)
    nothing = part.filter(part.offset < 0)
    assert put_ids_in_front(nothing, FixedSchemas((1,)), TOPIC).rows.num_rows == 0


def test_id_without_a_registry_is_one_of_the_settings() -> None:
    bare = value()[FRONT:]
    batch = with_headers((bare, by_id(1)), (bare, by_id(7)), (bare[:-1], by_id(1)))
    assert letters(batch, FixedSchemas((1,))) == [
        (1, "unknown_schema", "schema id 7 is not one of 1"),
        (2, "truncated", letters(with_headers((value()[:-1], None)), FixedSchemas((1,)))[0][2]),
    ]


def test_known_id_in_front_counts_more_than_a_header(registry: Registry) -> None:
    """The header may be left over from another topic. No registry is asked for its GUID."""
    registry.register(2, evolved(vendor_data=None))
    batch = with_headers((value(), by_id(2)), (value(), by_guid(GUID)), (value(7), by_id(7)), (value(1), (OURS, b"?")))
    assert put_ids_in_front(batch, at_once(registry), TOPIC).rows["value"].equals(batch.rows["value"])
    assert put_ids_in_front(batch, FixedSchemas((1,)), TOPIC).rows["value"].equals(batch.rows["value"])
    assert not [path for path in registry.asked if "guids" in path]


def test_record_that_begins_with_a_0_byte_is_decoded_by_its_header(registry: Registry) -> None:
    """Its first field is null, or an empty text. What follows looks like an id, but is none."""
    first = evolved()
    first["fields"].insert(0, {"name": "note", "type": ["null", "string"], "default": None})
    registry.register(2, first)
    registry.register_guid(GUID, first, (".", 2))
    framed = [written(first, 2, note=None), written(first, 2, note=None), value(message_id="")]
    headers = [by_id(2), by_guid(GUID), by_id(1)]
    rows = [(raw[FRONT:], header) for raw, header in zip(framed, headers, strict=True)]
    assert all(raw.startswith(b"\0") for raw, _ in rows)
    schemas = at_once(registry)
    assert put_ids_in_front(with_headers(*rows), schemas, TOPIC).rows["value"].to_pylist() == framed
    assert [(n, reason) for n, reason, _ in letters(with_headers(*rows), schemas)] == [(2, "message_id_required")]
    ((_, reason, text),) = letters(with_headers((rows[1][0], by_guid(OTHER_GUID))), schemas)
    assert reason == "unknown_schema"
    assert "is not in the registry" in text


def test_guid_without_a_registry_cannot_be_known() -> None:
    (letter,) = letters(with_headers((value()[FRONT:], by_guid(GUID)), (value(), None)), FixedSchemas((1,)))
    assert letter == (
        0,
        "bad_magic",
        f"first byte 0x48, not 0x00; the record header {OURS} has a schema GUID, and schema GUID {GUID} cannot be "
        "looked up without a schema registry: set K2FLOW_SCHEMA_REGISTRY_URL",
    )


HEADERS = st.tuples(
    st.sampled_from([OURS, "apicurio.value.globalId", "apicurio.value.contentId"]),
    st.one_of(
        st.binary(max_size=33),
        st.sampled_from([by_id(1)[1], by_id(7)[1], by_guid(GUID)[1]]),
        st.binary(min_size=4, max_size=4).map(lambda raw: b"\0" + raw),
    ),
)
VALUES = st.one_of(
    st.none(),
    st.binary(max_size=9),
    st.sampled_from([value(), value()[FRONT:], value(message_id="")[FRONT:], value(7)]),
)


@given(st.lists(st.tuples(VALUES, st.none() | HEADERS), max_size=9))
def test_any_values_and_headers_are_stored(rows: list[tuple[bytes | None, Header | None]]) -> None:
    """Each value is as it came, or has its header's id in front. Each message is a trade or a dead letter."""
    rows = [(raw, header if raw else None) for raw, header in rows]  # headers of no others are read
    batch, schemas = with_headers(*rows), FixedSchemas((1,))
    framed = put_ids_in_front(batch, schemas, TOPIC).rows["value"].to_pylist()
    for (raw, header), stored in zip(rows, framed, strict=True):
        key = schema_key(header) if header else None
        in_front = raw is not None and raw[:FRONT] in (value()[:FRONT], (header or by_id(1))[1])
        if isinstance(key, int) and raw and not (in_front and len(raw) >= FRONT):
            assert stored == b"\0" + key.to_bytes(4, "big") + raw
        else:
            assert stored == raw
    letters(batch, schemas)


@pytest.mark.parametrize(
    ("header", "detail"),
    [
        ((OURS, b""), f"the record header {OURS} has no bytes, not 0x00 and a 4-byte schema id, and not 0x01 and a "),
        ((OURS, b"\0\0\0\1"), "has 4 bytes (00000001), not 0x00"),
        ((OURS, b"\0\0\0\0\1\0"), "has 6 bytes (000000000100), not 0x00"),
        ((OURS, b"\1" + b"\xff" * 4), "has 5 bytes (01ffffffff), not 0x00"),
        ((OURS, b"\1" + b"g" * 15), "has 16 bytes ("),
        ((OURS, b"\0" + b"g" * 16), "has 17 bytes ("),
        ((OURS, b"\2" + b"g" * 16), "has 17 bytes (02"),
        ((OURS, b"\xff" * 33), f"has more than 32 bytes ({'ff' * 32}...), not 0x00"),
        (("apicurio.value.globalId", b"\0" * 7 + b"\x2a"), "has the globalId 42, which need not be the schema id of "),
        (
            ("apicurio.value.contentId", b"\0" * 7 + b"\1"),
            "set apicurio.registry.headers.enabled=false in the producer",
        ),
        (("apicurio.value.contentId", b"\0\0\0\0\1"), "has 5 bytes (0000000001), which need not be"),
    ],
)
def test_header_without_a_certain_id_is_named(header: Header, detail: str) -> None:
    """The value stays, and so does its reason."""
    ((_, reason, text),) = letters(with_headers((value(), None), (b"Habc", header)), FixedSchemas((1,)))
    assert reason == "bad_magic"
    assert text.startswith("4 bytes, fewer than the 5 of the header; the record header " + header[0])
    assert detail in text


def test_tables_hold_one_format(catalog: Catalog, registry: Registry) -> None:
    """Bronze, dead letters and trades are those of a producer that puts the ids in front."""
    newer = evolved()
    newer["fields"].insert(3, {"name": "fee", "type": ["null", "double"], "default": None})
    registry.register(2, newer)
    registry.register_guid(GUID, newer, (".", 2))
    framed = [
        value(trade_id="1"),
        written(newer, 2, trade_id="2", fee=0.5),
        value(9, trade_id="3"),
        value(trade_id="4"),
        value(trade_id="5")[:-2],
    ]
    headers = [by_id(1), by_guid(GUID), by_id(9), None, by_id(1)]
    rows = [(raw[FRONT:] if header else raw, header) for raw, header in zip(framed, headers, strict=True)]
    run = PipelineRun(catalog, BINANCE, schemas=lambda _: at_once(registry))
    run.commit(with_headers(*rows))
    bronze = load_table(catalog, BINANCE.bronze).scan().to_arrow().sort_by("offset")
    assert bronze["avro_payload"].to_pylist() == framed
    silver = load_table(catalog, BINANCE.silver).scan().to_arrow().sort_by("trade_id").to_pylist()
    assert [row["trade_id"] for row in silver] == ["1", "2", "4"]
    assert dict(silver[1]["vendor_data"])["fee"] == "0.5"
    dlq = load_table(catalog, BINANCE.dlq).scan().to_arrow().sort_by("offset").to_pylist()
    assert [(row["payload"], row["reason"], row["schema_id"]) for row in dlq] == [
        (framed[2], "unknown_schema", 9),
        (framed[4], "truncated", 1),
    ]


def test_guid_is_looked_up_once(registry: Registry) -> None:
    """Its id is remembered, with many messages and batches."""
    registry.register_guid(GUID, trade_schema(), (".", 1))
    schemas = at_once(registry)
    for _ in range(3):
        assert letters(with_headers(*[(value()[FRONT:], by_guid(GUID))] * 5), schemas) == []
    assert sorted(registry.asked) == [
        f"/schemas/guids/{GUID}", f"/schemas/guids/{GUID}/ids", "/schemas/ids/1", "/schemas/ids/1"
    ]  # fmt: skip


def test_id_of_a_guid_is_one_that_gives_its_schema(registry: Registry) -> None:
    """An id of another context may name another schema here. The default context's comes first."""
    older = evolved(vendor_data=None)
    registry.register(2, older)
    registry.register(3, older)
    registry.register_guid(GUID, older, (".a", 1), (".b", 404), (".", 3), (".c", 2))
    registry.register_guid(OTHER_GUID, older, (".a", 1), (".b", 404), (".c", 2))
    bare = written(older, 1)[FRONT:]
    framed = put_ids_in_front(
        with_headers((bare, by_guid(GUID)), (bare, by_guid(OTHER_GUID))), at_once(registry), TOPIC
    )
    assert framed.rows["value"].to_pylist() == [written(older, 3), written(older, 2)]


def test_guid_whose_ids_name_other_schemas_is_unknown(registry: Registry) -> None:
    """A trade decoded by another schema would be silently wrong."""
    registry.register_guid(GUID, evolved(vendor_data=None), (".a", 1), (".b", 404))
    ((_, reason, text),) = letters(with_headers((value()[FRONT:], by_guid(GUID))), at_once(registry))
    assert reason == "bad_magic"
    assert f"schema GUID {GUID}: the registry answers for others, but has none (its ids [1, 404] name other" in text


def test_guid_of_another_kind_of_schema_is_named(registry: Registry) -> None:
    registry.register_guid(GUID, trade_schema(), (".", 1), schemaType="PROTOBUF")
    ((_, reason, text),) = letters(with_headers((value()[FRONT:], by_guid(GUID))), at_once(registry))
    assert (reason, text.partition("and ")[2]) == ("bad_magic", f"schema GUID {GUID} is PROTOBUF, not Avro")


def test_schema_of_a_guid_that_is_no_trade_is_an_unknown_schema(registry: Registry) -> None:
    registry.register(5, "string")
    registry.register_guid(GUID, "string", (".", 5))
    ((_, reason, text),) = letters(with_headers((b"\x06abc", by_guid(GUID))), at_once(registry))
    assert reason == "unknown_schema"
    assert "schema id 5 does not resolve to TradeV2" in text


UNKNOWN = [NOT_FOUND, (200, b"[]"), NO_SUCH_PATH]
GARBAGE = [(200, body) for body in (b"null", b"{}", b"5", b'["."]', b"<html>")]
GARBAGE += [(200, json.dumps([{"context": ".", "id": bad}]).encode()) for bad in (None, "1", True, -1, 2**32, 1.5)]
GARBAGE += [(200, b'[{"id": 1}]'), (500, b"{}"), (404, b"<html>")]


@pytest.mark.parametrize("answer", [*UNKNOWN, *GARBAGE], ids=str)
def test_guid_that_the_registry_does_not_know_is_bad(
    registry: Registry, caplog: pytest.LogCaptureFixture, answer: tuple[int, bytes]
) -> None:
    """Other messages of the batch are trades. The log names the first message that waits, the detail the answer."""
    registry.answers[f"/schemas/guids/{GUID}/ids"] = answer
    bare = value()[FRONT:]
    batch = with_headers((value(), None), (bare, by_guid(GUID)), (bare, by_id(1)), (bare, by_guid(GUID)))
    found = letters(batch, at_once(registry, 0.05))
    assert [(number, reason) for number, reason, _ in found] == [(1, "bad_magic"), (3, "bad_magic")]
    for _, _, text in found:
        assert f"the record header {OURS} has a schema GUID, and schema GUID {GUID}" in text
        assert ("is not in the registry" in text) == (answer in UNKNOWN[:2])
    assert f"its messages are dead letters, first {TOPIC}[1] offset 1" in caplog.text
    assert f"no schema {GUID} yet" in caplog.text


def test_guid_that_appears_heals_later_messages(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for again at intervals, without another wait, and messages in between stay as they came."""
    schemas, batch = at_once(registry), with_headers((value()[FRONT:], by_guid(GUID)))
    assert [reason for _, reason, _ in letters(batch, schemas)] == ["bad_magic"]
    registry.register_guid(GUID, trade_schema(), (".", 1))
    assert [reason for _, reason, _ in letters(batch, schemas)] == ["bad_magic"]
    later = time.monotonic() + bad_ids.ASK_AGAIN_SECONDS
    monkeypatch.setattr(bad_ids, "time", SimpleNamespace(monotonic=lambda: later))
    assert letters(batch, schemas) == []


def test_guid_is_waited_for_while_the_registry_is_down(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is written meanwhile, and the flow can be stopped."""
    monkeypatch.setattr(registry_lookup, "_FIRST_DELAY", 0.001)
    stop = threading.Event()
    run = PipelineRun(catalog, BINANCE, schemas=lambda _: at_once(Registry(), stop=stop))
    batch = with_headers((value(), None), (value()[FRONT:], by_guid(GUID)))
    watcher = threading.Thread(target=lambda: (_wait_for("waiting, no message is rejected", caplog), stop.set()))
    with caplog.at_level(logging.WARNING):
        watcher.start()
        with pytest.raises(RegistryError, match=f"no schema {GUID} yet"):
            run.commit(batch)
        watcher.join()
    assert f"first {TOPIC}[1] offset 1" in caplog.text
    assert load_table(catalog, BINANCE.bronze).scan().count() == 0


def _wait_for(text: str, caplog: pytest.LogCaptureFixture) -> None:
    deadline = time.monotonic() + 30
    while text not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)


def test_flood_of_guids_costs_few_requests(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message has another one. Requests, waits and memory are bounded; good messages are trades."""
    monkeypatch.setattr(registry_lookup, "MAX_ASKED", 30)
    monkeypatch.setattr(bad_ids, "MAX_BAD_IDS", 20)
    schemas = at_once(registry)
    rows = [(value()[FRONT:], by_guid(UUID(int=i))) for i in range(200)]
    found = letters(with_headers((value(), None), *rows), schemas)
    assert [number for number, _, _ in found] == list(range(1, 201))
    assert sum("was not asked for" in text for _, _, text in found) == 170
    assert len(registry.asked) <= 32
    assert len(schemas._guids._bad) <= 20


def without_fronts(batch: MessageBatch) -> MessageBatch:
    """Move the schema ids of some messages into record headers: as ids, as a known GUID, and as an unknown one."""
    headers, values = {}, batch.rows["value"].to_pylist()
    for i, place in enumerate(zip(batch.partition.tolist(), batch.offset.tolist(), strict=True)):
        header = {0: by_id(1), 1: by_guid(GUID), 2: by_guid(OTHER_GUID), 3: (OURS, b"?")}.get(place[1] // 20)
        if header and (values[i] or b"").startswith(b"\0\0\0\0\1") and len(values[i]) > FRONT:
            headers[place], values[i] = header, values[i][FRONT:]
    rows = batch.rows.set_column(1, "value", pa.array(values, pa.binary()))
    return replace(batch, rows=rows, schema_headers=headers)


@pytest.fixture
def lake(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> AuditedLake:
    """Tables of messages with ids in record headers, and a registry that the audits use."""
    registry.register_guid(GUID, trade_schema(), (".", 1))
    monkeypatch.setenv("K2FLOW_SCHEMA_REGISTRY_URL", registry.url)
    return AuditedLake(tmp_path, replace(BINANCE), schemas=lambda _: at_once(registry), change=without_fronts)


def checks(report: AuditReport) -> dict[str, Severity]:
    return {finding.check: finding.severity for finding in report.findings}


def test_audit_knows_what_the_tables_have_in_front(lake: AuditedLake) -> None:
    """It compares the newest rows with Kafka's messages, which have the ids in their headers."""
    letters_ = lake.table(DLQ).scan().to_arrow()
    assert sum("the record header" in text for text in letters_["detail"].to_pylist()) >= 60
    assert checks(lake.audit()) == {"dlq_reworded": Severity.NOTE}


@pytest.mark.parametrize(("place", "at"), [(5, 4), (5, 9), (25, 9), (45, 9)])
def test_audit_finds_another_payload_or_id(lake: AuditedLake, place: int, at: int) -> None:
    """Of a message with a header, its id included, and of one with a GUID."""
    table = lake.table(BRONZE)
    rows = table.scan().to_arrow().cast(BRONZE.arrow_schema)
    values = rows["avro_payload"].to_pylist()
    partition, offset = rows["partition"].to_pylist(), rows["offset"].to_pylist()
    i = next(i for i, o in enumerate(offset) if o >= place and (partition[i], o) in lake.messages.schema_headers)
    values[i] = values[i][:at] + bytes([values[i][at] ^ 1]) + values[i][at + 1 :]
    table.overwrite(rows.set_column(1, BRONZE.arrow_schema.field(1), pa.array(values, pa.binary())))
    found = checks(lake.audit())
    assert found["bronze_changed"] is Severity.BROKEN


def test_messages_that_bronze_lacks_are_read_with_their_headers(lake: AuditedLake) -> None:
    """Silver and the dead letters are what they give."""
    lake.table(BRONZE).delete("offset >= 2")
    broken = {check for check, severity in checks(lake.audit()).items() if severity is Severity.BROKEN}
    assert broken == {"bronze_missing"}


def test_messages_whose_guid_is_no_longer_known_cannot_be_checked(lake: AuditedLake, registry: Registry) -> None:
    """No process knows whether they are trades. The ids of other headers need no registry."""
    lake.table(BRONZE).delete("offset >= 2")
    del registry.answers[f"/schemas/guids/{GUID}/ids"]
    report = lake.audit()
    found = checks(report)
    assert found["schema_unknown"] is Severity.UNKNOWN
    assert {check for check, severity in found.items() if severity is Severity.BROKEN} == {"bronze_missing"}
    texts = "".join(finding.text for finding in report.findings if finding.check == "schema_unknown")
    assert "with a schema GUID in a record header cannot be checked: the registry did not give its id" in texts


def test_tables_of_an_older_version_stay_right(tmp_path: Path, registry: Registry, monkeypatch: Any) -> None:
    """It stored the values as they came, and a dead letter for each."""
    registry.register_guid(GUID, trade_schema(), (".", 1))
    monkeypatch.setenv("K2FLOW_SCHEMA_REGISTRY_URL", registry.url)
    with monkeypatch.context() as patch:
        patch.setattr("k2flow.trades.pipeline.put_ids_in_front", lambda batch, *_: batch)
        lake = AuditedLake(tmp_path, replace(BINANCE), schemas=lambda _: at_once(registry), change=without_fronts)
    assert Severity.BROKEN not in checks(lake.audit()).values()
    lake.table(BRONZE).delete("offset >= 2")
    broken = {check for check, severity in checks(lake.audit()).items() if severity is Severity.BROKEN}
    assert broken == {"bronze_missing"}
