"""Consumers that follow a table by its changes hold exactly its rows, whatever happened since they last read."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import In
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation, ancestors_of

from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.changes import MAX_REPLACED, Position, changes, note_replaced
from k2flow.iceberg.manifests import partition_values
from k2flow.iceberg.rewrite import expire_snapshots, rewrite_files
from k2flow.iceberg.snapshots import SnapshotExpiration, plan_expiration
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import GOLD, GOLD_TABLE
from k2flow.maintain.compaction import Compactor
from k2flow.maintain.plans import LiveFile, live_files
from k2flow.maintain.storage import path_of
from tests.gold import EXCHANGES, HOUR, Gold

HOURS = 5
FIRST_HOUR = int(datetime(2026, 1, 1, 22, tzinfo=UTC).timestamp()) // HOUR  # so that the hours are in two days
STEPS = 25


def ids_of(files: Iterable[DataFile]) -> Counter[str]:
    found: Counter[str] = Counter()
    for file in files:
        found.update(
            pq.read_table(path_of(file.file_path), columns=["message_id"], partitioning=None)["message_id"].to_pylist()
        )
    return found


def rows_of(table: Table) -> Counter[str]:
    """Return the ids of the table's rows, read by PyIceberg."""
    return Counter(table.scan(selected_fields=("message_id",)).to_arrow()["message_id"].to_pylist())


class Consumer:
    """Adds up what the changes of a table say."""

    def __init__(self) -> None:
        self._after: Position | None = None
        self._ids: dict[tuple[int, ...], Counter[str]] = {}
        self.whole: list[str] = []
        self.at_end = False
        self.files = 0

    def read(self, table: Table, max_rows: int | None = None) -> Counter[str]:
        found = changes(table, self._after, lambda partition: self._ids.get(partition, Counter()).total(), max_rows)
        if found.whole:
            self.whole.append(found.whole)
            self._ids = {}
        for file in found.appended:
            self._ids.setdefault(partition_values(file), Counter()).update(ids_of([file]))
        self._ids |= {partition: ids_of(files) for partition, files in found.replaced.items()}
        self._after = found.position
        self.at_end = found.position.sequence_number == (table.current_snapshot().sequence_number or 0)
        self.files = len(found.appended) + sum(map(len, found.replaced.values()))
        return sum(self._ids.values(), Counter())


class History:
    """Random commits to Gold, by k2flow and by other programs."""

    def __init__(self, catalog: Catalog, seed: int) -> None:
        self.gold = Gold(catalog)
        self._catalog = catalog
        self._chance = random.Random(seed)
        self.own: tuple[Callable[[], None], ...] = (
            self.append, self.append, self.append, self.compact, self.replace_rows, self.remove_partition, self.expire,
        )  # fmt: skip
        self.foreign: tuple[Callable[[], None], ...] = (self.delete_by_filter, self.roll_back)

    def step(self, steps: tuple[Callable[[], None], ...]) -> None:
        self._chance.choice(steps)()

    def table(self) -> Table:
        return load_table(self._catalog, GOLD_TABLE)

    def append(self) -> None:
        hours = [FIRST_HOUR + self._chance.randrange(HOURS) for _ in range(self._chance.randint(1, 4))]
        exchange = self._chance.choice(EXCHANGES)
        self.gold.start(exchange, "accept")
        self.gold.add(exchange, np.array(hours))

    def _some_files(self) -> list[LiveFile]:
        files = live_files(self.table(), "timestamp")
        if not files:
            return []
        partition = self._chance.choice(files).partition
        own = [live for live in files if live.partition == partition]
        return self._chance.sample(own, self._chance.randint(1, len(own)))

    def compact(self) -> None:
        if files := self._some_files():
            new = Compactor(self.table(), self.gold.definition).compact(files)
            self._rewrite(Operation.REPLACE, files, new)

    def replace_rows(self) -> None:
        """Remove a row of some files, as `k2flow reprocess` does: perhaps no row is left."""
        if files := self._some_files():
            rows = pa.concat_tables(
                pq.read_table(path_of(live.file.file_path), partitioning=None) for live in files
            ).slice(1)
            writer = DataFileWriter(self.table(), self.gold.definition)
            batches = rows.cast(GOLD.arrow_schema).combine_chunks().to_batches()
            self._rewrite(Operation.OVERWRITE, files, [file for batch in batches for file in writer.write(batch)])

    def remove_partition(self) -> None:
        """Remove all files of a partition, as retention does."""
        files = live_files(self.table(), "timestamp")
        if files:
            gone = [live for live in files if live.partition == self._chance.choice(files).partition]
            self._rewrite(Operation.DELETE, gone, [])

    def expire(self) -> None:
        """Expire all snapshots but the head."""

        def plan(table: Table) -> SnapshotExpiration:
            head = table.metadata.current_snapshot_id
            tags = plan_expiration(table.metadata, 2**62).tags
            ids = tuple(each.snapshot_id for each in table.metadata.snapshots if each.snapshot_id != head)
            return SnapshotExpiration(ids, tags)

        expire_snapshots(self._catalog, GOLD_TABLE, plan)

    def delete_by_filter(self) -> None:
        """Delete rows by another program: some files are removed or rewritten, others stay."""
        if ids := list(rows_of(self.table())):
            self.table().delete(In("message_id", self._chance.sample(ids, min(2, len(ids)))))

    def roll_back(self) -> None:
        table = self.table()
        if earlier := list(ancestors_of(table.current_snapshot(), table.metadata))[1:]:
            table.manage_snapshots().rollback_to_snapshot(self._chance.choice(earlier).snapshot_id).commit()

    def _rewrite(self, operation: Operation, files: list[LiveFile], new: list[DataFile]) -> None:
        paths = [live.file.file_path for live in files]
        if paths:
            assert rewrite_files(self._catalog, GOLD_TABLE, operation, paths, new, 0)


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))])
def test_consumers_hold_the_rows_of_the_table(catalog: Catalog, seed: int, number: int) -> None:
    """Consumers at random places of a random history, in which other programs also remove rows."""
    chance = random.Random(seed + number)
    history = History(catalog, seed + number)
    consumers = [Consumer() for _ in range(3)]
    for _ in range(STEPS):
        history.step((*history.own, *history.foreign) if number % 2 else history.own)
        for consumer in consumers:
            if chance.random() < 0.4:
                assert consumer.read(history.table()) == rows_of(history.table())
    for consumer in consumers:
        assert consumer.read(history.table()) == rows_of(history.table())
        if number % 2 == 0:  # no commit of k2flow makes a consumer start from the beginning
            assert consumer.whole == ["it was not read before"]


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))])
def test_a_consumer_may_read_in_parts(catalog: Catalog, seed: int, number: int) -> None:
    """After the last part it holds the rows of the table, though commits come between the parts."""
    chance = random.Random(seed + number)
    history, consumer = History(catalog, seed + number), Consumer()
    for _ in range(STEPS):
        history.step((*history.own, *history.foreign) if number % 2 else history.own)
        if chance.random() < 0.7:
            found = consumer.read(history.table(), max_rows=chance.randint(1, 6))
            assert not consumer.at_end or found == rows_of(history.table())
    for _ in range(1_000):
        found = consumer.read(history.table(), max_rows=chance.randint(1, 6))
        if consumer.at_end:
            break
    assert found == rows_of(history.table())
    if number % 2 == 0:
        assert consumer.whole == ["it was not read before"]


