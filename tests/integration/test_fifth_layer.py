"""A fifth table, by one `Layer` in one file of flows/: created, written, committed with a ledger, and queried."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

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
