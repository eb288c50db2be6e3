"""The candles flow: catching up, following a running flow, late trades. Queries of its table; the search for gaps."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import typer
from matplotlib.axes import Axes
from pyiceberg.catalog import Catalog
from rich.console import Console
from rich.progress import track

import k2flow
from bench.commits import gold_of_hour
from bench.dedup import IdSource, uuid_texts
from bench.freshness import SHARES, FreshnessStream, producing
from bench.lake import LakeWriter
from bench.measure import FlowProcess, Usage, in_child, logged, run, running
from bench.report import BenchResult, report
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.flow.candles import CandlesProcess, CandlesSinkPartition
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.ledger import OffsetRange
from k2flow.layers import CANDLES_TABLE, GOLD_TABLE, HOUR_US
from k2flow.query.connection import CANDLE_ROWS
from k2flow.sandbox.kafka.local import LocalKafka, free_port

EXCHANGE = "binance"
FIRST_HOUR = 490_008
"""Of all trades that are written without Kafka, in hours since 1970: a day begins."""
COMMIT_ROWS = 100_000
RATE = 10_000
TRIGGER_SECONDS = 1.0
STREAMS = {"in time": {"late": 0.0}, "late and bad ones too": SHARES}
"""Trades that the flow follows: those of a steady market, and with the producer's usual faults."""
HISTORY_SECONDS = 2.0
SETTLE_SECONDS = 5.0
COMMIT = r"at sequence number (\d+), commit"


def candles(
    rows: Annotated[
        int, typer.Option(help="Rows of Gold, over 24 hours, to catch up with and to search.")
    ] = 10_000_000,
    symbols: Annotated[int, typer.Option(help="Symbols of the trades.")] = 50,
    days: Annotated[int, typer.Option(help="Days of candles to query, and to repair.")] = 30,
    seconds: Annotated[int, typer.Option(help="Seconds that the flow follows another one.")] = 90,
    runs: Annotated[int, typer.Option(help="Late trades, and queries; the median counts.")] = 15,
) -> None:
    """Measure the candles flow as a separate process, and `k2flow gaps` on the same trades.

    A run of the flow with nothing to do is subtracted from the catch-up: its time is start-up and imports. Beside it, a
    flow of one exchange writes Gold at 10,000 messages a second, both with a trigger of 1 s. It does so twice: trades
    in time, and then also bad, copied and late ones, so that each commit has several hours. A late trade and one of the
    newest hour are committed in turn, in one process: their difference is what a late trade costs.
    """
    with tempfile.TemporaryDirectory() as folder:
        in_child(write_gold, Path(folder), rows, symbols, 24)
        gaps = run([sys.executable, "-m", "k2flow", "gaps", EXCHANGE, "--json"], {"K2FLOW_HOME": folder})
        caught_up = catch_up(folder)
        idle = catch_up(folder)
    followed = {name: follow(seconds, shares) for name, shares in STREAMS.items()}
    with tempfile.TemporaryDirectory() as folder:
        in_child(write_gold, Path(folder), days * 24 * 60 * symbols, symbols, days * 24)
        catch_up(folder)
        query = in_child(query_hours, folder, runs)
        repaired = in_child(repair, folder, days, runs)
    if json.loads(gaps.output)["gaps"]:
        raise RuntimeError("gaps were found where none are")
    _report(rows, symbols, days, caught_up.minus(idle), gaps, followed, query, repaired)


