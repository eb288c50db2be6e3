"""The candles against Gold: `candle_rows` computes them again from its trades, and each one must be equal.

A property of the table names the snapshot of Gold that its candles are of. They are compared with that one, though Gold
may have newer ones: late candles are not wrong. If it has expired, only hours that did not change since can be compared
(k2flow.iceberg.changes). Each check proves:

- `candles_missing`, `candles_unexpected`, `candles_duplicated`, `candles_differ`: there is one candle for each
  exchange, symbol and minute with trades, with the values that they give in all columns, and no other.
- `candles_source`: the property names the snapshot of Gold that the table's ledger does, with as many trades.
- `candles_behind`: the hours that cannot be compared, or (a note) that Gold's main no longer has the snapshot.
- `head_moved`, `file_partition`, `file_order`: as of the other tables.

An hour whose files of Gold and of candles are those of an earlier audit is not read again.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple

import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import FileScanTask, Table
from pyiceberg.table.snapshots import Snapshot

from k2flow.audit.candle_rows import SCHEMA, CandleRows
from k2flow.audit.file_checks import FileChecks
from k2flow.audit.report import AuditReport, Severity
from k2flow.batches import gathered
from k2flow.errors import AuditError
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import find_table, load_table
from k2flow.iceberg.changes import Partition, Position, changes, files_of
from k2flow.iceberg.deletes import applied_deletes, deletes_text
from k2flow.iceberg.head import head_problem
from k2flow.iceberg.ledger import Ledger
from k2flow.iceberg.manifests import hour_of, partition_values
from k2flow.iceberg.snapshots import main_lacks
from k2flow.inspection.files import Progress, ReadPlan, prefetch, read
from k2flow.inspection.row_hashes import open_row_hashes
from k2flow.layers import CANDLES, CANDLES_TABLE, GOLD, GOLD_TABLE, Layer

SOURCE_KEY = "k2flow.source"
BATCH_ROWS = 100_000
GROUP_TRADES, GROUP_CANDLES = 1_000_000, 100_000  # hours with as many together are compared at once
COLUMNS = ("exchange", "symbol", "timestamp", "trade_id", "message_id", "price", "quantity", "side")
FORMAT = 1
START = "start the candles flow: it computes all candles again"
AGAIN = "start the candles flow, and audit again"
Files = Mapping[Partition, Sequence[DataFile]]
Digests = Mapping[Partition, str]


class HourFiles(NamedTuple):
    """The data files of one hour, of Gold and of the candles."""

    trades: Sequence[DataFile]
    candles: Sequence[DataFile]

    @property
    def digest(self) -> str:
        """What is the same in two audits only if the hour has the same files. No file ever changes."""
        paths = [sorted(file.file_path for file in files) for files in self]
        return hashlib.blake2b(json.dumps([FORMAT, version("k2flow"), paths]).encode(), digest_size=16).hexdigest()


class ProvenHours(NamedTuple):
    """The digests of the hours that earlier audits have compared, and the share of them that is read again."""

    digests: Digests
    sample: float = 0.0
    seed: int | None = None


NOTHING_PROVEN = ProvenHours({})


def audit_candles(
    catalog: Catalog,
    report: AuditReport,
    progress: Progress,
    proven: ProvenHours = NOTHING_PROVEN,
    first_hour: int | None = None,
) -> Digests:
    """Check the candle table, if there is one, and return the digests of the hours that are right.

    `first_hour` (since 1970): leave earlier hours out. Raises CatalogError, CommitError if a ledger is unreadable, and
    AuditError if another engine's delete files apply to a table or a file cannot be read. Memory: the database's.
    """
    table = find_table(catalog, CANDLES_TABLE)
    if table is None:
        return {}
    gold = load_table(catalog, GOLD_TABLE)  # after the candles: it has their snapshot, unless that has expired
    _describe(report, table)
    ledger = ledgers.read(table.properties, CANDLES.name, GOLD_TABLE)
    if problem := head_problem(table.metadata, CANDLES.name, ledger):
        text = f"main was moved to another snapshot, or the ledger was edited: {problem}; {START}"
        report.add("head_moved", Severity.BROKEN, text, table=CANDLES_TABLE)
    found = _Source(report, table, gold, ledger).find()
    if found is None:
        return {}
    hours = {each: files for each, files in found.hours.items() if first_hour is None or hour_of(each) >= first_hour}
    known = {each: files for each, files in hours.items() if proven.digests.get(each) == files.digest}
    again = random.Random(proven.seed).sample(sorted(known), -int(-len(known) * proven.sample // 1))
    report.sampled_files += sum(len(files) for each in again for files in known.pop(each))
    due = {each: files for each, files in hours.items() if each not in known}
    right = known | _compare(report, progress, table, found.gold, due)
    return {each: files.digest for each, files in right.items()}


class _Found(NamedTuple):
    """Gold as its trades are compared, and the files of the hours that can be."""

    gold: Table
    hours: Mapping[Partition, HourFiles]


class _Source:
    """Finds the trades that the candles are of, and reports what the table says wrongly about them."""

    def __init__(self, report: AuditReport, table: Table, gold: Table, ledger: Ledger) -> None:
        self._report = report
        self._table = table
        self._gold = gold
        self._ledger = ledger
        self._complete = True  # whether the candles are of Gold at a snapshot, not of a part of its changes

    def find(self) -> _Found | None:
        """Return the files to compare; None, and a finding, if no hour can be compared."""
        held = self._ledger.partitions.get(0)
        number = held.next - 1 if held else 0
        self._check_property(number if held else None)
        if held is None or number == 0:  # nothing was committed yet, or Gold had nothing
            return self._with_candles(self._gold, {})
        if self._ledger.topic_id != str(self._gold.metadata.table_uuid):
            self._unknown(f"they are of another table {GOLD_TABLE}, which this one has replaced: {START}")
            return None
        snapshots = self._gold.metadata.snapshots if self._complete else ()
        if snapshot := next((each for each in snapshots if each.sequence_number == number), None):
            return self._of_snapshot(snapshot, held.rows)
        return self._unchanged(Position(self._gold.metadata.table_uuid, number, held.rows))

    def _check_property(self, number: int | None) -> None:
        text = self._table.properties.get(SOURCE_KEY)
        wanted = None if number is None else {"table_uuid": self._ledger.topic_id, "sequence_number": number}
        try:
            found = None if text is None else json.loads(text)
        except ValueError:
            found = text
        if isinstance(found, dict):
            self._complete = found.pop("complete", True) is not False
        if found != wanted:
            what = "the ledger names no snapshot" if wanted is None else f"the ledger says {json.dumps(wanted)}"
            self._broken(
                f"property {SOURCE_KEY} is {text or 'absent'}, and {what}: the next commit of the candles flow sets it"
            )

    def _of_snapshot(self, snapshot: Snapshot, rows: int) -> _Found:
        number = snapshot.sequence_number or 0
        if main_lacks(self._gold.metadata, number):
            text = f"they are of {GOLD_TABLE} at sequence number {number}, and its main was moved to another snapshot"
            self._report.add("candles_behind", Severity.NOTE, f"{text}: {START}", table=CANDLES_TABLE)
        gold = _as_of(self._gold, snapshot)
        files = files_of(gold)
        trades = sum(file.record_count for some in files.values() for file in some)
        if trades != rows:
            text = f"the ledger counts {rows:,} trades, {GOLD_TABLE} had {trades:,} at sequence number {number}"
            self._broken(f"{text}: {START}")
        return self._with_candles(gold, files)

    def _unchanged(self, position: Position) -> _Found | None:
        """Return the hours in which Gold has not changed since a snapshot that it no longer has."""
        feed = changes(self._gold, position, self._trades_in)
        since = f"they are of {GOLD_TABLE} at sequence number {position.sequence_number}, whose snapshot has expired"
        if not self._complete:
            since = (
                f"they are of a part of the changes of {GOLD_TABLE}, up to sequence number {position.sequence_number}"
            )
        if feed.whole:
            self._unknown(f"{since}, and {feed.whole}: {AGAIN}")
            return None
        changed = {*feed.replaced, *map(partition_values, feed.appended)}
        if changed:
            text = f"{since}: {len(changed):,} hours have changed since, and are not compared: {AGAIN}"
            self._unknown(text, len(changed))
        found = self._with_candles(self._gold, files_of(self._gold))
        return found._replace(hours={partition: found.hours[partition] for partition in found.hours.keys() - changed})

    def _trades_in(self, partition: Partition) -> int:
        files = files_of(self._table, [partition])[partition]
        batches = read(_plan(CANDLES, self._table, files), ("trades",), None, lambda _: None)
        return sum(pc.sum(batch.column("trades")).as_py() or 0 for batch in batches)

    def _with_candles(self, gold: Table, trades: Files) -> _Found:
        for table, name in ((gold, GOLD_TABLE), (self._table, CANDLES_TABLE)):
            if deletes := applied_deletes(table, table.current_snapshot()):
                raise AuditError(deletes_text(name, deletes))
        candles = files_of(self._table)
        hours = sorted({*trades, *candles})
        return _Found(gold, {each: HourFiles(trades.get(each, ()), candles.get(each, ())) for each in hours})

    def _broken(self, text: str) -> None:
        self._report.add("candles_source", Severity.BROKEN, text, table=CANDLES_TABLE)

    def _unknown(self, text: str, count: int = 1) -> None:
        self._report.add("candles_behind", Severity.UNKNOWN, text, count, table=CANDLES_TABLE)


def _compare(
    report: AuditReport, progress: Progress, table: Table, gold: Table, hours: Mapping[Partition, HourFiles]
) -> dict[Partition, HourFiles]:
    """Compare some hours. Report what is wrong, and return the hours in which nothing is."""
    right: dict[Partition, HourFiles] = {}
    total = sum(file.record_count for some in hours.values() for files in some for file in files)
    progress(CANDLES_TABLE, 0, total)

    def advance(rows: int) -> None:
        report.rows += rows
        progress(CANDLES_TABLE, rows, total)

    checks = FileChecks(_plan(CANDLES, table, ()))
    with open_row_hashes(SCHEMA) as store:
        candle_rows = CandleRows(store)
        for group in _groups(hours):
            trades, candles = ([file for some in group.values() for file in some[i]] for i in range(2))
            for batch in prefetch(gathered(read(_plan(GOLD, gold, trades), COLUMNS, None, advance), BATCH_ROWS)):
                candle_rows.add_trades(batch)
            for batch in prefetch(
                gathered(read(_plan(CANDLES, table, candles), CANDLES.columns, checks, advance), BATCH_ROWS)
            ):
                candle_rows.add_candles(batch)
            if candle_rows.compare():
                right |= group
        candle_rows.report(report)
    checks.report(report)
    return right


def _groups(hours: Mapping[Partition, HourFiles]) -> Iterator[dict[Partition, HourFiles]]:
    """Yield hours together until they have GROUP_TRADES trades or GROUP_CANDLES candles, and then the next ones."""
    group: dict[Partition, HourFiles] = {}
    trades = candles = 0
    for partition, files in hours.items():
        group[partition] = files
        trades += sum(file.record_count for file in files.trades)
        candles += sum(file.record_count for file in files.candles)
        if trades >= GROUP_TRADES or candles >= GROUP_CANDLES:
            yield group
            group, trades, candles = {}, 0, 0
    if group:
        yield group


def _plan(layer: Layer, table: Table, files: Sequence[DataFile]) -> ReadPlan:
    return ReadPlan(layer, table, [FileScanTask(file) for file in files], 0)


def _as_of(table: Table, snapshot: Snapshot) -> Table:
    """Return a table as it was at one of its snapshots."""
    metadata = table.metadata.model_copy(update={"current_snapshot_id": snapshot.snapshot_id})
    return Table(table.name(), metadata, table.metadata_location, table.io, table.catalog)


def _describe(report: AuditReport, table: Table) -> None:
    snapshot = table.current_snapshot()
    report.tables[CANDLES_TABLE] = {
        "snapshot_id": snapshot.snapshot_id if snapshot else None,
        "metadata": table.metadata_location,
        "rows": sum(file.record_count for files in files_of(table).values() for file in files),
    }