def test_compaction_of_old_rows_is_no_change(catalog: Catalog, seed: int) -> None:
    history, consumer = History(catalog, seed), Consumer()
    for _ in range(10):
        history.append()
    consumer.read(history.table())
    for _ in range(5):
        history.compact()
        consumer.read(history.table())
        assert consumer.files == 0
    history.append()
    assert consumer.read(history.table()) == rows_of(history.table())
    assert 0 < consumer.files <= 4


def test_manifests_of_before_are_not_read(catalog: Catalog, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    history, consumer = History(catalog, seed), Consumer()
    for _ in range(10):
        history.append()
    consumer.read(history.table())
    history.append()
    opened: list[str] = []
    table = history.table()
    new_input = table.io.new_input
    monkeypatch.setattr(table.io, "new_input", lambda path: opened.append(path) or new_input(path))
    consumer.read(table)
    assert len(opened) <= 2, opened  # the manifest list, and one manifest


@pytest.mark.parametrize("expired", [False, True])
def test_a_moved_main_branch_is_seen_though_the_numbers_of_rows_agree(catalog: Catalog, expired: bool) -> None:
    """As many rows are deleted as appended, and the consumer reads. Main goes back, and as many others are appended."""
    history, consumer = History(catalog, 1), Consumer()
    for _ in range(2):
        history.gold.add("binance", np.full(2, FIRST_HOUR))
    earlier = history.table().metadata.current_snapshot_id
    history.table().delete(In("message_id", ["binance-0", "binance-2"]))
    history.gold.start("binance", "accept")
    history.gold.add("binance", np.full(2, FIRST_HOUR))
    consumer.read(history.table())
    left = history.table().metadata.current_snapshot_id
    history.table().manage_snapshots().rollback_to_snapshot(earlier).commit()
    history.gold.start("binance", "accept")
    history.gold.add("binance", np.full(2, FIRST_HOUR))
    if expired:
        expire_snapshots(catalog, GOLD_TABLE, lambda table: SnapshotExpiration((left,), ()))
    assert consumer.read(history.table()) == rows_of(history.table())
    assert consumer.whole[1:] == ["its main branch was moved to another snapshot"]


def test_many_replaced_partitions_are_forgotten(catalog: Catalog) -> None:
    """The property stays small, and a consumer that is too far behind reads the table whole."""
    history, consumer = History(catalog, 1), Consumer()
    history.append()
    consumer.read(history.table())
    for day in range(2):
        table = history.table()
        noted = note_replaced(table.metadata, [(day, i) for i in range(MAX_REPLACED)])
        table.transaction().set_properties(noted.updates).commit_transaction()
        history.append()
    assert len(str(history.table().properties)) < 40 * MAX_REPLACED
    assert consumer.read(history.table()) == rows_of(history.table())
    assert consumer.whole[1:] == ["many of its partitions were replaced"]