class TradeWriter:
    """Commits trades of several symbols to Gold, whose ids have no gaps."""

    def __init__(self, home: Path, symbols: int, most: int) -> None:
        """`most` trades are committed at once."""
        self._lake = LakeWriter(home, EXCHANGE)
        self._source = IdSource()
        self._base = gold_of_hour(self._lake, most, FIRST_HOUR)
        self._symbols = pa.array([f"SYMBOL{i}" for i in range(symbols)])
        self._written = self._lake.committers[GOLD_TABLE].ledger.next_offset(0) or 0

    def commit(self, times: np.ndarray) -> None:
        """Commit a trade at each time (us since 1970), in order."""
        n, hours, first = len(times), times // HOUR_US, self._written
        number = np.arange(first, first + n)
        ids = pa.array(number // len(self._symbols)).cast(pa.string())
        columns = {
            "message_id": uuid_texts(self._source.fresh(n)),
            "trade_id": pc.binary_join_element_wise(self._lake.exchange.code, ids, "-"),
            "symbol": self._symbols.take(pa.array(number % len(self._symbols))),
            "timestamp": pa.array(times),
            "exchange_date": pa.array((hours // 24).astype(np.int32)),
            "exchange_hour": pa.array((hours % 24).astype(np.int32)),
        }
        batch = self._base.slice(0, n)
        for name, values in columns.items():
            field = batch.schema.field(name)
            batch = batch.set_column(batch.schema.get_field_index(name), field, values.cast(field.type))
        files = self._lake.write_files(GOLD_TABLE, batch)
        self._lake.committers[GOLD_TABLE].commit(files, [OffsetRange(0, first, first + n, n)])
        self._written += n


def write_gold(home: Path, rows: int, symbols: int, hours: int) -> None:
    """Write trades at a steady rate into Gold, in commits of COMMIT_ROWS."""
    writer = TradeWriter(home, symbols, min(rows, COMMIT_ROWS))
    for first in track(range(0, rows, COMMIT_ROWS), "writing", console=Console(stderr=True)):
        number = np.arange(first, min(first + COMMIT_ROWS, rows))
        writer.commit(FIRST_HOUR * HOUR_US + number * (hours * HOUR_US // rows))


def catch_up(home: str) -> Usage:
    """Run the candles flow until its table is that of Gold."""
    settings = {"K2FLOW_HOME": home, "K2FLOW_UNTIL_CAUGHT_UP": "1"}
    return run([sys.executable, "-m", "bytewax.run", "flows.candles"], settings)


@dataclass(frozen=True)
class Followed:
    """The candles flow beside another one.

    `delays` are seconds from each of Gold's commits to that of its candles; `cpu` and `other_cpu` the seconds of both.
    """

    delays: Sequence[float]
    cpu: float
    other_cpu: float

    @property
    def p50(self) -> float:
        return float(np.percentile(self.delays, 50))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.delays, 99))

    @property
    def share(self) -> float:
        """Of the other flow's CPU."""
        return self.cpu / self.other_cpu


def follow(seconds: int, shares: Mapping[str, float]) -> Followed:
    """Run both flows while trades come for some seconds, with these shares of bad, duplicate and late ones."""
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        return _follow(Path(folder) / "home", kafka, seconds, shares)


def _follow(home: Path, kafka: LocalKafka, seconds: int, shares: Mapping[str, float]) -> Followed:
    exchange = find_exchange(EXCHANGE)
    stream = FreshnessStream(exchange, TRIGGER_SECONDS, RATE, exchange.settings.topic)
    kafka.start({stream.topic: exchange.settings.partitions})
    environment = {"K2FLOW_HOME": str(home), "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap, **stream.environment()}
    environment["K2FLOW_CANDLES_TRIGGER_SECONDS"] = f"{TRIGGER_SECONDS:g}"
    with running(EXCHANGE, environment) as flow, running("candles", environment) as own:
        for each in (flow, own):
            each.wait_until_reading()
        catalog = open_catalog(load_settings(exchange_names()).model_copy(update={"home": home}))
        before, gold = (_cpu(own), _cpu(flow)), _commits(catalog)
        with producing(stream, seconds, environment, shares) as producer:
            while producer.poll() is None:
                time.sleep(HISTORY_SECONDS)
                gold |= _commits(catalog)
        if producer.returncode:
            raise RuntimeError("the producer failed")
        time.sleep(SETTLE_SECONDS)
        gold |= _commits(catalog)
        after = (_cpu(own), _cpu(flow))
        own.end()
        flow.end()
    candles = [(at, int(found[2])) for at, found in logged(own.log, COMMIT)]
    delays = [min(at for at, number in candles if number >= each) - committed for each, committed in gold.items()]
    return Followed(delays, after[0] - before[0], after[1] - before[1])


def _cpu(flow: FlowProcess) -> float:
    used = psutil.Process(flow.process.pid).cpu_times()
    return float(used.user + used.system)


def _commits(catalog: Catalog) -> dict[int, float]:
    """Return when Gold's commits with rows were made, in seconds since 1970, by sequence number."""
    snapshots = load_table(catalog, GOLD_TABLE).metadata.snapshots
    return {
        s.sequence_number or 0: s.timestamp_ms / 1000 for s in snapshots if s.summary and "added-records" in s.summary
    }


@dataclass(frozen=True)
class Queried:
    """Seconds of queries on one connection: of the table, of the one that made the copy, and of the copy."""

    table: Sequence[float]
    copying: float
    copy: Sequence[float]


def query_hours(home: str, runs: int) -> Queried:
    """Query one symbol's candles of an hour, until `runs` queries have read the connection's copy."""
    times: list[float] = []
    copying = 0
    with patch.dict(os.environ, {"K2FLOW_HOME": home}), k2flow.connect() as connection:
        while not copying or len(times) <= copying + runs:
            began = time.perf_counter()
            found = connection.execute("FROM candles('1h') WHERE symbol = 'SYMBOL1' ORDER BY open_time").fetchall()
            copied = connection.execute(f"SELECT {CANDLE_ROWS}()").fetchall() != [(CANDLES_TABLE,)]
            times.append(time.perf_counter() - began)
            if not found:
                raise RuntimeError("no candles")
            if copied and not copying:
                copying = len(times) - 1
    return Queried(times[1:copying], times[copying], times[copying + 1 :])  # the first query reads metadata


@dataclass(frozen=True)
class Repaired:
    """Seconds of the updates with a late trade, and of those with a trade of the newest hour."""

    late: list[float]
    plain: list[float]


def repair(home: str, days: int, runs: int) -> Repaired:
    """Commit late trades of an hour each, and trades of the newest hour in turn, and their candles."""
    found = Repaired([], [])
    with patch.dict(os.environ, {"K2FLOW_HOME": home}):
        writer, process = TradeWriter(Path(home), 1, 1), CandlesProcess()
        process.open(1)
        sink = CandlesSinkPartition(process)
        for i in range(-1, runs):  # the first time warms up
            for hour, times in ((i % 24, found.late), (days * 24 - 1, found.plain)):
                writer.commit(np.array([(FIRST_HOUR + hour) * HOUR_US + 30_000_000]))
                began = time.perf_counter()
                sink.write_batch([process.update()])
                sink.snapshot()
                if i >= 0:
                    times.append(time.perf_counter() - began)
    return found


def _report(
    rows: int, symbols: int, days: int, caught_up: Usage, gaps: Usage, followed: Mapping[str, Followed], query: Queried,
    repaired: Repaired,
) -> None:  # fmt: skip
    late, plain = median(repaired.late) * 1000, median(repaired.plain) * 1000
    hours, before = median(query.copy) * 1000, median(query.table) * 1000
    per_cpu = rows / caught_up.cpu
    table = [
        ["catch-up", f"{rows:,} rows of Gold, 24 h, {symbols} symbols", f"{per_cpu:,.0f} rows per CPU second",
         f"{caught_up.peak / 1e6:.0f} MB"],
        *(["from Gold's commit to the candles'", f"{len(each.delays)} commits at {RATE:,} trades/s, {name}",
           f"p50 {each.p50:.2f} s, p99 {each.p99:.2f} s", f"{each.share:.0%} of the other flow's CPU"]
          for name, each in followed.items()),
        ["a late trade", f"{days} days old, {symbols} symbols", f"{late - plain:.0f} ms more than a trade of now",
         f"{late:.0f} ms in all"],
        ["`candles('1h')`", f"one symbol, {days} days", f"{hours:.0f} ms",
         f"on an open connection; before it makes its copy, which takes {query.copying:.1f} s: {before:.0f} ms"],
        ["`k2flow gaps`", f"{rows:,} trades", f"{gaps.wall:.1f} s", f"{gaps.peak / 1e6:.0f} MB"],
    ]  # fmt: skip
    figures: dict[str, Any] = {
        "rows": rows,
        "symbols": symbols,
        "catch_up": {"rows_per_cpu_second": round(per_cpu), "peak_mb": round(caught_up.peak / 1e6)},
        "steady": {
            name: {
                "commits": len(each.delays),
                "p50_s": round(each.p50, 3),
                "p99_s": round(each.p99, 3),
                "share": round(each.share, 3),
            }
            for name, each in followed.items()
        },
        "late_trade_ms": {"late": round(late, 1), "plain": round(plain, 1)},
        "query_ms": {"copy": round(hours, 1), "table": round(before, 1), "copying": round(query.copying * 1000)},
        "gaps": {"seconds": round(gaps.wall, 2), "peak_mb": round(gaps.peak / 1e6)},
    }

    def plot(axes: Axes) -> None:
        for name, each in followed.items():
            axes.ecdf(each.delays, label=name)
        axes.legend()
        axes.set(xlabel="seconds from Gold's commit to the candles'", ylabel="share of commits")

    report(BenchResult("candles", ["measurement", "of", "result", ""], table, figures, plot))
