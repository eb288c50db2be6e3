"""`k2flow run`: several exchanges at once, their metrics and health, and clusters of several hosts."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from k2flow.layers import CANDLES_TABLE, GOLD_TABLE
from k2flow.query.connection import connect_to
from k2flow.sandbox.kafka.local import free_port
from tests.integration.conftest import fill
from tests.integration.harness import ROOT, Lake, assert_tables, read_topic
from tests.integration.test_audit import audited
from tests.notify import NotifySocket
from tests.oracle import expect

NewLake = Callable[..., Lake]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Run:
    """A `k2flow run` in the background, its log in a file."""

    def __init__(self, lake: Lake, log: Path, *arguments: str, **extra: str) -> None:
        self.port = free_port()
        environment = lake.environment(K2FLOW_METRICS_PORT=str(self.port), **extra)
        command = [sys.executable, "-m", "k2flow", "run", *arguments]
        self._log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    def log(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and text of the answer; status 0 without an answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def samples(self) -> Samples:
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, frozenset(labels.items())))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self.get("/readyz")[0] == 200)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def children(self, exchange: str) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in found if f"flows.{exchange}" in child.cmdline()]


@contextmanager
def running(lake: Lake, log: Path, *arguments: str, **extra: str) -> Iterator[Run]:
    run = Run(lake, log, *arguments, **extra)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            for child in psutil.Process(run.process.pid).children(recursive=True):
                child.kill()
            run.process.kill()
            run.process.wait()


def test_exchange_that_keeps_crashing_does_not_stop_another(new_lake: NewLake, tmp_path: Path) -> None:
    binance, kraken = new_lake(), new_lake("kraken", partitions=1)
    both = {"K2FLOW_KRAKEN_TOPIC": kraken.topic}
    for lake in (binance, kraken):
        fill(lake, count=2_000, bad=0.05, duplicates=0.05, seed=1)
    arguments = ("binance", "kraken", "--processes", "1", "--trigger", "0.5")
    with running(binance, tmp_path / "log", *arguments, K2FLOW_LOG_FORMAT="json", **both) as run:
        run.wait_until_ready()
        run.wait_for(lambda: run.value("k2flow_rows_total", exchange="kraken", layer="gold") is not None)
        (unhurt,) = run.children("kraken")
        for seed in (2, 3):
            (victim,) = run.children("binance")
            victim.kill()
            run.wait_for(lambda: run.get("/readyz")[0] == 503)
            assert "binance: 0 of 1 processes read" in run.get("/readyz")[1]
            assert run.get("/healthz")[0] == 200
            for lake in (binance, kraken):
                fill(lake, count=500, bad=0.02, seed=seed)
            run.wait_until_ready()
        assert run.children("kraken") == [unhurt]
        # A process that is killed between a commit and its count loses that count; the tables lose nothing.
        run.wait_for(lambda: rows_of(run, "binance") == rows_of(run, "kraken") == 3_000)
        run.wait_for(lambda: run.value("binance_gold_lag") == run.value("kraken_dlq_lag") == 0)
        assert run.value("k2flow_lag_messages", exchange="kraken", layer="silver") == 0
        assert run.value("k2flow_dead_letters_total", exchange="kraken", reason="null_payload")
        assert (run.value("k2flow_commit_seconds_count", exchange="binance", layer="gold") or 0) >= 1
        assert (run.value("k2flow_resident_bytes", exchange="binance") or 0) > 50e6
        assert run.stop() == 0
        lines = [json.loads(line) for line in run.log().splitlines()]
        assert any("starting binance again" in line["message"] for line in lines)
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    for lake in (binance, kraken):
        assert_tables_of(lake)
        assert audited(lake)["verdict"] == "holds"


def test_candles_run_beside_an_exchange(new_lake: NewLake, tmp_path: Path) -> None:
    """Killed and maintained meanwhile: they equal Gold, and every command knows them."""
    lake = new_lake("kraken", partitions=1)
    fill(lake, count=1_000, duplicates=0.05, seed=1)
    with running(lake, tmp_path / "log", "kraken", "candles", "--trigger", "0.5") as run:
        run.wait_until_ready()
        run.wait_for(lambda: run.value("k2flow_rows_total", exchange="candles", layer="candles") is not None)
        (victim,) = run.children("candles")
        victim.kill()
        run.wait_for(lambda: "candles: 0 of 1 processes read" in run.get("/readyz")[1])
        fill(lake, count=500, seed=2)
        run.wait_until_ready()
        assert lake.command("maintain", CANDLES_TABLE).returncode == 0
        fill(lake, count=500, seed=3)
        run.wait_for(lambda: run.value("kraken_gold_lag") == 0 and rows_of(run, "kraken") == 2_000)
        lag = {"exchange": "candles", "layer": "candles"}
        run.wait_for(lambda: run.value("k2flow_lag_commits", **lag) == run.value("k2flow_lag_seconds", **lag) == 0)
        assert run.stop() == 0
    assert "starting candles again" in run.log()
    assert_candles(lake)
    fill(lake, count=500, seed=4)
    lake.catch_up()
    behind = json.loads(lake.command("status", "candles", "--json").stdout)["candles"]
    assert (behind["flow"]["state"], behind["level"], behind["trades"]) == ("stopped", "ok", gold_rows(lake) - 500)
    assert 0 < behind["lag"] == behind["gold_sequence_number"] - behind["sequence_number"]
    done = lake.command("run", "candles", "--until-caught-up")
    assert done.returncode == 0, done.stderr
    assert_candles(lake)
    shown = lake.command("status", "candles").stdout
    assert "candles: stopped: was process" in shown
    assert "topic" not in shown
    assert CANDLES_TABLE in lake.command("tables", "list").stdout
    assert lake.command("tables", "create", "candles").stdout == (
        f"market_data.{GOLD_TABLE}: up to date\nmarket_data.{CANDLES_TABLE}: up to date\n"
    )
    for wrong in (("candles", "--processes", "2"), ("candles", "--addresses", "a:1;b:2", "--process-id", "0")):
        done = lake.command("run", *wrong)
        assert (done.returncode, done.stderr.count("the candles flow is one process")) == (1, 1)


def gold_rows(lake: Lake) -> int:
    return int(connect_to(lake.catalog()).sql(f"SELECT count(*) FROM {GOLD_TABLE}").fetchall()[0][0])


def assert_candles(lake: Lake) -> None:
    """Compare the candles of each interval with those that SQL computes from Gold."""
    db = connect_to(lake.catalog())
    order = "(timestamp, length(trade_id), trade_id, message_id)"
    columns = "exchange, symbol, open_time, open, high, low, close, volume, quote_volume, buy_volume, trades"
    for interval, minutes in (("1m", 1), ("1h", 60), ("1d", 1440)):
        us = minutes * 60_000_000
        expected = f"""
            SELECT exchange, symbol, make_timestamptz(epoch_us("timestamp") // {us} * {us}), arg_min(price, {order}),
                max(price), min(price), arg_max(price, {order}), sum(quantity),
                sum(price::DECIMAL(20, 8) * quantity),
                sum(CASE WHEN side = 'BUY' THEN quantity ELSE 0 END), count(*)
            FROM {GOLD_TABLE} GROUP BY 1, 2, 3"""
        found = f"SELECT {columns} FROM candles('{interval}')"
        for one, other in ((found, expected), (expected, found)):
            assert db.sql(f"({one}) EXCEPT ALL ({other}) LIMIT 3").fetchall() == []
        assert db.sql(f"SELECT count(*) FROM ({found})").fetchall() != [(0,)]


def test_systemd_is_notified_when_the_flow_reads_and_stops(new_lake: NewLake, tmp_path: Path) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=500, seed=1)
    with (
        NotifySocket(tmp_path) as systemd,
        running(lake, tmp_path / "log", "binance", "--processes", "1", **systemd.variables(60)) as run,
    ):
        assert systemd.receive(30)["STATUS"] == "binance: 0 of 1 processes read"
        assert systemd.wait_for("READY", seconds=60)["STATUS"] == "ready"
        assert run.get("/readyz")[0] == 200
        (process,) = run.children("binance")
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & process.environ().keys()
        assert run.stop() == 0
        assert systemd.wait_for("STOPPING")
    assert_tables_of(lake)


def rows_of(run: Run, exchange: str) -> float | None:
    return run.value("k2flow_table_rows", table=f"bronze_{exchange}_trades")


def assert_tables_of(lake: Lake) -> None:
    expected = expect(read_topic(lake.bootstrap, lake.topic), lake.exchange.upper())
    bronze = lake.table("bronze").scan().count()
    assert bronze == len(expected.bronze)


def test_permanent_failure_ends_one_exchange_alone(new_lake: NewLake, tmp_path: Path) -> None:
    kraken = new_lake("kraken", partitions=1)
    fill(kraken, count=500, seed=1)
    arguments = ("binance", "kraken", "--processes", "1", "--trigger", "0.5")
    with running(kraken, tmp_path / "log", *arguments, K2FLOW_BINANCE_TOPIC="missing-topic") as run:
        run.wait_for(lambda: run.value("k2flow_rows_total", exchange="kraken", layer="gold") is not None)
        run.wait_for(lambda: run.get("/healthz")[0] == 503)
        assert "missing-topic does not exist" in run.get("/healthz")[1]
        assert len(run.children("kraken")) == 1
        assert run.stop() == 1
        assert run.log().count("missing-topic does not exist") == 2  # once when it happened, once at the end
    assert_tables(kraken, expect(read_topic(kraken.bootstrap, kraken.topic), "KRAKEN"))


def test_port_in_use_is_an_error_at_once(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for module in (["k2flow", "run", "binance", "--processes", "1"], ["bytewax.run", "flows.binance"]):
            done = subprocess.run(
                [sys.executable, "-m", *module],
                cwd=ROOT,
                env=lake.environment(K2FLOW_METRICS_PORT=port),
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 1
            assert f"127.0.0.1:{port} cannot be listened on" in done.stderr


def test_cluster_with_a_missing_host_restarts(new_lake: NewLake, tmp_path: Path) -> None:
    """Of two hosts, the first must not wait forever for the second."""
    lake = new_lake(partitions=2)
    fill(lake, count=1_000, seed=1)
    cluster = ";".join(f"127.0.0.1:{free_port()}" for _ in range(2))
    common = {"K2FLOW_CLUSTER": cluster, "K2FLOW_START_SECONDS": "6", "K2FLOW_UNTIL_CAUGHT_UP": "1"}
    with running(lake, tmp_path / "0", "binance", "--process-id", "0", **common) as first:
        first.wait_for(lambda: "did not connect to each other within 6 s" in first.log())
        with running(lake, tmp_path / "1", "binance", "--process-id", "1", **common) as second:
            for each in (first, second):
                assert each.process.wait(90) == 0, each.log()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_flow_that_does_not_drain_in_time_is_killed(new_lake: NewLake, tmp_path: Path) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=500, seed=1)
    extra = {"K2FLOW_STOP_SECONDS": "2", "K2FLOW_FAILPOINTS": "epoch.complete=hang"}
    with running(lake, tmp_path / "log", "binance", "--processes", "1", "--trigger", "0.5", **extra) as run:
        run.wait_for(lambda: "failpoint epoch.complete" in run.log())
        assert run.get("/metrics")[0] == 200
        run.stop()
        assert "not drained 2 s after the signal to stop: killed" in run.log()
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_killed_supervisor_ends_its_flows(new_lake: NewLake, tmp_path: Path) -> None:
    """The flows drain: the messages they had read are committed, and the next supervisor can start."""
    lake = new_lake(partitions=1)
    fill(lake, count=2_000, seed=1)
    with running(lake, tmp_path / "log", "binance", "--processes", "1", "--trigger", "600") as run:
        run.wait_until_ready()
        (flow,) = run.children("binance")
        time.sleep(3)  # so that it reads some messages
        run.process.kill()
        flow.wait(60)
    assert lake.table("gold").scan().count() > 0
    lake.catch_up()
    assert lake.table("gold").scan().count() == 2_000
