"""The tables beside an independent oracle: how many rows are lost, and how many are there that should not be."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pyiceberg.catalog import Catalog

from k2flow.exchange import GOLD, find_exchange
from k2flow.iceberg.catalog import load_table
from tests.integration.harness import milliseconds, read_topic, rows_of
from tests.oracle import Expected, expect


@dataclass(frozen=True)
class Layer:
    """One table beside the oracle; `wrong` rows are doubled, or such as no message accounts for."""

    table: str
    rows: int
    lost: int
    wrong: int


def judge(exchange: str, bootstrap: str, catalog: Catalog) -> list[Layer]:
    """The four tables of an exchange, each row compared with what the oracle makes of the topic."""
    found = find_exchange(exchange)
    expected = expect(read_topic(bootstrap, found.settings.topic), found.code)
    bronze = load_table(catalog, found.bronze).scan().to_arrow().to_pylist()
    dlq = load_table(catalog, found.dlq).scan().to_arrow().to_pylist()
    silver = rows_of(load_table(catalog, found.silver))
    gold = [row for row in rows_of(load_table(catalog, GOLD)) if row[3] == found.code]
    return [
        _compared(found.bronze, map(_bronze_row, bronze), _bronze_expected(expected)),
        _compared(
            found.dlq,
            ((row["partition"], row["offset"], row["payload"], row["reason"]) for row in dlq),
            Counter((*at, *payload_and_reason) for at, payload_and_reason in expected.dlq.items()),
        ),
        _compared(found.silver, silver, expected.silver),
        _gold(f"{GOLD} ({found.code})", gold, expected, found.settings.dedup_window_hours),
    ]


def _bronze_row(row: dict[str, Any]) -> tuple[Hashable, ...]:
    at = milliseconds(row["kafka_timestamp"])
    return row["partition"], row["offset"], row["message_key"], row["avro_payload"], at


def _bronze_expected(expected: Expected) -> Counter[tuple[Hashable, ...]]:
    return Counter(
        (*at, None if m.key is None else m.key.decode("utf-8", "backslashreplace"), m.value, m.timestamp_ms)
        for at, m in expected.bronze.items()
    )


def _compared(table: str, rows: Iterable[tuple[Hashable, ...]], expected: Counter[Any]) -> Layer:
    found = Counter(rows)
    return Layer(table, found.total(), (expected - found).total(), (found - expected).total())


def _gold(table: str, rows: list[tuple[Any, ...]], expected: Expected, window_hours: int) -> Layer:
    """Each id once; twice only in two hours of which one is beyond the window."""
    hours = defaultdict(list)
    for row in rows:
        hours[row[0]].append(row[5].replace(minute=0, second=0, microsecond=0))
    newest = max((hour for each in hours.values() for hour in each), default=None)
    doubled = sum(_doubled(each, newest, window_hours) for each in hours.values() if len(each) > 1)
    strange = sum(row[:16] not in expected.silver for row in rows)
    return Layer(table, len(rows), len(expected.gold_ids - hours.keys()), doubled + strange)


def _doubled(hours: list[datetime], newest: datetime | None, window_hours: int) -> int:
    assert newest is not None
    hot = [hour for hour in hours if hour > newest - timedelta(hours=window_hours)]
    return len(hours) - len(set(hours)) if len(hot) < 2 else len(hours) - 1
