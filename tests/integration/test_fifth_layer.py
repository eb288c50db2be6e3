"""What an exchange may declare in its file of flows/: a fifth table by one `Layer`, and another deduplication key."""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import read
from k2flow.query.connection import connect_to
from tests.integration.conftest import fill
from tests.integration.harness import Lake, ledger_offsets, read_topic, rows_of
from tests.oracle import expect

FLOW = '''
"""Binance with a fifth table: a copy of Silver with the notional value of each trade."""

from dataclasses import replace

import pyarrow.compute as pc
from pyiceberg.types import DoubleType

from k2flow.exchange import Exchange
from k2flow.flow import build
from k2flow.layers import LAYERS, SILVER, Field


def notional(trades):
    return pc.multiply(*(trades.column(name).cast("float64") for name in ("price", "quantity")))


COPY = replace(
    SILVER,
    name="copy",
    table_pattern="copy_{exchange}_trades",
    fields=(*SILVER.fields, Field("notional", DoubleType(), derive=notional)),
    file_size_mb=lambda settings: 64,
    retention_days=lambda settings: None,
)
EXCHANGE = Exchange(
    name="fifth",
    code="BINANCE",
    declared={"topic": "fifth", "bronze_retention_days": 7, "bronze_file_size_mb": 128, "trigger_seconds": 1},
    layers=(*LAYERS, COPY),
)
flow = build(EXCHANGE)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with flows/fifth.py, on the path of this process and its children."""
    (tmp_path / "path" / "flows").mkdir(parents=True)
    (tmp_path / "path" / "flows" / "fifth.py").write_text(FLOW)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delitem(sys.modules, "flows.fifth", raising=False)
    return tmp_path / "path"


@pytest.mark.parametrize("processes", [1, 2])
def test_fifth_layer_is_a_table_like_the_others(new_lake: Callable[..., Lake], folder: Path, processes: int) -> None:
    """Two runs: the second continues at the ledger of the new table, which ends where the others end."""
    binance = new_lake()
    fill(binance, count=3_000, bad=0.05, duplicates=0.05, seed=1)
    lake = Lake("fifth", binance.topic, binance.home, binance.bootstrap)
    lake.catch_up(processes, PYTHONPATH=str(folder))
    fill(binance, count=1_000, bad=0.05, duplicates=0.05, seed=2)
    lake.catch_up(processes, PYTHONPATH=str(folder))

    expected = expect(read_topic(lake.bootstrap, lake.topic), "BINANCE")
    table = load_table(lake.catalog(), "copy_fifth_trades")
    rows = rows_of(table)
    assert Counter(row[:-1] for row in rows) == expected.silver
    price, quantity = 6, 7
    assert all(row[-1] == pytest.approx(float(row[price] * row[quantity])) for row in rows)
    held = read(table.properties, "fifth", lake.topic)
    assert {p: extent.next for p, extent in held.partitions.items()} == ledger_offsets(lake)["silver"]
    assert sum(extent.rows for extent in held.partitions.values()) == len(rows)
    assert str(table.spec().fields[0].transform) == "day"
    assert find_exchange("fifth").tables == (*lake_tables(lake), "copy_fifth_trades")
    total = connect_to(lake.catalog()).sql("SELECT count(*), min(notional) > 0 FROM copy_fifth_trades").fetchall()
    assert total == [(len(rows), True)]


def lake_tables(lake: Lake) -> list[str]:
    return [lake.table(layer).name()[-1] for layer in ("bronze", "silver", "dlq", "gold")]


class TwoHandlers:
    """Binance's lake with the messages of two feed handlers, deduplicated by (symbol, trade_id)."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake

    def run(self, *command: str, key: bool = True, code: int = 0, **extra: str) -> str:
        """Return the output of `python -m`, with the declared key or the default one."""
        module, arguments = ("tests.integration.other_key", command) if key else (command[0], command[1:])
        done = self.lake.command(*arguments, module=module, **extra)
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def catch_up(self, *arguments: str, **extra: Any) -> str:
        return self.run("bytewax.run", "flows.binance", *arguments, K2FLOW_UNTIL_CAUGHT_UP="1", **extra)

    def assert_each_trade_once(self) -> None:
        """Assert that Gold has one of Silver's rows of each trade that a valid message of either handler brings."""
        silver = expect(read_topic(self.lake.bootstrap, self.lake.topic), "BINANCE").silver
        assert Counter(rows_of(self.lake.table("silver"))) == silver
        rows = rows_of(self.lake.table("gold"))
        assert all(row[:-1] in silver for row in rows)
        assert Counter(row[1:3] for row in rows) == Counter({row[1:3] for row in silver})

    def assert_gaps_are_the_rest(self) -> None:
        """Assert that `k2flow gaps` names each trade that no valid message of either handler brings, and no other."""
        found = json.loads(self.run("k2flow", "gaps", "binance", "--json", code=1))
        named = Counter((gap["symbol"], n) for gap in found["gaps"] for n in range(gap["first"], gap["last"] + 1))
        ids: dict[str, set[int]] = defaultdict(set)
        for _, trade_id, symbol, *_ in rows_of(self.lake.table("gold")):
            ids[symbol].add(int(trade_id.removeprefix("BINANCE-")))
        lacked = Counter((symbol, n) for symbol, own in ids.items() for n in range(min(own), max(own)) if n not in own)
        assert (named, found["unparsed"]) == (lacked, 0)
        assert 2_000 * 0.02 < len(named) < 2_000 * 0.2


def test_two_handlers_that_lose_messages_are_one_stream(new_lake: Callable[..., Lake]) -> None:
    """Each loses 20 %. Gold has every trade that either brings, once, and `gaps` names the rest."""
    both = TwoHandlers(new_lake())
    options: dict[str, Any] = {"count": 2_000, "handlers": 2, "loss": 0.2, "bad": 0.03, "duplicates": 0.03}
    sent = fill(both.lake, **options, seed=1)
    assert sent.trades
    assert 2_000 * 0.9 < sent.trades < 2_000 < sent.originals
    both.catch_up("-w", "2")
    both.assert_each_trade_once()
    both.assert_gaps_are_the_rest()
    both.run("k2flow", "audit", "binance")
    fill(both.lake, **options, seed=2)
    both.catch_up()
    both.assert_each_trade_once()
    both.run("k2flow", "audit", "binance")

    assert "k2flow reprocess binance --new-key" in both.catch_up(key=False, code=1)
    assert "broken: gold_key in gold_crypto_trades" in both.run("k2flow", "audit", "binance", key=False, code=1)

    since = (datetime.now(UTC).date() - timedelta(days=1)).isoformat()
    other, reprocess = "tests.integration.other_rules", ("k2flow", "reprocess", "binance", "--from", since)
    assert "declares message_id" in both.run(*reprocess, key=False, code=1)
    both.run(other, *reprocess)
    both.run(other, "k2flow", "audit", "binance")
    both.run(*reprocess)
    both.assert_each_trade_once()

    both.run("k2flow", "reprocess", "binance", "--new-key", key=False)
    both.catch_up(key=False)
    both.run("k2flow", "audit", "binance", key=False)
    silver, gold = (rows_of(both.lake.table(layer)) for layer in ("silver", "gold"))
    assert Counter(row[0] for row in gold) == Counter({row[0] for row in silver})
