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
from tests.integration.harness import rows_of
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


def test_process_needs_the_only_owner(catalog: Catalog) -> None:
    (batch,) = batches(1, count=10, seed=8)
    with pytest.raises(ValueError, match="2 owners share the keys"):
        PipelineRun(catalog, EXCHANGE, owners=2).pipeline.process(batch)
