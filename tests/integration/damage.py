"""Damages the tables of a lake and leaves all else as it was: the ledgers, the other rows, the other tables."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.typedef import Record

from k2flow.exchange import find_exchange
from k2flow.iceberg.ledger import KEY
from k2flow.iceberg.tables import definitions
from k2flow.iceberg.writer import DataFileWriter
from tests.integration.harness import Lake

PROVEN = 60
"""More than the offsets of a partition that a lake's first messages have, which an audit has proven."""


@contextmanager
def restored(lake: Lake) -> Iterator[None]:
    """Restore every table at the end, and the proof: the metadata files that the catalog pointed to still exist."""
    proofs, kept = lake.home / "cache" / "audit", lake.home / "kept"
    if proofs.exists():
        shutil.copytree(proofs, kept)
    with sqlite3.connect(lake.home / "catalog.db", timeout=60) as catalog:
        before = catalog.execute("SELECT table_name, metadata_location FROM iceberg_tables").fetchall()
        catalog.commit()
        yield
        catalog.executemany(
            "UPDATE iceberg_tables SET metadata_location = ? WHERE table_name = ?", [(m, t) for t, m in before]
        )
    if kept.exists():
        shutil.rmtree(proofs)
        kept.rename(proofs)


def rows(lake: Lake, layer: str) -> pa.Table:
    """Return all rows of a table, in the columns that flows write."""
    wanted = definitions(find_exchange(lake.exchange))[lake.table(layer).name()[-1]]
    return lake.table(layer).scan().to_arrow().cast(wanted.arrow_schema)


def append(lake: Lake, layer: str, added: pa.Table) -> None:
    lake.table(layer).append(added)


def delete(lake: Lake, layer: str, row_filter: str) -> None:
    lake.table(layer).delete(row_filter)


def changed(one: pa.Table, **values: Any) -> pa.Table:
    """Return `one` with other values in some columns."""
    for name, value in values.items():
        field = one.schema.field(name)
        column = pa.array([value] * one.num_rows, field.type)
        one = one.set_column(one.schema.get_field_index(name), field, column)
    return one


def single_trade(lake: Lake, layer: str = "silver") -> pa.Table:
    """Return the newest trade whose id is in Silver once."""
    ids = rows(lake, "silver").sort_by([("timestamp", "descending")])["message_id"].to_pylist()
    once = next(i for i in ids if ids.count(i) == 1)
    found = rows(lake, layer)
    return found.filter(pc.equal(found["message_id"], once))


def message_of(lake: Lake, valid: bool) -> pa.Table:
    """Return a row of Bronze from the middle of its partition: one that is (not) a dead letter."""
    bad = {(r["partition"], r["offset"]) for r in rows(lake, "dlq").select(["partition", "offset"]).to_pylist()}
    bronze = rows(lake, "bronze").sort_by("offset")
    places = zip(bronze["partition"].to_pylist(), bronze["offset"].to_pylist(), strict=True)
    return next(bronze.slice(i, 1) for i, at in enumerate(places) if at[1] > PROVEN and (at not in bad) is valid)


def dead_letter(lake: Lake, message: pa.Table) -> pa.Table:
    """Return a dead-letter row for a message of Bronze."""
    one = rows(lake, "dlq").slice(0, 1)
    (m,) = message.to_pylist()
    return changed(
        one,
        partition=m["partition"],
        offset=m["offset"],
        kafka_timestamp=m["kafka_timestamp"],
        payload=m["avro_payload"],
    )


def place(message: pa.Table) -> str:
    """Return the row filter that selects one message."""
    (m,) = message.select(["partition", "offset"]).to_pylist()
    return f"partition = {m['partition']} and offset = {m['offset']}"


def forge(lake: Lake, layer: str, key: str, by: int) -> None:
    """Add `by` to a number of partition 0 in a ledger."""
    table = lake.table(layer)
    ledger = json.loads(table.properties[KEY + lake.exchange])
    ledger["partitions"]["0"][key] += by
    with table.transaction() as transaction:
        transaction.set_properties({KEY + lake.exchange: json.dumps(ledger)})


def rewrite_hour(lake: Lake, change: Callable[[DataFileWriter, pa.RecordBatch], DataFile]) -> None:
    """Replace the files of Gold's largest hour by one that `change` writes from the same rows."""
    table = lake.table("gold")
    largest = max(table.scan().plan_files(), key=lambda task: task.file.record_count).file
    day, hour = largest.partition[0], largest.partition[1]
    all_rows = rows(lake, "gold")
    days = all_rows["exchange_date"].cast(pa.int32())
    inside = pc.and_(pc.equal(days, day), pc.equal(all_rows["exchange_hour"], hour))
    date = all_rows.filter(inside)["exchange_date"][0].as_py()
    table.delete(f"exchange_date = '{date}' and exchange_hour = {hour}")
    table = lake.table("gold")
    writer = DataFileWriter(table, definitions(find_exchange(lake.exchange))[table.name()[-1]])
    batch = all_rows.filter(inside).sort_by("timestamp").combine_chunks().to_batches()[0]
    add_file(table, change(writer, batch))


def add_file(table: Table, file: DataFile) -> None:
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as snapshot:
        snapshot.append_data_file(file)


def unsorted(writer: DataFileWriter, batch: pa.RecordBatch) -> DataFile:
    writer._sorted_by = ()
    backwards = batch.take(pa.array(range(batch.num_rows - 1, -1, -1)))
    (file,) = writer.write(backwards)
    return file


def in_another_partition(writer: DataFileWriter, batch: pa.RecordBatch) -> DataFile:
    (file,) = writer.write(batch)
    partition = Record(file.partition[0], (file.partition[1] + 1) % 24)
    wrong = DataFile.from_args(**{name: getattr(file, name) for name in _NAMES}, partition=partition)
    wrong.spec_id = file.spec_id
    return wrong


_NAMES = (
    *("content", "file_path", "file_format", "record_count", "file_size_in_bytes", "column_sizes"),
    *("value_counts", "null_value_counts", "nan_value_counts", "lower_bounds", "upper_bounds", "key_metadata"),
    *("split_offsets", "equality_ids", "sort_order_id"),
)
