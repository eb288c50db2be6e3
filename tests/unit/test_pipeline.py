"""The pipeline without Bytewax or Kafka, over real tables in a SQLite catalog, compared with the oracle."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog

from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import Ledger, read
from k2flow.layers import GOLD_TABLE
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch
from tests.fuzz_pipeline import run_round
from tests.integration.harness import rows_of
from tests.messages import NOW_US, messages, value
from tests.oracle import expect
from tests.pipeline import PipelineRun, batches, messages_of

EXCHANGE = find_exchange("binance")


def ledger_of(catalog: Catalog, table: str) -> Ledger:
    return read(load_table(catalog, table).properties, EXCHANGE.name, EXCHANGE.settings.topic)


def assert_holds(catalog: Catalog, read_batches: list[MessageBatch]) -> None:
    """Assert that the four tables hold exactly what the oracle expects of these batches."""
    expected = expect([message for batch in read_batches for message in messages_of(batch)], EXCHANGE.code)
    rows = {name: load_table(catalog, name).scan().to_arrow() for name in (EXCHANGE.bronze, EXCHANGE.dlq)}
    bronze = rows[EXCHANGE.bronze].select(["partition", "offset", "avro_payload"]).to_pylist()
    assert len(bronze) == len(expected.bronze)
    assert {(row["partition"], row["offset"]): row["avro_payload"] for row in bronze} == {
        at: message.value for at, message in expected.bronze.items()
    }
    dlq = rows[EXCHANGE.dlq].to_pylist()
    assert len(dlq) == len(expected.dlq)
    assert {(row["partition"], row["offset"]): (row["payload"], row["reason"]) for row in dlq} == expected.dlq
    assert Counter(rows_of(load_table(catalog, EXCHANGE.silver))) == expected.silver
    gold = rows_of(load_table(catalog, GOLD_TABLE))
    assert len(gold) == len(expected.gold_ids)
    assert {row[0] for row in gold} == expected.gold_ids
    assert all(row[:16] in expected.silver and row[16] == row[5].hour for row in gold)
    ends = {p: end for batch in read_batches for p, _, end in batch.offsets}
    for table in EXCHANGE.tables:
        assert {p: extent.next for p, extent in ledger_of(catalog, table).partitions.items()} == ends


def test_committed_batches_fill_all_four_tables(catalog: Catalog) -> None:
    run, read_batches = PipelineRun(catalog, EXCHANGE), batches(3, count=2_000, seed=3)
    for batch in read_batches:
        run.commit(batch)
    assert_holds(catalog, read_batches)


@pytest.mark.parametrize("lagging", [(), (EXCHANGE.bronze,), (EXCHANGE.silver, GOLD_TABLE), (EXCHANGE.dlq,)])
def test_replay_writes_only_what_each_table_lacks(catalog: Catalog, lagging: tuple[str, ...]) -> None:
    """The flow dies after some tables have committed a batch. The next start reads it again, and one more."""
    first, second, _ = read_batches = batches(3, count=1_500, seed=4)
    run = PipelineRun(catalog, EXCHANGE)
    run.commit(first)
    run.commit(second, without=lagging)
    restarted = PipelineRun(catalog, EXCHANGE)
    assert {name for name, offsets in restarted.committed.items() if offsets == ends_of(first)} == set(lagging)
    for batch in read_batches[1:]:
        restarted.commit(batch)
    assert_holds(catalog, read_batches)


def ends_of(batch: MessageBatch) -> dict[int, int]:
    return {p: end for p, _, end in batch.offsets}


def test_replayed_batch_has_no_files_and_no_statistics(catalog: Catalog) -> None:
    """Its rows are in the tables, and its statistics were published when they were committed."""
    (batch,) = batches(1, count=300, seed=5)
    PipelineRun(catalog, EXCHANGE).commit(batch)
    again = PipelineRun(catalog, EXCHANGE).pipeline.process(batch)
    assert {each.table for each in again} == set(EXCHANGE.tables)
    for each in again:
        assert list(each.files()) == []
        assert list(each.ranges) == []
        assert not each.stats.reasons
        assert each.stats.oldest_us is None


def test_offsets_without_messages_are_committed(catalog: Catalog) -> None:
    """A compacted range or a transaction marker moves every ledger on, without a file."""
    empty = pa.RecordBatch.from_pylist([], schema=MESSAGE_SCHEMA)
    batch = MessageBatch(empty, np.zeros(0, np.int32), np.zeros(0, np.int64), [(2, 7, 9)])
    PipelineRun(catalog, EXCHANGE).commit(batch)
    for table in EXCHANGE.tables:
        extent = ledger_of(catalog, table).partitions[2]
        assert (extent.first, extent.next, extent.rows) == (7, 9, 0)
        assert load_table(catalog, table).scan().count() == 0


def test_dead_letters_are_counted_by_reason(catalog: Catalog) -> None:
    (batch,) = batches(1, count=1_000, seed=6)
    committables = PipelineRun(catalog, EXCHANGE).pipeline.process(batch)
    reasons = Counter(reason for _, reason in expect(messages_of(batch), EXCHANGE.code).dlq.values())
    assert {each.table: dict(each.stats.reasons) for each in committables if each.stats.reasons} == {
        EXCHANGE.dlq: reasons
    }


def test_owners_share_gold_without_duplicates(catalog: Catalog) -> None:
    """Each of two owners gets the trades of its own keys; together they write what one would."""
    (batch,) = batches(1, count=1_000, seed=7)
    pipeline = PipelineRun(catalog, EXCHANGE, owners=2).pipeline
    _, owned = pipeline.write(batch)
    assert [(each.owner, each.owners) for each in owned] == [(0, 2), (1, 2)]
    ids = [set(each.rows.column("message_id").to_pylist()) for each in owned]
    assert not ids[0] & ids[1]
    written = sum(
        file.record_count for each in owned for file in pipeline.deduplicator(each.owner).process([each]).files()
    )
    assert written == len(expect(messages_of(batch), EXCHANGE.code).gold_ids)


HOUR_US = 3_600_000_000
NOON_US = NOW_US // HOUR_US * HOUR_US  # the messages' Kafka time


@pytest.mark.parametrize("kafka_ahead", [None, 48])
@pytest.mark.parametrize("hours_ahead", [48, 24 * 300])
@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("in_one_batch", [False, True])
def test_trade_far_ahead_does_not_move_the_window(
    catalog: Catalog, kafka_ahead: int | None, hours_ahead: int, restarts: bool, in_one_batch: bool
) -> None:
    """Its message has no Kafka time, or one that is as far ahead. Ids of today still land once, in different hours."""
    ahead_us = NOON_US + hours_ahead * HOUR_US
    ahead = trade("ahead", ahead_us), None if kafka_ahead is None else ahead_us
    today = [(trade(name, NOON_US - age * HOUR_US), NOON_US) for name, age in (("a", 3), ("b", 20), ("a", 1), ("b", 0))]
    sent = [today[0], today[1], ahead, *today[2:]]
    run = PipelineRun(catalog, EXCHANGE)
    for at, one in [(0, sent)] if in_one_batch else [(i, [each]) for i, each in enumerate(sent)]:
        batch = messages([value for value, _ in one], [kafka for _, kafka in one])
        zeros, offsets = np.zeros(len(one), np.int32), np.arange(at, at + len(one))
        run.commit(MessageBatch(batch.rows, zeros, offsets, [(0, at, at + len(one))]))
        if restarts:
            run = PipelineRun(catalog, EXCHANGE)
    rows = load_table(catalog, GOLD_TABLE).scan().to_arrow()
    assert sorted(rows["message_id"].to_pylist()) == ["a", "ahead", "b"]


def trade(name: str, time_us: int) -> bytes:
    return value(message_id=name, timestamp=time_us, ingestion_timestamp=time_us)


@pytest.mark.parametrize("restarts", [False, True])
def test_window_without_any_kafka_time_follows_the_time_of_ingestion(catalog: Catalog, restarts: bool) -> None:
    run = PipelineRun(catalog, EXCHANGE)
    for at, (name, age) in enumerate((("a", 3), ("ahead", -48), ("a", 1), ("old", 3000), ("a", 0), ("old", 3000))):
        batch = messages([trade(name, NOON_US - age * HOUR_US)], [None])
        run.commit(MessageBatch(batch.rows, np.zeros(1, np.int32), np.array([at]), [(0, at, at + 1)]))
        run = PipelineRun(catalog, EXCHANGE) if restarts else run
    rows = load_table(catalog, GOLD_TABLE).scan().to_arrow()
    assert sorted(rows["message_id"].to_pylist()) == ["a", "ahead", "old"]


def test_key_whose_bound_ends_before_the_surrogates_lands(catalog: Catalog) -> None:
    """Its first 16 characters end with U+D7FF: the next code points are none that UTF-8 can encode."""
    key = "\ufffd" * 15 + "\ud7ff" + "a"
    columns = [pa.array([key.encode()]), pa.array([b"\1"]), pa.array([0], pa.timestamp("us", "UTC"))]
    batch = MessageBatch(
        pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA),
        np.zeros(1, np.int32),
        np.zeros(1, np.int64),
        [(0, 0, 1)],
    )
    PipelineRun(catalog, EXCHANGE).commit(batch)
    assert load_table(catalog, EXCHANGE.bronze).scan().to_arrow()["message_key"].to_pylist() == [key]


def test_hostile_messages_land_or_are_dead_letters(catalog: Catalog, seed: int) -> None:
    """One short round of `scripts/fuzz`."""
    assert run_round(catalog, seed, messages=8).total() >= 24


def test_process_needs_the_only_owner(catalog: Catalog) -> None:
    (batch,) = batches(1, count=10, seed=8)
    with pytest.raises(ValueError, match="2 owners share the keys"):
        PipelineRun(catalog, EXCHANGE, owners=2).pipeline.process(batch)
