"""`k2flow gaps` on a real Gold table with planted holes, and the metrics of its newest hours."""

import json
import random
import threading
import time
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import Result
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from pyiceberg.catalog import Catalog
from typer.testing import CliRunner

from k2flow.cli import gaps as command
from k2flow.cli.commands import app
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.gaps import recent
from k2flow.gaps.find import TradeRange, find_gaps
from k2flow.gaps.gold import open_gold
from k2flow.gaps.metrics import GapMetrics
from k2flow.gaps.recent import RecentGaps
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.tables import gold_definition
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.actions import Timing
from k2flow.maintain.run import MaintenanceRun
from k2flow.sandbox.kafka.local import free_port
from k2flow.supervisor.flow import SupervisedFlow
from k2flow.supervisor.plan import plan_processes
from k2flow.supervisor.supervise import _metrics_served
from tests.gold import Gold
from tests.trade_ids import BINANCE, HOUR, Trade, expect, in_memory

SYMBOLS = ("ADAUSDT", "BTCUSDT", "ETHUSDT", "SOLUSDT")
PLANTED = 1_000
IDS = 15_000  # of a symbol, before its holes are planted
BEGIN_HOUR = 490_000  # since 1970
BEGIN_US = BEGIN_HOUR * HOUR


def add(gold: Gold, trades: list[Trade], exchange: str = "binance") -> None:
    """Commit trades of one exchange."""
    times = pa.array([trade.at for trade in trades]).cast(pa.timestamp("us", "UTC"))
    gold.add(
        exchange,
        np.array([(trade.at or 0) // HOUR for trade in trades]),
        timestamp=times,
        symbol=pa.array([trade.symbol for trade in trades]),
        trade_id=pa.array([trade.trade_id for trade in trades]),
    )


def planted(chance: random.Random) -> list[Trade]:
    """Return the trades of four symbols with PLANTED holes, some of them twice, and a symbol without a hole."""
    rows = [Trade("WHOLE", f"BINANCE-{n}", BEGIN_US + n * HOUR // 100) for n in range(100, 900)]
    for i, symbol in enumerate(SYMBOLS):
        first = chance.randrange(10**12)
        large = range(7_500, 12_500) if i == 0 else range(7, 8)
        starts = [n for n in range(12, IDS - 12, 12) if n + 10 < large.start or n > large.stop]
        starts = chance.sample(starts, PLANTED // len(SYMBOLS) - 1)
        gone = {start + n for start in starts for n in range(chance.choice((1, 1, 2, 10)))}.union(large, (0, IDS - 1))
        left = [n for n in range(IDS) if n not in gone]
        copies = chance.sample(left, 50)
        rows += [Trade(symbol, f"BINANCE-{first + n}", BEGIN_US + n * 8 * HOUR // IDS) for n in [*left, *copies]]
    rows += [Trade("BTCUSDT", text, BEGIN_US + HOUR) for text in ("BINANCE-007", "7", "BINANCE-" + "9" * 30)]
    chance.shuffle(rows)
    return rows


def gaps(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["gaps", *arguments])


def printed(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = gaps(*arguments, "--json")
    return done.exit_code, json.loads(done.stdout)


def iso(us: int | None) -> str:
    assert us is not None
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)).isoformat()


def test_command_names_each_planted_hole(catalog: Catalog, seed: int) -> None:
    rows = planted(random.Random(seed))
    gold = Gold(catalog)
    for part in (rows[:20_000], rows[20_000:]):
        add(gold, part)
    add(gold, [Trade("BTCUSDT", f"KRAKEN-{n}", BEGIN_US + n, "KRAKEN") for n in (1, 2, 4)], "kraken")
    expected = expect(rows)
    assert expected.unparsed == 3
    assert len(expected.holes) == PLANTED

    code, found = printed("binance")
    assert code == 1
    assert found.keys() == {"exchange", "gaps", "symbols", "unparsed"}
    assert (found["exchange"], found["unparsed"]) == ("binance", 3)
    assert found["gaps"] == [
        {
            "symbol": hole.symbol,
            "first": hole.first,
            "last": hole.last,
            "missing": hole.last - hole.first + 1,
            "after": iso(hole.after),
            "before": iso(hole.before),
        }
        for hole in expected.holes
    ]
    assert list(found["symbols"]) == sorted([*SYMBOLS, "WHOLE"])
    for name, (first, last) in expected.bounds.items():
        own = [hole for hole in expected.holes if hole.symbol == name]
        missing = sum(hole.last - hole.first + 1 for hole in own)
        assert found["symbols"][name] == {"holes": len(own), "missing": missing, "first": first, "last": last}

    done = gaps("binance")
    assert done.exit_code == 1
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1 : len(expected.holes) + 1] == [[str(value) for value in each.values()] for each in found["gaps"]]
    share = (
        100
        * found["symbols"]["ADAUSDT"]["missing"]
        / (expected.bounds["ADAUSDT"][1] - expected.bounds["ADAUSDT"][0] + 1)
    )
    assert f"{share:.3g} %" in done.stdout
    assert "3 trades are not checked: their ids are no BINANCE-<integer>: " in done.stdout

    assert gaps("binance", "--symbol", "WHOLE").exit_code == 0
    code, found = printed("kraken")
    assert (code, found["gaps"][0]["first"], list(found["symbols"])) == (1, 3, ["BTCUSDT"])


def test_command_in_a_range_of_time(catalog: Catalog) -> None:
    rows = [Trade("A", f"BINANCE-{n}", BEGIN_US + n * HOUR // 4) for n in (0, 1, 3, 4, 8, 9, 40, 41)]
    add(Gold(catalog), [*rows, Trade("B", "BINANCE-5", BEGIN_US), Trade("B", "oops", BEGIN_US)])

    def times(since: int | None, until: int | None) -> list[str]:
        limits = (("--from", since), ("--to", until))
        return [text for name, n in limits if n is not None for text in (name, iso(BEGIN_US + n * HOUR // 4)[:19])]

    for since, until in ((None, None), (1, None), (None, 8), (1, 8), (4, 40), (3, 4), (100, None)):
        code, found = printed("binance", *times(since, until))
        limits = [None if n is None else BEGIN_US + n * HOUR // 4 for n in (since, until)]
        expected = expect([*rows, Trade("B", "BINANCE-5", BEGIN_US), Trade("B", "oops", BEGIN_US)], *limits)
        assert [(each["symbol"], each["first"], each["last"]) for each in found["gaps"]] == [
            (hole.symbol, hole.first, hole.last) for hole in expected.holes
        ]
        assert {name: (its["first"], its["last"]) for name, its in found["symbols"].items()} == expected.bounds
        assert found["unparsed"] == expected.unparsed
        assert code == bool(expected.holes)
    assert printed("binance", "--from", f"{iso(BEGIN_US)[:19]}+0000")[0] == 1


def test_what_cannot_be_checked_exits_with_2(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        done = gaps(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        return done.stderr

    assert f"gaps not checked: table market_data.{GOLD_TABLE} does not exist: run" in refused("binance", "--json")
    add(Gold(catalog), [Trade("A", "BINANCE-1", BEGIN_US)])
    assert gaps("binance").exit_code == 0
    assert "has no trade of B of binance, or none in this time" in refused("binance", "--symbol", "A", "--symbol", "B")
    assert "unknown exchange 'ftx'" in refused("ftx")
    assert "is not after --from" in refused("binance", "--from", "2026-01-31", "--to", "2026-01-31")
    assert "is not valid UTF-8: type it again" in refused("binance", "--symbol", "\udcff")
    monkeypatch.setattr(command, "find_exchange", lambda name: replace(find_exchange(name), dense_trade_ids=False))
    assert "does not declare dense_trade_ids" in refused("binance")


def test_metrics_follow_the_newest_hours(catalog: Catalog, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any commits, compactions and removals they are those of a search in the rows of these hours."""
    chance = random.Random(seed)
    assert RecentGaps(catalog, [BINANCE]).update(60) == {}
    gold, rows = Gold(catalog), list[Trade]()
    exchanges = [find_exchange(name) for name in ("binance", "kraken")]
    follower = RecentGaps(catalog, exchanges)
    for turn in range(6):
        newest = BEGIN_HOUR + 4 * turn
        some = [
            Trade(chance.choice("AB"), f"BINANCE-{n}", (newest - chance.choice((0, 0, 1, 2, 23, 24, 30))) * HOUR + n)
            for n in chance.sample(range(500), 60)
        ] + [Trade("A", "oops", newest * HOUR)]
        add(gold, some)
        rows += some
        if turn % 2:
            list(MaintenanceRun(catalog, gold_definition(), Timing(0, 0)).run())
        if turn == 4:
            gone = some[0]
            load_table(catalog, GOLD_TABLE).delete(f"trade_id = '{gone.trade_id}' and symbol = '{gone.symbol}'")
            rows = [each for each in rows if each[:2] != gone[:2]]
        since = (max(each.at or 0 for each in rows) // HOUR - 23) * HOUR
        with open_gold(catalog) as db:
            found = find_gaps(db, BINANCE, TradeRange(since_us=since))
            expected = {("binance", name): its for name, its in found.symbols.items()}
        assert found.symbols == find_gaps(in_memory(rows), BINANCE, TradeRange(since_us=since)).symbols
        assert follower.update(60) == expected == RecentGaps(catalog, exchanges).update(60)
    assert follower.update(0) == expected  # nothing is left to read
    slow = RecentGaps(catalog, exchanges)
    turns = [slow.update(0) for _ in range(sum(len(each.paths) for each in follower._hours.values()))]
    assert turns == [None] * (len(turns) - 1) + [expected]  # a file each

    monkeypatch.setattr("k2flow.gaps.metrics.EVERY_SECONDS", 0.0)
    metrics = GapMetrics(follower.update)
    metrics.start()
    registry = CollectorRegistry()
    registry.register(metrics)
    while not (samples := samples_of(registry)):
        pass
    metrics.stop()
    assert samples == {
        (name, "binance", symbol): value
        for (_, symbol), its in expected.items()
        for name, value in (("k2flow_missing_trades", its.missing), ("k2flow_trade_gaps", its.holes))
    }
    monkeypatch.setattr(recent, "MAX_RUNS", 3)
    with pytest.raises(Exception, match="newest 24 hours have more than 3 holes: `k2flow gaps` shows"):
        RecentGaps(catalog, exchanges).update(60)


def samples_of(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    return {
        (sample.name, sample.labels["exchange"], sample.labels["symbol"]): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_run_serves_the_metrics(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a broker, as beside one."""
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    add(Gold(catalog), [Trade("A", f"BINANCE-{n}", BEGIN_US + n) for n in (1, 2, 5, 9)])
    settings, port = load_settings(exchange_names()), free_port()
    flow = SupervisedFlow(plan_processes("binance", 1, None, None), settings, {}, threading.Event())
    with _metrics_served([flow], settings, port, str(tmp_path), lambda: None, lambda: None):
        deadline = time.monotonic() + 60
        while "k2flow_missing_trades{" not in (text := scraped(port)):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
    assert 'k2flow_missing_trades{exchange="binance",symbol="A"} 5.0' in text
    assert 'k2flow_trade_gaps{exchange="binance",symbol="A"} 2.0' in text


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text
