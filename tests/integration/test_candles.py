"""The candles flow as a process: it dies, is started twice, and runs beside maintenance; its table is that of Gold.

Recorded trades of real exchanges give the candles that plain Python computes from the file.
"""

import csv
import random
import signal
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pyiceberg.catalog import Catalog

from k2flow.audit import AuditReport
from k2flow.audit.candles import audit_candles
from k2flow.exchange import exchange_names, find_exchange
from k2flow.failpoints import Action, Point
from k2flow.iceberg.ledger import read
from k2flow.layers import CANDLES_TABLE, GOLD_TABLE
from k2flow.query.connection import connect_to
from k2flow.sandbox.producer.replay import Target, replay
from tests.candles import assert_candles_of, candles_of_rows, rows_by_key
from tests.conftest import SAMPLE_TRADES
from tests.integration.harness import DEADLINE_SECONDS, Flow, Lake
from tests.integration.test_failpoints import FaultyStart, await_stop
from tests.property.test_candles import TradeHistory

BINANCE_TRADES = Path(__file__).parents[1] / "data" / "binance_futures_trades.csv"
STEPS = 12
QUICK = {"K2FLOW_CANDLES_TRIGGER_SECONDS": "0.1"}
EARLY = (Point.OPENED, Point.FENCE, Point.SOURCE_EMITTED, Point.EPOCH_COMPLETE, Point.COMMIT_DONE)
COMMIT = (Point.COMMIT_BEGUN, Point.MANIFEST_WRITTEN, Point.COMMIT_LANDED)  # the fence passes these first
FAULTS = [
    *(FaultyStart(f"{point}={action}", action) for point in EARLY for action in (Action.DIE, Action.RAISE)),
    *(FaultyStart(f"{point}=die@{hit}", Action.DIE) for point in COMMIT for hit in (1, 2)),
    FaultyStart(f"{Point.FILE_WRITTEN}=die", Action.DIE),
    FaultyStart(f"{Point.FILE_WRITTEN}=raise,{Point.COMMIT_DONE}=die", Action.DIE),  # an outage: it tries again
    FaultyStart(f"{Point.COMMIT_LANDED}=raise@2,{Point.COMMIT_DONE}=die", Action.DIE),
    FaultyStart(f"{Point.SHUTDOWN}=die", Action.DIE, until_caught_up=True),
]


class History(TradeHistory):
    """Gold's history in the tables of a lake, which has no Kafka."""

    def __init__(self, catalog: Catalog, home: Path, seed: int) -> None:
        super().__init__(catalog, seed)
        self.lake = Lake("binance", "none", home, "127.0.0.1:1")
        self.chance = random.Random(seed)

    def check(self) -> None:
        """Compare the candles with those of Gold's rows, by an oracle and by the audit."""
        assert_candles_of(self.lake.table("candles"), self.lake.table("gold"))
        assert self.audit().findings == []

    def audit(self) -> AuditReport:
        """Return the audit's report, without a violation. The snapshot of late candles may have expired."""
        report = AuditReport("now")
        audit_candles(self.lake.catalog(), report, lambda *_: None)
        assert not report.checks(), report.findings
        return report

    def start(self, **extra: str) -> Flow:
        return self.lake.start(flow="candles", **QUICK, **extra)


def wait_for_candles(lake: Lake) -> None:
    """Wait until the candles are those of Gold as it is now."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    snapshot = lake.table("gold").current_snapshot()
    while sequence_number(lake) < (snapshot.sequence_number or 0 if snapshot else 0):
        assert time.monotonic() < deadline, "the candles do not follow Gold"
        time.sleep(0.05)


def sequence_number(lake: Lake) -> int:
    """Return which of Gold's commits the candles have."""
    held = read(lake.table("candles").properties, "candles", GOLD_TABLE).partitions.get(0)
    return held.next - 1 if held else 0


@pytest.fixture
def history(catalog: Catalog, tmp_path: Path, seed: int) -> History:
    found = History(catalog, tmp_path / "home", seed)
    found.append()
    return found


@pytest.mark.timeout(300)
def test_a_death_at_any_step_changes_no_candle(history: History) -> None:
    """Each start has new trades, ends in a fault, and leaves the candles of one snapshot of Gold."""
    for start in FAULTS:
        history.step(history.own)
        history.append()
        caught_up = {"K2FLOW_UNTIL_CAUGHT_UP": "1"} if start.until_caught_up else {}
        with history.start(K2FLOW_FAILPOINTS=start.armed, **caught_up) as flow:
            log = flow.wait(60)
            point = start.armed.rpartition(",")[2].partition("=")[0]
            assert f"failpoint {point}: {start.action}" in log, f"{start}\n{log}"
            (code,) = flow.codes()
            assert code == -signal.SIGKILL if start.action is Action.DIE else code not in (0, None), f"{start}\n{log}"
        history.audit()
    history.lake.catch_up(flow="candles")
    history.check()


