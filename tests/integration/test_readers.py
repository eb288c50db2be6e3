"""All readers see the same rows, value by value: DuckDB, PyIceberg, polars and Spark."""

import itertools
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pytest
from pyiceberg.table import Table

from k2flow.errors import KafkaError
from k2flow.query.connection import connect_to
from tests.integration.conftest import fill
from tests.integration.harness import DEADLINE_SECONDS, Lake, batches
from tests.integration.spark import read_by_spark, spark_jars, spark_session
from tests.integration.test_maintain import LAYERS, definition, maintain, maintaining, send_days

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.xdist_group("readers")

NewLake = Callable[..., Lake]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LOOKS = 2
"""How often each table must have a newer snapshot than the one that Spark reads."""


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SparkSession"]:
    pytest.importorskip("pyspark", reason="pyspark is not installed: scripts/setup dev,spark installs it")
    try:
        jars = spark_jars()
    except KafkaError as error:
        pytest.skip(f"Spark: {error}")
    with spark_session(jars, tmp_path_factory.mktemp("spark")) as session:
        yield session


@dataclass(frozen=True)
class Column:
    """A column: number of values that are not null, minimum, maximum, and the sum of the values or of their sizes."""

    values: int
    minimum: Any
    maximum: Any
    total: int | Decimal


@dataclass(frozen=True)
class Contents:
    """A table as one reader returns it."""

    rows: Counter[tuple[Any, ...]]
    columns: Mapping[str, Column]


def contents(table: pa.Table) -> Contents:
    """Return every value of a table, and per-column figures that show a difference at a glance."""
    columns = {name: [plain(value) for value in table[name].to_pylist()] for name in table.column_names}
    rows = Counter(zip(*columns.values(), strict=True))
    return Contents(rows, {name: summary(values) for name, values in columns.items()})


def plain(value: Any) -> Any:
    """Return a value that can be compared and hashed; maps, which readers return in two forms, become sorted pairs."""
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], dict):
        value = [(entry["key"], entry["value"]) for entry in value]
    return tuple(sorted(value) if value and isinstance(value[0], tuple) else value)


def summary(values: list[Any]) -> Column:
    present = [value for value in values if value is not None]
    total = sum((amount(value) for value in present), start=Decimal(0))
    return Column(len(present), min(present, default=None), max(present, default=None), total)


