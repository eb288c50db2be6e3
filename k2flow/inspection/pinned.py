"""One consistent set of tables: which snapshot of each is audited.

No transaction spans tables, and a flow commits to its four in any order. So the audit never takes two tables to hold
the same offsets: each table's ledger says exactly which ones its snapshot holds, and every comparison of two tables
leaves out what one of them does not hold yet. That is right for any set of snapshots. The order in which they are taken
only decides how much is left out: **Gold first, then Silver and the dead letters, Bronze last**, and Bronze again until
it holds what the others do. For Bronze is what the others are compared with, and says of each row which offset it came
from; a row of Silver or Gold that Bronze does not explain yet would have to be read from Kafka.
"""

import re
import time
from collections.abc import Sequence
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
from k2flow.iceberg.tables import RETENTION
from k2flow.layers import GOLD_TABLE

LAYERS = ("bronze", "silver", "dlq", "gold")
WAIT_SECONDS = 3.0
_FIRST_METADATA = re.compile(r"/0+-[^/]*$")


@dataclass(frozen=True)
class PinnedTables:
    """The four tables of an exchange as they are audited, by layer; `table.metadata` does not change any more."""

    exchange: Exchange
    number: int
    tables: dict[str, Table]
    ledgers: dict[str, Ledger]
    today: date

    def name(self, layer: str) -> str:
        return table_name(self.exchange, layer)

    def cutoff(self, layer: str) -> date:
        """The first day that the table keeps; earlier ones may be gone or not yet, and are left out of the audit."""
        days = self.tables[layer].properties.get(RETENTION)
        return date.min if days is None else self.today - timedelta(int(days))

    def cutoff_day(self, layer: str) -> int:
        """`cutoff` in days since 1970."""
        return (self.cutoff(layer) - date(1970, 1, 1)).days

    def too_young_to_expire(self, layer: str) -> bool:
        """Whether the table was made after its cutoff, so that retention cannot have removed any Bronze row of it.

        False also where it cannot be told, because the log of metadata files no longer goes back to the first.
        """
        metadata = self.tables[layer].metadata
        log = [(entry.metadata_file, entry.timestamp_ms) for entry in metadata.metadata_log]
        log.append((self.tables[layer].metadata_location, metadata.last_updated_ms))
        cutoff = self.cutoff(layer)
        return any(
            _FIRST_METADATA.search(file) and datetime.fromtimestamp(ms / 1000, UTC).date() >= cutoff for file, ms in log
        )


def table_name(exchange: Exchange, layer: str) -> str:
    names = {"bronze": exchange.bronze, "silver": exchange.silver, "dlq": exchange.dlq, "gold": GOLD_TABLE}
    return names[layer]


def pin(catalog: Catalog, exchanges: Sequence[Exchange]) -> tuple[list[PinnedTables], list[Exchange]]:
    """The snapshots to audit, and the exchanges of which there is no table at all.

    None are from amid the publication of replaced rows (k2flow.iceberg.staging). Raises AuditError where some of an exchange's
    tables are missing, or where such a publication does not end, CatalogError, CommitError for an unreadable ledger.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        before = {exchange.name: _replacing(find_table(catalog, exchange.bronze), exchange) for exchange in exchanges}
        pinned, absent = _pin(catalog, exchanges)
        amid = [
            each.exchange.name
            for each in pinned
            if (now := _replacing(each.tables["bronze"], each.exchange)).staged or now != before[each.exchange.name]
        ]
        if not amid:
            return pinned, absent
        if time.monotonic() > deadline:
            raise AuditError(
                f"rows of {' and '.join(amid)} are being replaced and not yet in all tables: try again. If nobody does "
                "it any more, the next start of the flow or `k2flow reprocess` finishes it"
            )
        time.sleep(0.1)


class Replacing(NamedTuple):
    """What Bronze says of replaced rows: what is being published, and what was published last."""

    staged: str | None
    replaced: str | None


def _replacing(bronze: Table | None, exchange: Exchange) -> Replacing:
    properties = bronze.properties if bronze else {}
    return Replacing(properties.get(STAGED_KEY + exchange.name), properties.get(REPLACED_KEY + exchange.name))


def _pin(catalog: Catalog, exchanges: Sequence[Exchange]) -> tuple[list[PinnedTables], list[Exchange]]:
    gold = find_table(catalog, GOLD_TABLE)
    pinned: list[PinnedTables] = []
    absent = []
    for exchange in exchanges:
        tables = {layer: find_table(catalog, table_name(exchange, layer)) for layer in ("silver", "dlq", "bronze")}
        if not any(tables.values()):
            absent.append(exchange)
            continue
        tables["gold"] = gold
        found = {layer: table for layer, table in tables.items() if table is not None}
        missing = [f"{NAMESPACE}.{table_name(exchange, layer)}" for layer in LAYERS if layer not in found]
        if missing:
            raise AuditError(f"{' and '.join(missing)} cannot be audited: there is no such table")
        pinned.append(_with_bronze(catalog, exchange, len(pinned), found))
    return pinned, absent


def _with_bronze(catalog: Catalog, exchange: Exchange, number: int, tables: dict[str, Table]) -> PinnedTables:
    """Loads Bronze again until its ledger covers the others' or WAIT_SECONDS have passed."""
    deadline = time.monotonic() + WAIT_SECONDS
    topic = exchange.settings.topic
    while True:
        read = {layer: ledgers.read(table.properties, exchange.name, topic) for layer, table in tables.items()}
        behind = any(
            extent.next > (read["bronze"].next_offset(p) or 0)
            for layer in ("silver", "dlq", "gold")
            for p, extent in read[layer].partitions.items()
        )
        if not behind or time.monotonic() > deadline:
            return PinnedTables(exchange, number, tables, read, datetime.now(UTC).date())
        time.sleep(0.1)
        bronze = find_table(catalog, exchange.bronze)
        if bronze is None:
            raise AuditError(f"{NAMESPACE}.{exchange.bronze} was dropped while it was audited")
        tables = {**tables, "bronze": bronze}
