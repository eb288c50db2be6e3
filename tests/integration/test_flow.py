"""The flow as users run it, on a real Kafka, compared with the oracle."""

import signal
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import duckdb
import polars as pl
import pytest
from confluent_kafka import Producer

from k2flow.flow.schedule import MAX_UNCOMMITTED_SECONDS
from k2flow.layers import GOLD_TABLE
from k2flow.query.connection import connect_to
from k2flow.sandbox.producer import ProduceOptions
from k2flow.sandbox.producer.send import Sender
from k2flow.sandbox.producer.stream import MessageStream
from tests.integration.conftest import fill
from tests.integration.harness import Lake, assert_tables, batches, ledger_offsets, read_topic, rows_of
from tests.oracle import expect

NewLake = Callable[..., Lake]


def test_every_kind_of_record_lands_in_the_right_table(new_lake: NewLake) -> None:
    """100,000 messages with duplicates and every kind of bad one. Every value and reason in every layer is checked."""
    lake = new_lake(partitions=6)
    manifest = fill(lake, count=100_000, bad=0.04, duplicates=0.03, seed=7)
    lake.catch_up(K2FLOW_BINANCE_BATCH_ROWS="30000")
    expected = expect(read_topic(lake.bootstrap, lake.topic), "BINANCE")
    assert_tables(lake, expected)
    assert Counter(reason for _, reason in expected.dlq.values()) == Counter(manifest.bad)
    assert len(set(manifest.bad)) == 22
    assert manifest.silver == expected.silver.total()
    assert manifest.gold == len(expected.gold_ids)
    assert_readers_agree(lake)
    offsets = ledger_offsets(lake)
    assert offsets["bronze"] == offsets["silver"] == offsets["dlq"] == offsets["gold"]


def assert_readers_agree(lake: Lake) -> None:
    connection = connect_to(lake.catalog())
    for layer in ("bronze", "silver", "dlq", "gold"):
        table = lake.table(layer)
        snapshot = table.current_snapshot()
        assert snapshot is not None
        assert snapshot.summary is not None
        counts = {
            "pyiceberg": table.scan().to_arrow().num_rows,
            "duckdb": connection.sql(f"SELECT count(*) FROM {table.name()[-1]}").fetchall()[0][0],
            "polars": pl.scan_iceberg(table).select(pl.len()).collect().item(),
            "summary": int(snapshot.summary.additional_properties["total-records"]),
        }
        assert len(set(counts.values())) == 1, counts


def test_watermark_alignment_keeps_skewed_partitions_in_the_dedup_window(new_lake: NewLake) -> None:
    """Without alignment a small partition would finish a week of trades before a large one has begun it."""
    lake = new_lake(partitions=6)
    week = timedelta(days=7)
    count = 60_000
    options = ProduceOptions(
        count=count,
        rate=count / week.total_seconds(),
        bad=0.01,
        duplicates=0.03,
        seed=5,
        start=datetime.now(UTC) - week,
    )
    sender = Sender({"bootstrap.servers": lake.bootstrap}, lake.topic)
    for messages in MessageStream("BINANCE", options, options.start_us()).chunks():
        sender.send(messages)
    sender.finish()
    log = lake.catch_up(
        K2FLOW_BINANCE_BATCH_ROWS="5000", K2FLOW_LOG_LEVEL="DEBUG", K2FLOW_KAFKA_FETCH_MESSAGE_MAX_BYTES="20000"
    )
    assert " pauses partitions " in log
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_group_commit_shares_commits_and_files(new_lake: NewLake) -> None:
    """Ten batches commit after four, after eight, and at the end. Late trades wait for it and share files."""
    lake = new_lake(partitions=1)
    fill(lake, count=1_000, bad=0.05, duplicates=0.1, seed=5)
    lake.catch_up(K2FLOW_BINANCE_TRIGGER_SECONDS="3600", **batches(100, together=4))
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    for layer in ("bronze", "silver", "gold"):
        snapshots = lake.table(layer).metadata.snapshots
        assert len(snapshots) == 1 + 3, "the first one fences other writers"
    hours = len({(row[-2], row[-1]) for row in rows_of(lake.table("gold"))})
    assert hours > 1
    assert len(lake.table("gold").inspect.files()) <= 3 * hours