def amount(value: Any) -> Decimal:
    """Return a number as it is, a time in microseconds, a date in days, and the length of anything else."""
    if isinstance(value, int | Decimal):
        return Decimal(value)
    if isinstance(value, datetime):
        return Decimal((value - EPOCH) // datetime.resolution)
    if isinstance(value, date):
        return Decimal(value.toordinal())
    return Decimal(len(value.encode() if isinstance(value, str) else value))


@dataclass(frozen=True)
class Window:
    """A range of rows to read: those with `column` in [start, end)."""

    column: str
    start: datetime
    end: datetime

    def sql(self) -> str:
        return f""" WHERE "{self.column}" >= '{self.start}' AND "{self.column}" < '{self.end}'"""

    def holds(self, moment: datetime | None) -> bool:
        return moment is not None and self.start <= moment < self.end


class Readers:
    """One snapshot of each table, and all its readers."""

    def __init__(self, lake: Lake, spark: "SparkSession") -> None:
        self.tables = {layer: lake.table(layer) for layer in LAYERS}
        self.duckdb = connect_to(lake.catalog())
        self.spark = spark
        for table in self.tables.values():
            read_by_spark(spark, table.metadata_location).createOrReplaceTempView(table.name()[-1])

    def read(self, layer: str, window: Window | None = None) -> dict[str, pa.Table]:
        """Read a table, or a window of it, with each reader; each skips the files that it can rule out."""
        table = self.tables[layer]
        sql = f"SELECT * FROM {table.name()[-1]}{window.sql() if window else ''}"
        return {
            "pyiceberg": read_by_pyiceberg(table, window),
            "duckdb": self.duckdb.sql(sql).to_arrow_table(),
            "polars": read_by_polars(table, window),
            "spark": self.spark.sql(sql).toArrow(),
        }


def read_by_pyiceberg(table: Table, window: Window | None) -> pa.Table:
    if window is None:
        return table.scan().to_arrow()
    start, end = window.start.isoformat(), window.end.isoformat()
    return table.scan(f"{window.column} >= '{start}' AND {window.column} < '{end}'").to_arrow()


def read_by_polars(table: Table, window: Window | None) -> pa.Table:
    frame = pl.scan_iceberg(table)
    if window is not None:
        frame = frame.filter(pl.col(window.column).is_between(window.start, window.end, closed="left"))
    return frame.collect().to_arrow()


def assert_all_readers_agree(lake: Lake, spark: "SparkSession") -> dict[str, Contents]:
    """Assert that all readers see the same rows in every table, in the whole and in a window. Return them by layer."""
    readers, seen = Readers(lake, spark), {}
    for layer in LAYERS:
        seen[layer] = agreed(layer, readers.read(layer))
        column = definition(lake, layer).layer.time_column
        window = middle(seen[layer], column)
        place = list(seen[layer].columns).index(column)
        wanted = Counter({row: n for row, n in seen[layer].rows.items() if window.holds(row[place])})
        assert wanted
        assert agreed(f"{layer} in a window", readers.read(layer, window)).rows == wanted
        assert_extremes(readers, layer, seen[layer], definition(lake, layer).layer.pruned_by)
    return seen


def agreed(what: str, tables: Mapping[str, pa.Table]) -> Contents:
    """Assert that all readers see the same, and return it."""
    seen = {reader: contents(table) for reader, table in tables.items()}
    first = seen.pop("pyiceberg")
    for reader, theirs in seen.items():
        assert theirs.columns == first.columns, f"{reader}, {what}"
        assert theirs.rows == first.rows, f"{reader}, {what}"
    return first


def middle(whole: Contents, column: str) -> Window:
    """Return the window that holds the middle half of a table's rows."""
    place = list(whole.columns).index(column)
    times = sorted(row[place] for row in whole.rows.elements() if row[place] is not None)
    return Window(column, times[len(times) // 4], times[len(times) * 3 // 4])


def assert_extremes(readers: Readers, layer: str, whole: Contents, described: tuple[str, ...] | None) -> None:
    """Assert that SQL's count, min and max of the `described` columns (None: all) are those of the rows.

    Spark answers them from manifests alone.
    """
    kept = {
        name: column
        for name, column in whole.columns.items()
        if isinstance(column.minimum, int | Decimal | date) and (described is None or name in described)
    }
    asked = ", ".join(f'count("{name}"), min("{name}"), max("{name}")' for name in kept)
    sql = f"SELECT count(*), {asked} FROM {readers.tables[layer].name()[-1]}"
    by_spark = readers.spark.sql(sql)
    assert "LocalTableScan" in by_spark._jdf.queryExecution().toString(), "Spark reads the data files"
    wanted = [whole.rows.total(), *(v for c in kept.values() for v in (c.values, c.minimum, c.maximum))]
    for answer in (readers.duckdb.sql(sql).to_arrow_table(), by_spark.toArrow()):
        assert [column[0].as_py() for column in answer.columns] == wanted


def assert_queried(lake: Lake, seen: Mapping[str, Contents]) -> None:
    """Assert that `k2flow query` counts the same rows."""
    counts = ", ".join(f"(SELECT count(*) FROM {lake.table(layer).name()[-1]}) AS {layer}" for layer in LAYERS)
    done = lake.command("query", f"SELECT {counts}", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {layer: seen[layer].rows.total() for layer in LAYERS}


def test_all_readers_see_the_same_rows_before_and_after_maintenance(new_lake: NewLake, spark: "SparkSession") -> None:
    lake = new_lake(partitions=3)
    send_days(lake, days=1, a_day=1_500)
    lake.catch_up(**batches(100), K2FLOW_LOG_LEVEL="WARNING")
    before = assert_all_readers_agree(lake, spark)
    for layer in LAYERS:
        empty = [name for name, column in before[layer].columns.items() if not column.values]
        assert not empty, f"{layer}: {empty} hold no value that could differ"
    assert "compaction" in maintain(lake, "--orphan-older-than", "0s", "--reader-grace", "0s")
    assert assert_all_readers_agree(lake, spark) == before
    assert_queried(lake, before)


def test_spark_reads_a_pinned_snapshot_while_the_table_changes(new_lake: NewLake, spark: "SparkSession") -> None:
    """Each read is of the snapshot that was newest at the read before: since then the flow wrote and files merged."""
    lake = new_lake(partitions=3)
    send_days(lake, days=1, a_day=1_000)
    lake.catch_up(**batches(100), K2FLOW_LOG_LEVEL="WARNING")
    newest = {layer: newest_snapshot(lake.table(layer)) for layer in LAYERS}
    overtaken: Counter[str] = Counter()
    with lake.start(K2FLOW_BINANCE_TRIGGER_SECONDS="1") as flow, maintaining(lake), sending(lake):
        log = lake.home / "maintain.log"
        deadline = time.monotonic() + DEADLINE_SECONDS
        while min(overtaken[layer] for layer in LAYERS) < LOOKS or "compaction" not in log.read_text():
            assert time.monotonic() < deadline, f"{overtaken}\n{log.read_text()}\n{flow.log()}"
            for layer in LAYERS:
                table, pinned = lake.table(layer), newest[layer]
                ours = contents(table.scan(snapshot_id=pinned).to_arrow())
                theirs = contents(read_by_spark(spark, table.metadata_location, pinned).toArrow())
                assert theirs == ours, layer
                newest[layer] = newest_snapshot(table)
                overtaken[layer] += newest[layer] != pinned
        flow.signal(signal.SIGTERM)
        written = flow.wait()
        assert flow.codes() == [0], written


@contextmanager
def sending(lake: Lake) -> Iterator[None]:
    """Produce trades, bad ones and duplicates included, while the context lasts."""
    over = threading.Event()

    def send() -> None:
        for seed in itertools.takewhile(lambda _: not over.is_set(), itertools.count(100)):
            fill(lake, count=200, rate=200, bad=0.05, duplicates=0.03, seed=seed)

    with ThreadPoolExecutor() as pool:
        sent = pool.submit(send)
        try:
            yield
        finally:
            over.set()
        sent.result()


def newest_snapshot(table: Table) -> int:
    snapshot = table.current_snapshot()
    assert snapshot is not None
    return snapshot.snapshot_id