def test_maintenance_beside_the_flow_changes_no_candle(history: History) -> None:
    """Appends, late trades, compaction, replaced rows, expiration. A new table has the same rows."""
    with history.start() as flow:
        flow.wait_for_log("trigger")
        for _ in range(STEPS):
            history.step(history.own)
            history.append()
            if history.chance.random() < 0.3:
                wait_for_candles(history.lake)
        wait_for_candles(history.lake)
        flow.signal(signal.SIGTERM)
        log = flow.wait()
        assert flow.codes() == [0], log
    history.check()
    before = rows_by_key(history.lake.table("candles").scan().to_arrow().to_pylist())
    history.lake.catalog().drop_table(f"market_data.{CANDLES_TABLE}")
    history.lake.catch_up(flow="candles", K2FLOW_ACCEPT_LOST_TABLES="1")
    assert rows_by_key(history.lake.table("candles").scan().to_arrow().to_pylist()) == before


def test_copy_that_was_fenced_cannot_commit(history: History) -> None:
    """It stops within its commit, and continues after a successor has committed. A running one is left alone."""
    with history.start(K2FLOW_FAILPOINTS=f"{Point.MANIFEST_WRITTEN}=stop@2") as old:
        await_stop(old)
        history.append()
        history.lake.catch_up(flow="candles")
        old.signal(signal.SIGCONT)
        log = old.wait(60)
        assert old.codes() == [1], log
        assert "has fenced writer epoch 1; this copy of the flow stops" in log.splitlines()[-1]
    history.check()
    with history.start() as running:
        running.wait_for_log("trigger")
        history.append()
        wait_for_candles(history.lake)
        with history.start() as second:
            log = second.wait(60)
            assert second.codes() == [1]
            assert f"the flow of candles already runs: process {running.processes[0].pid} " in log.splitlines()[-1]
    history.check()


COLUMNS_OF_GOLD = """
    SELECT exchange, symbol, to_timestamp(minute * 60) AS open_time,
        first(price ORDER BY place) AS open, max(price) AS high, min(price) AS low, last(price ORDER BY place) AS close,
        sum(quantity) AS volume, sum(price::DECIMAL(38, 8) * quantity) AS quote_volume,
        coalesce(sum(quantity) FILTER (side = 'BUY'), 0)::DECIMAL(38, 8) AS buy_volume, count(*) AS trades,
        first(trade_id ORDER BY place) AS first_trade_id, last(trade_id ORDER BY place) AS last_trade_id,
        min(timestamp) AS first_trade_time, max(timestamp) AS last_trade_time,
        any_value(exchange_date) AS exchange_date, any_value(exchange_hour) AS exchange_hour
    FROM (
        SELECT *, epoch_ms(timestamp) // 60000 AS minute, (timestamp, length(trade_id), trade_id, message_id) AS place
        FROM gold_crypto_trades
    ) GROUP BY exchange, symbol, minute"""


def test_candles_of_recorded_trades_are_exact(new_lake: Callable[..., Lake], real_trades: Path, tmp_path: Path) -> None:
    """In three ways: the table, `candles('1m')`, and SQL over Gold."""
    path = with_binance(real_trades, tmp_path)
    names = {row["exchange"] for row in rows_of_csv(path)}
    lakes = {name: new_lake(name) for name in exchange_names() if name in names}
    assert len(lakes) == 2
    one, *_ = lakes.values()
    end = datetime.now(UTC)
    targets = {name: Target(find_exchange(name).code, lake.topic) for name, lake in lakes.items()}
    replay(path, targets, {"bootstrap.servers": one.bootstrap}, end=end)
    with one.start(flow="candles", **QUICK) as flow:
        for name, lake in lakes.items():
            lake.catch_up(**{f"K2FLOW_{name.upper()}_BATCH_ROWS": "500"})
        wait_for_candles(one)
        flow.signal(signal.SIGTERM)
        flow.wait()
    expected = candles_of_rows(recorded(path, end))
    connection = connect_to(one.catalog())
    assert rows_by_key(one.table("candles").scan().to_arrow().to_pylist()) == expected
    for sql in ("FROM candles('1m')", COLUMNS_OF_GOLD):
        assert rows_by_key(connection.sql(sql).to_arrow_table().to_pylist()) == expected


def with_binance(path: Path, folder: Path) -> Path:
    """Return the file, or the sample with Binance's trades too."""
    if path != SAMPLE_TRADES:
        return path
    both = folder / "trades.csv"
    both.write_text(path.read_text() + BINANCE_TRADES.read_text().split("\n", 1)[1])
    return both


def rows_of_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def recorded(path: Path, end: datetime) -> list[dict[str, Any]]:
    """Return the trades of the file as columns of Gold: each market's newest one is in the minute before `end`."""
    rows = rows_of_csv(path)
    newest: dict[tuple[str, ...], int] = {}
    for row in rows:
        market = (row["exchange"], row["symbol"], row["kind"])
        newest[market] = max(newest.get(market, 0), int(row["time_ms"]))
    trades = {}
    for row in rows:
        market = (row["exchange"], row["symbol"], row["kind"])
        minutes = (int(end.timestamp() * 1000) - newest[market]) // 60_000
        text = "|".join((*market, row["trade_id"]))
        trades[text] = {
            "exchange": row["exchange"].upper(),
            "symbol": row["symbol"],
            "timestamp": datetime.fromtimestamp(0, UTC) + timedelta(minutes=minutes, milliseconds=int(row["time_ms"])),
            "trade_id": f"{row['exchange'].upper()}-{row['trade_id']}",
            "message_id": str(uuid.uuid5(uuid.NAMESPACE_OID, text)),
            "price": Decimal(row["price"]),
            "quantity": Decimal(row["quantity"]),
            "side": row["side"],
        }
    return list(trades.values())