@pytest.mark.parametrize("processes", [1, 2])
def test_pending_batches_are_committed_at_the_trigger(new_lake: NewLake, processes: int) -> None:
    """No message follows them, and one of two processes has read nothing at all."""
    lake = new_lake(partitions=1)
    with lake.start(processes, K2FLOW_BINANCE_TRIGGER_SECONDS="1", **batches(100, together=100)) as flow:
        for total in (200, 400):
            fill(lake, count=200, duplicates=0.1, seed=total)
            wait_for(lambda total=total: bronze_rows(lake) == total)  # type: ignore[misc]
        flow.signal(signal.SIGTERM)
        log = flow.wait()
        assert flow.codes() == [0] * processes, log
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_pending_batches_do_not_wait_for_a_distant_trigger(new_lake: NewLake) -> None:
    """Maintenance takes old files without a commit for orphan files."""
    lake = new_lake(partitions=1)
    fill(lake, count=250, seed=1)
    settings = {"K2FLOW_BINANCE_TRIGGER_SECONDS": "3600", **batches(100, together=100)}
    with lake.start(**settings) as flow:
        flow.wait_for_log("bronze_binance_trades: 250 rows", seconds=MAX_UNCOMMITTED_SECONDS + 60)
        flow.signal(signal.SIGTERM)
        flow.wait()


@pytest.mark.parametrize("arguments", [(), ("-w", "2")])
def test_second_start_continues_where_the_first_ended(new_lake: NewLake, arguments: tuple[str, ...]) -> None:
    lake = new_lake()
    for seed in (1, 2):
        fill(lake, count=3_000, bad=0.05, duplicates=0.05, seed=seed)
        with lake.start(1, arguments, K2FLOW_UNTIL_CAUGHT_UP="1") as flow:
            log = flow.wait()
            assert flow.codes() == [0], log
        assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)]
)
def test_signals_drain_and_commit(new_lake: NewLake, number: signal.Signals, processes: int) -> None:
    """The rows read before the signal are committed, the exit code is 0, and the next start continues there."""
    lake = new_lake()
    fill(lake, count=4_000, bad=0.05, duplicates=0.05, seed=3)
    settings = {"K2FLOW_BINANCE_TRIGGER_SECONDS": "600", **batches(1_000, together=100)}
    with lake.start(processes, **settings) as flow:  # no commit is due before the signal
        flow.wait_for_log(" reads ", processes)
        time.sleep(5)
        flow.signal(number)
        log = flow.wait(60)
        assert flow.codes() == [0] * processes, log
    committed = ledger_offsets(lake)
    assert sum(committed["bronze"].values()) == 4_000, log
    fill(lake, count=500, seed=4)
    lake.catch_up(processes)
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_trigger_sets_the_commit_cadence(new_lake: NewLake) -> None:
    """Bytewax's default epoch is 10 s; with a trigger of 1 s new messages are committed within seconds."""
    lake = new_lake()
    fill(lake, count=100, seed=1)
    with lake.start(K2FLOW_BINANCE_TRIGGER_SECONDS="1") as flow:
        wait_for(lambda: bronze_rows(lake) == 100)
        fill(lake, count=50, seed=2)
        began = time.monotonic()
        wait_for(lambda: bronze_rows(lake) == 150)
        assert time.monotonic() - began < 9, "committed at Bytewax's epoch, not at the trigger"
        flow.signal(signal.SIGTERM)
        flow.wait()
        assert flow.codes() == [0]


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def bronze_rows(lake: Lake) -> int:
    from k2flow.errors import CatalogError

    try:
        return lake.table("bronze").scan().count()
    except CatalogError:
        return 0


