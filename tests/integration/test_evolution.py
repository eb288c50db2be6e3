"""Evolving tables under a running flow, and messages with more fields than TradeV2."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka import Producer

from k2flow.errors import CatalogError
from k2flow.iceberg.catalog import load_table
from tests.integration.harness import DEADLINE_SECONDS, ROOT, Flow, Lake, ledger_offsets
from tests.integration.test_audit import audited
from tests.messages import TRADE, evolved, written
from tests.registry import Registry

HOUR = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=2)
OLDER = evolved(platform_sequence=None, source_sequence={"type": ["null", "int"]})
NEWER = evolved()
NEWER["fields"][2:2] = [
    {"name": "fee", "type": ["null", "double"], "default": None},
    {"name": "venue", "type": "string"},
    {"name": "levels", "type": {"type": "array", "items": "int"}},
]
GUID = UUID("00010203-0405-0607-0809-0a0b0c0d0e0f")
MORE = {"fee": 0.25, "venue": "spot", "levels": [1, 2]}


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    registry.register(1, OLDER)
    registry.register(2, NEWER)
    with registry.running():
        yield registry


def trade(number: int) -> dict[str, Any]:
    """Return the fields of a trade, one for each second of a past hour."""
    at = int((HOUR + timedelta(seconds=number)).timestamp()) * 1_000_000
    return {
        **TRADE,
        "message_id": f"00000000-0000-0000-0000-{number:012}",
        "trade_id": f"BINANCE-{number}",
        "timestamp": at,
        "ingestion_timestamp": at,
        "source_sequence": number,
        "platform_sequence": 2**40 + number,
        "vendor_data": {"venue": "own"} if number % 2 else None,
    }


def send(lake: Lake, schema_id: int, numbers: range, **more: Any) -> None:
    """Send trades in the writer schema of this id, and one broken message."""
    producer = Producer({"bootstrap.servers": lake.bootstrap})
    for number in numbers:
        schema = OLDER if schema_id == 1 else NEWER
        producer.produce(lake.topic, written(schema, schema_id, **trade(number), **more), partition=0)
    producer.produce(lake.topic, b"\0\0\0\0\x01", partition=0)
    assert producer.flush(30) == 0


def sent(number: int) -> bytes:
    return written(NEWER, 2, **trade(number), **MORE)


def send_with_headers(lake: Lake, numbers: range, *headers: bytes) -> None:
    """Send trades of schema 2 with these record headers instead of the schema id in front."""
    producer = Producer({"bootstrap.servers": lake.bootstrap})
    for number, header in zip(numbers, headers, strict=True):
        producer.produce(lake.topic, sent(number)[5:], partition=0, headers={"__value_schema_id": header})
    assert producer.flush(30) == 0


def command(lake: Lake, *arguments: str) -> str:
    done = lake.command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_older(lake: Lake, **extra: str) -> Flow:
    line = [sys.executable, "-m", "tests.integration.older_tables", lake.exchange]
    logs = tempfile.TemporaryFile()  # noqa: SIM115 - the Flow closes it
    environment = lake.environment(**extra)
    return Flow([subprocess.Popen(line, cwd=ROOT, env=environment, stdout=logs, stderr=subprocess.STDOUT)], logs)


def expected(number: int) -> tuple[Any, ...]:
    own = dict(trade(number)["vendor_data"] or {})
    if number >= 40:
        own = {**own, **{k: v for k, v in {"fee": "0.25", "venue": "spot", "levels": "[1,2]"}.items() if k not in own}}
    platform = 2**40 + number if number >= 40 else None
    return (f"BINANCE-{number}", Decimal("64000.5"), number, platform, own or None)


def by_pyiceberg(lake: Lake, layer: str) -> list[tuple[Any, ...]]:
    names = ("trade_id", "price", "source_sequence", "platform_sequence", "vendor_data")
    table = load_table(lake.catalog(), lake.table(layer).name()[-1])
    rows = table.scan(selected_fields=names).to_arrow().select(names).to_pylist(maps_as_pydicts="strict")
    return sorted((tuple(row.values()) for row in rows), key=lambda row: row[2])


def by_query(lake: Lake, *layers: str) -> list[tuple[Any, ...]]:
    columns = "trade_id, price::VARCHAR, source_sequence, platform_sequence, vendor_data::JSON"
    tables = [f"SELECT {i} AS i, {columns} FROM {lake.table(name).name()[-1]}" for i, name in enumerate(layers)]
    sql = f"{' UNION ALL '.join(tables)} ORDER BY i, source_sequence"
    rows = [tuple(json.loads(line).values()) for line in command(lake, "query", sql, "--format", "json").splitlines()]
    return [(name, Decimal(price), *more) for _, name, price, *more in rows]


def assert_rows(lake: Lake) -> None:
    wanted = [expected(number) for number in range(60)]
    assert by_pyiceberg(lake, "silver") == wanted
    assert by_pyiceberg(lake, "gold") == wanted
    assert by_query(lake, "silver", "gold") == [*wanted, *wanted]


def wait_for_offset(lake: Lake, offset: int) -> None:
    """Wait until all tables exist and hold the messages before `offset`."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        with suppress(CatalogError):
            if all(found == {0: offset} for found in ledger_offsets(lake).values()):
                return
        assert time.monotonic() < deadline, f"the tables have not reached offset {offset}"
        time.sleep(0.05)


