"""Compares the tables with an independent oracle: rows lost, and rows that should not be there."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pyiceberg.catalog import Catalog

from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.layers import GOLD_TABLE
from tests.integration.harness import milliseconds, read_topic, rows_of
from tests.oracle import Expected, expect

EXCHANGES = ("binance", "kraken")


@dataclass(frozen=True)
class TableDifference:
    """One table compared with the oracle; `unexpected` rows are duplicates, or no message accounts for them."""

    table: str
    rows: int
    lost: int
    unexpected: int


def compare_tables(
    exchange: str, bootstrap: str, catalog: Catalog, schema_ids: tuple[int, ...] = (1,)
) -> list[TableDifference]:
    """Compare each row of an exchange's four tables with the rows that the oracle derives from the topic."""
    found = find_exchange(exchange)
    expected = expect(read_topic(bootstrap, found.settings.topic), found.code, schema_ids)
    bronze = load_table(catalog, found.bronze).scan().to_arrow().to_pylist()
    dlq = load_table(catalog, found.dlq).scan().to_arrow().to_pylist()
    silver = rows_of(load_table(catalog, found.silver))
    gold = [row for row in rows_of(load_table(catalog, GOLD_TABLE)) if row[3] == found.code]
    return [
        _compared(found.bronze, map(_bronze_row, bronze), _bronze_expected(expected)),
        _compared(
            found.dlq,
            ((row["partition"], row["offset"], row["payload"], row["reason"]) for row in dlq),
            Counter((*at, *payload_and_reason) for at, payload_and_reason in expected.dlq.items()),
        ),
        _compared(found.silver, silver, expected.silver),
        _gold(f"{GOLD_TABLE} ({found.code})", gold, expected, found.settings.dedup_window_hours),
    ]


def times_that_go_back(catalog: Catalog) -> list[str]:
    """Return a line for each table whose snapshots are not in the order of their times: Java's readers refuse it."""
    names = [*dict.fromkeys(name for each in EXCHANGES for name in find_exchange(each).layer_by_table)]
    lines = []
    for name in names:
        log = [entry.timestamp_ms for entry in load_table(catalog, name).metadata.snapshot_log]
        back = [(one, other) for one, other in itertools.pairwise(log) if other < one]
        lines += [f"{name}: a snapshot at {one} is followed by one at {other}" for one, other in back[:1]]
    return lines


def _bronze_row(row: dict[str, Any]) -> tuple[Hashable, ...]:
    at = milliseconds(row["kafka_timestamp"])
    return row["partition"], row["offset"], row["message_key"], row["avro_payload"], at


def _bronze_expected(expected: Expected) -> Counter[tuple[Hashable, ...]]:
    return Counter(
        (*at, None if m.key is None else m.key.decode("utf-8", "backslashreplace"), m.value, m.usable_ms)
        for at, m in expected.bronze.items()
    )


def _compared(table: str, rows: Iterable[tuple[Hashable, ...]], expected: Counter[Any]) -> TableDifference:
    found = Counter(rows)
    return TableDifference(table, found.total(), (expected - found).total(), (found - expected).total())


def _gold(table: str, rows: list[tuple[Any, ...]], expected: Expected, window_hours: int) -> TableDifference:
    """Expect each id once, or twice if the two rows' hours are further apart than the deduplication window."""
    hours = defaultdict(list)
    for row in rows:
        hours[row[0]].append(row[5].replace(minute=0, second=0, microsecond=0))
    newest = max((hour for each in hours.values() for hour in each), default=None)
    duplicated = sum(_duplicates(each, newest, window_hours) for each in hours.values() if len(each) > 1)
    unaccounted = sum(row[:16] not in expected.silver for row in rows)
    return TableDifference(table, len(rows), len(expected.gold_ids - hours.keys()), duplicated + unaccounted)


def _duplicates(hours: list[datetime], newest: datetime | None, window_hours: int) -> int:
    assert newest is not None
    hot = [hour for hour in hours if hour > newest - timedelta(hours=window_hours)]
    return len(hours) - len(set(hours)) if len(hot) < 2 else len(hours) - 1