def test_unusual_keys_and_headers_are_kept_exactly(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    good = new_good_value(lake)
    producer = Producer({"bootstrap.servers": lake.bootstrap})
    for key in (None, b"", b"plain", "ключ".encode(), b"\xff\xfe\x00tail", b"\\xff"):
        producer.produce(lake.topic, good, key=key)
    for value in (
        b"",
        b"\0",
        b"\0\0\0\0",
        b"\0\0\0\0\1",
        b"\1" + good[1:],
        None,
        b"\0\xff\xff\xff\xff" + good[5:],
        good + b"\0",
    ):
        producer.produce(lake.topic, value)
    producer.produce(lake.topic, good[5:], headers={"__value_schema_id": b"\1" + bytes(16)})
    assert producer.flush(30) == 0
    lake.catch_up()
    expected = expect(read_topic(lake.bootstrap, lake.topic), "BINANCE")
    assert_tables(lake, expected)
    reasons = Counter(reason for _, reason in expected.dlq.values())
    assert reasons == {"bad_magic": 5, "truncated": 1, "null_payload": 1, "unknown_schema": 1, "trailing_bytes": 1}
    negative = lake.table("dlq").scan(row_filter="reason = 'unknown_schema'").to_arrow()["schema_id"].to_pylist()
    assert negative == [-1]
    details = lake.table("dlq").scan(row_filter="reason = 'bad_magic'").to_arrow()["detail"].to_pylist()
    (named,) = [text for text in details if "__value_schema_id" in text]
    assert "schema GUID 00000000-0000-0000-0000-000000000000" in named


def new_good_value(lake: Lake) -> bytes:
    """Return the value of a valid message, by producing one."""
    fill(lake, count=1, seed=9)
    (message,) = read_topic(lake.bootstrap, lake.topic)
    assert message.value is not None
    return message.value


def test_only_committed_transactions_are_read(new_lake: NewLake) -> None:
    """A log that ends in a control record is caught up, and its offsets are in the ledger."""
    lake = new_lake(partitions=1)
    good = new_good_value(lake)
    producer = Producer({"bootstrap.servers": lake.bootstrap, "transactional.id": lake.topic})
    producer.init_transactions(30)
    for commit in (True, False, True, False):
        producer.begin_transaction()
        for _ in range(5):
            producer.produce(lake.topic, good)
        producer.flush(30)
        if commit:
            producer.commit_transaction(30)
        else:
            producer.abort_transaction(30)
    lake.catch_up()
    messages = read_topic(lake.bootstrap, lake.topic)
    assert len(messages) == 11
    assert_tables(lake, expect(messages, "BINANCE"))
    offsets = ledger_offsets(lake)
    assert all(layer == {0: 25} for layer in offsets.values()), offsets  # 21 messages and 4 markers


def test_added_partition_is_read(new_lake: NewLake) -> None:
    from confluent_kafka.admin import AdminClient, NewPartitions

    lake = new_lake(partitions=1)
    fill(lake, count=200, seed=1)
    lake.catch_up()
    admin = AdminClient({"bootstrap.servers": lake.bootstrap})
    for future in admin.create_partitions([NewPartitions(lake.topic, 3)]).values():
        future.result(30)
    fill(lake, count=600, seed=2)
    lake.catch_up(2)
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    assert set(ledger_offsets(lake)["gold"]) == {0, 1, 2}


def test_exchanges_share_gold_and_deduplicate_separately(new_lake: NewLake) -> None:
    """Both flows write at the same time; equal ids of two exchanges are different trades."""
    binance, kraken = new_lake("binance"), new_lake("kraken")
    fill(binance, count=3_000, duplicates=0.1, seed=1)
    fill(kraken, count=1_000, duplicates=0.1, seed=1)
    with (
        binance.start(K2FLOW_UNTIL_CAUGHT_UP="1", **batches(200)) as one,
        kraken.start(K2FLOW_UNTIL_CAUGHT_UP="1", **batches(100, "kraken")) as other,
    ):
        logs = one.wait(), other.wait()
        assert one.codes() == other.codes() == [0], logs
    rows = connect_to(binance.catalog()).sql(
        f"SELECT exchange, count(*), count(DISTINCT message_id) FROM {GOLD_TABLE} GROUP BY 1"
    )
    found = {exchange: (n, distinct) for exchange, n, distinct in rows.fetchall()}
    for lake, code in ((binance, "BINANCE"), (kraken, "KRAKEN")):
        ids = expect(read_topic(lake.bootstrap, lake.topic), code).gold_ids
        assert found[code] == (len(ids), len(ids))


def test_connection_sees_one_snapshot(new_lake: NewLake) -> None:
    lake = new_lake()
    fill(lake, count=300, seed=1)
    lake.catch_up()
    connection = connect_to(lake.catalog())
    fill(lake, count=200, seed=2)
    lake.catch_up()

    def count(of: duckdb.DuckDBPyConnection) -> int:
        return int(of.sql("SELECT count(*) FROM bronze_binance_trades").fetchall()[0][0])

    assert count(connection) == 300
    assert count(connect_to(lake.catalog())) == 500
