"""One consistent set of tables: the snapshot of each that is inspected.

No transaction spans tables, and a flow commits to its tables in any order. So no two tables are assumed to hold the
same offsets. Each table's ledger names exactly those that its snapshot holds, and every comparison of two tables leaves
out what one of them does not hold yet. That is correct for any set of snapshots.

The order in which they are taken only decides how much is left out: **Gold first, then the other tables, Bronze last**,
and Bronze again until it holds what the others do. Bronze is what the others are compared with, and it knows each row's
offset. A row of Silver or Gold that Bronze does not explain yet would have to be read from Kafka.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from k2flow.errors import AuditError
from k2flow.exchange import Exchange
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import NAMESPACE, find_table
from k2flow.iceberg.commit import REPLACED_KEY, STAGED_KEY
from k2flow.iceberg.ledger import Ledger
from k2flow.iceberg.tables import retention_days
from k2flow.layers import BRONZE, Layer

WAIT_SECONDS = 3.0
DAY_MS = 86_400_000
UNIX_EPOCH = date(1970, 1, 1)
FIRST_DAY = (date.min - UNIX_EPOCH).days  # 0001-01-01 in days since 1970: the earliest day of any row
LAST_DAY = (date.max - UNIX_EPOCH).days
_FIRST_METADATA = re.compile(r"/0+-[^/]*$")


@dataclass(frozen=True, kw_only=True)
class PinnedTables:
    """The tables of one exchange, by layer; `table.metadata` does not change any more."""

    exchange: Exchange
    number: int
    tables: Mapping[Layer, Table]
    ledgers: Mapping[Layer, Ledger]
    today: date

    def name(self, layer: Layer) -> str:
        """Return the name of a layer's table."""
        return layer.table(self.exchange.name)

    def cutoff(self, layer: Layer) -> date:
        """Return the first day that the table keeps. Rows of earlier days may be removed or not, and are left out."""
        return UNIX_EPOCH + timedelta(self.cutoff_day(layer))

    def cutoff_day(self, layer: Layer) -> int:
        """Return `cutoff` in days since 1970. Raises TableDiffersError if the retention is no number."""
        days = retention_days(self.tables[layer])
        return FIRST_DAY if days is None else max(FIRST_DAY, (self.today - UNIX_EPOCH).days - days)

    def created_after_cutoff(self, layer: Layer) -> bool:
        """Return whether the table was created on its cutoff day or later, so that retention removed none of its rows.

        False also if this is unknown, because the log of metadata files no longer reaches back to the first.
        """
        metadata = self.tables[layer].metadata
        log = [(entry.metadata_file, entry.timestamp_ms) for entry in metadata.metadata_log]
        log.append((self.tables[layer].metadata_location, metadata.last_updated_ms))
        cutoff_ms = self.cutoff_day(layer) * DAY_MS
        return any(_FIRST_METADATA.search(file) and ms >= cutoff_ms for file, ms in log)


def pin(catalog: Catalog, exchanges: Sequence[Exchange]) -> tuple[list[PinnedTables], list[Exchange]]:
    """Return the snapshots of each exchange's tables, and the exchanges that have no table at all.

    No snapshot is taken during the publication of replaced rows (k2flow.iceberg.staging). Raises AuditError if some of
    an exchange's tables are missing or such a publication does not end, CommitError if a ledger is unreadable, and
    CatalogError.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        before = {each.name: _replacement(find_table(catalog, each.bronze), each) for each in exchanges}
        pinned, absent = _pin(catalog, exchanges)
        replacing = [
            each.exchange.name
            for each in pinned
            if (now := _replacement(each.tables[BRONZE], each.exchange)).staged or now != before[each.exchange.name]
        ]
        if not replacing:
            return pinned, absent
        if time.monotonic() > deadline:
            raise AuditError(
                f"rows of {' and '.join(replacing)} are being replaced and not yet in all tables: try again. If no "
                "process replaces them, the next start of the flow or `k2flow reprocess` completes it"
            )
        time.sleep(0.1)


class _Replacement(NamedTuple):
    """The replacements of rows in Bronze's properties: the one being published, and the one published last."""

    staged: str | None
    replaced: str | None


def _replacement(bronze: Table | None, exchange: Exchange) -> _Replacement:
    properties = bronze.properties if bronze else {}
    return _Replacement(properties.get(STAGED_KEY + exchange.name), properties.get(REPLACED_KEY + exchange.name))


def _pin(catalog: Catalog, exchanges: Sequence[Exchange]) -> tuple[list[PinnedTables], list[Exchange]]:
    names = [layer.table(each.name) for each in exchanges for layer in each.layers if layer.shared]
    shared = {name: find_table(catalog, name) for name in dict.fromkeys(names)}
    pinned: list[PinnedTables] = []
    absent = []
    for exchange in exchanges:
        tables = _find_own(catalog, exchange)
        if not any(tables.values()):
            absent.append(exchange)
            continue
        tables |= {layer: shared[layer.table(exchange.name)] for layer in exchange.layers if layer.shared}
        found = {layer: table for layer in exchange.layers if (table := tables[layer]) is not None}
        missing = [f"{NAMESPACE}.{layer.table(exchange.name)}" for layer in exchange.layers if layer not in found]
        if missing:
            raise AuditError(f"{' and '.join(missing)} cannot be audited: there is no such table")
        pinned.append(_with_bronze(catalog, exchange, len(pinned), found))
    return pinned, absent


def _find_own(catalog: Catalog, exchange: Exchange) -> dict[Layer, Table | None]:
    """Return the tables that belong to this exchange alone, Bronze loaded last."""
    own: Iterable[Layer] = (layer for layer in reversed(exchange.layers) if not layer.shared)
    return {layer: find_table(catalog, layer.table(exchange.name)) for layer in own}


def _with_bronze(catalog: Catalog, exchange: Exchange, number: int, tables: dict[Layer, Table]) -> PinnedTables:
    """Load Bronze again until its ledger covers the others' or WAIT_SECONDS have passed."""
    deadline = time.monotonic() + WAIT_SECONDS
    topic = exchange.settings.topic
    while True:
        read = {layer: ledgers.read(table.properties, exchange.name, topic) for layer, table in tables.items()}
        behind = any(
            extent.next > (read[BRONZE].next_offset(p) or 0)
            for ledger in read.values()
            for p, extent in ledger.partitions.items()
        )
        if not behind or time.monotonic() > deadline:
            today = datetime.now(UTC).date()
            return PinnedTables(exchange=exchange, number=number, tables=tables, ledgers=read, today=today)
        time.sleep(0.1)
        bronze = find_table(catalog, exchange.bronze)
        if bronze is None:
            raise AuditError(f"{NAMESPACE}.{exchange.bronze} was dropped during the audit")
        tables = {**tables, BRONZE: bronze}
