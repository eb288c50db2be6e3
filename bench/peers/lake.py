"""The Iceberg tables of a peer: made in a folder, as Iceberg's Hadoop catalog lays them out, and read there."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.table import StaticTable, Table
from pyiceberg.table.metadata import new_table_metadata

from bench.peers.messages import position
from k2flow.iceberg.catalog import NAMESPACE
from k2flow.iceberg.tables import TableDefinition

HINT = "version-hint.text"
POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Difference:
    """Rows that a table lacks, and rows that it has too often or should not have."""

    lost: int
    duplicated: int

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(self.lost + other.lost, self.duplicated + other.duplicated)


def create_tables(warehouse: Path, definitions: Iterable[TableDefinition]) -> None:
    """Create empty tables: with k2flow's columns, partitions and properties."""
    for definition in definitions:
        location = warehouse / NAMESPACE / definition.name
        folder = location / "metadata"
        folder.mkdir(parents=True)
        metadata = new_table_metadata(
            definition.schema,
            definition.spec,
            definition.sort_order,
            f"file:{location}",
            {"format-version": "2", **definition.properties},
        )
        (folder / "v1.metadata.json").write_text(metadata.model_dump_json())
        (folder / HINT).write_text("1")


def load(warehouse: Path, name: str) -> Table:
    """Return the newest version of a table."""
    folder = warehouse / NAMESPACE / name / "metadata"
    version = (folder / HINT).read_text().strip()
    return StaticTable.from_metadata(str(next(folder.glob(f"v{version}.*json"))))


def rows_in(warehouse: Path, name: str) -> int:
    """Return the number of rows of a table."""
    snapshot = load(warehouse, name).current_snapshot()
    return 0 if snapshot is None or snapshot.summary is None else int(snapshot.summary["total-records"] or 0)


def wait_for_first_commit(lake: Path, seconds: float) -> None:
    """Return as soon as the first manifest of any table under `lake` appears: a commit is under way."""
    deadline = time.monotonic() + seconds
    while not any(lake.rglob("metadata/*.avro")):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no commit after {seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def keys_of(table: Table) -> pa.ChunkedArray:
    """Return the key of each row: the position in Kafka where the table has one, else the message id."""
    if "offset" not in table.schema().column_names:
        return table.scan(selected_fields=("message_id",)).to_arrow()["message_id"]
    rows = table.scan(selected_fields=("partition", "offset")).to_arrow()
    return pa.chunked_array([position(rows["partition"].to_numpy().astype("int64"), rows["offset"].to_numpy())])


def difference(found: pa.ChunkedArray, expected: pa.ChunkedArray) -> Difference:
    """Compare two multisets."""
    counts = [_counts(keys) for keys in (expected, found)]
    both = counts[0].join(counts[1], "key", join_type="full outer", right_suffix="_found")
    more = pc.subtract(pc.fill_null(both["count_found"], 0), pc.fill_null(both["count"], 0))
    zero = pa.scalar(0, pa.int64())
    lost, duplicated = (pc.sum(pc.max_element_wise(each, zero)).as_py() or 0 for each in (pc.negate(more), more))
    return Difference(lost, duplicated)


def _counts(keys: pa.ChunkedArray) -> pa.Table:
    kind = pa.int64() if pa.types.is_integer(keys.type) else pa.string()
    table = pa.table({"key": keys.cast(kind)})
    return table.group_by("key").aggregate([([], "count_all")]).rename_columns(["key", "count"])