def test_tables_evolve_beside_a_flow_and_keep_unknown_fields(new_lake: Callable[..., Lake], registry: Registry) -> None:
    """An older flow runs on while its tables evolve. The newer one, maintenance and the audit then read all files."""
    lake = new_lake(partitions=1)
    extra = {"K2FLOW_SCHEMA_REGISTRY_URL": registry.url, "K2FLOW_BINANCE_TRIGGER_SECONDS": "0.3"}
    send(lake, 1, range(20))
    with run_older(lake, **extra) as flow:
        wait_for_offset(lake, 21)
        assert "platform_sequence" not in lake.table("gold").schema().column_names
        said = command(lake, "tables", "create", "binance")
        assert said.count("evolved: ") == 3
        assert (
            "gold_crypto_trades: evolved: column price is decimal(18, 8), was decimal(15, 8); "
            "column source_sequence is long, was int; column platform_sequence long is new" in said
        )
        send(lake, 1, range(20, 40))
        wait_for_offset(lake, 42)
        flow.signal(signal.SIGTERM)
        assert flow.wait()
        assert flow.codes() == [0], flow.log()
    send(lake, 2, range(40, 60), **MORE)
    log = lake.catch_up(**extra)
    assert "binance: schema id 2 has fields that TradeV2 does not know: fee, venue, levels: kept in vendor_data" in log
    assert "evolved" not in log
    assert_rows(lake)
    letters = lake.table("dlq").scan().to_arrow()
    assert [bool(detail) for detail in sorted(letters["detail"].to_pylist(), key=bool)] == [False, False, True]
    assert audited(lake, **extra)["verdict"] == "holds"
    assert command(lake, "maintain").count("compaction") == 2
    assert [len(list(lake.table(layer).scan().plan_files())) for layer in ("silver", "gold")] == [1, 1]
    assert_rows(lake)
    assert audited(lake, **extra)["verdict"] == "holds"
    assert audited(lake, code=1, **extra, K2FLOW_BINANCE_UNKNOWN_FIELDS="ignore")["verdict"] == "broken"


def test_bad_schema_id_stops_no_other_message(new_lake: Callable[..., Lake], registry: Registry) -> None:
    """In front, or in a header. Nor does a schema that is deleted later: tables and audit keep what was used."""
    lake = new_lake(partitions=1)
    extra = {"K2FLOW_SCHEMA_REGISTRY_URL": registry.url, "K2FLOW_SCHEMA_WAIT_SECONDS": "1"}
    send(lake, 2, range(2), **MORE)
    send(lake, 2**32 - 1, range(2, 3), **MORE)
    send(lake, 2, range(3, 5), **MORE)
    send_with_headers(lake, range(20, 24), b"\0\0\0\0\2", b"\1" + GUID.bytes, b"\1" + bytes(16), b"\2")
    registry.register_guid(GUID, NEWER, (".", 2))
    log = lake.catch_up(**extra)
    assert f"its messages are dead letters, first {lake.topic}[0] offset 3" in log
    assert f"its messages are dead letters, first {lake.topic}[0] offset 10" in log
    letters = lake.table("dlq").scan(row_filter="reason = 'unknown_schema'").to_arrow().to_pylist()
    assert [(row["offset"], row["schema_id"]) for row in letters] == [(3, -1)]
    assert "HTTP 404 Not Found" in letters[0]["detail"]
    assert [row[2] for row in by_pyiceberg(lake, "silver")] == [0, 1, 3, 4, 20, 21]
    payloads = lake.table("bronze").scan().to_arrow().sort_by("offset")["avro_payload"].to_pylist()[8:]
    assert payloads == [sent(20), sent(21), sent(22)[5:], sent(23)[5:]]
    del registry.answers[1], registry.answers[2]
    assert audited(lake, **extra)["verdict"] == "holds"
    send(lake, 2, range(5, 6), **MORE)
    assert "the tables have its text, which is used" in lake.catch_up(**extra)
    registry.register(2, OLDER)
    send(lake, 2, range(6, 7), **MORE)
    failed = lake.command("run", "binance", "--processes", "1", "--until-caught-up", **extra)
    assert failed.returncode == 1
    assert "schema id 2 has another schema than the one that the tables' rows were written with" in failed.stderr
    assert audited(lake, K2FLOW_SCHEMA_REGISTRY_URL="http://127.0.0.1:1")["verdict"] == "holds"
    assert [row[2] for row in by_pyiceberg(lake, "silver")] == [0, 1, 3, 4, 5, 20, 21]
