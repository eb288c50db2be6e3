"""The command line as users type it: output and exit code of each command, in its own process."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from k2flow.process_exit import EXIT_UNAVAILABLE
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import Manifest
from tests.integration import forked
from tests.integration.conftest import fill
from tests.integration.harness import ROOT, Flow, Lake, assert_tables, ledger_offsets, read_topic
from tests.oracle import expect

SAMPLE = Path(__file__).parents[1] / "data" / "kraken_btcusd_trades.csv"
NOWHERE = "127.0.0.1:9"  # nothing listens there
K2FLOW = (sys.executable, "-m", "k2flow")
BYTEWAX = (sys.executable, "-m", "bytewax.run", "flows.binance")
RUN = (*K2FLOW, "run", "binance", "--processes", "2")

NewLake = Callable[..., Lake]


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """A lake without a broker."""
    return Lake("binance", "trades", tmp_path / "lake", NOWHERE)


def call(lake: Lake, command: Sequence[str], seconds: float = 60, **extra: str) -> subprocess.CompletedProcess[bytes]:
    _, _, module, *arguments = command
    return forked.call(module, arguments, lake.environment(**extra), ROOT, seconds)


def k2flow(lake: Lake, *arguments: str, **extra: str) -> bytes:
    """Run a command that must succeed, and return its output."""
    done = call(lake, (*K2FLOW, *arguments), **extra)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def start(lake: Lake, command: Sequence[str], **extra: str) -> Flow:
    logs = tempfile.TemporaryFile()  # noqa: SIM115 - the Flow closes it
    environment = lake.environment(**extra)
    return Flow([subprocess.Popen(command, cwd=ROOT, env=environment, stdout=logs, stderr=subprocess.STDOUT)], logs)


def assert_one_line(done: subprocess.CompletedProcess[bytes], says: str) -> None:
    """Assert that the command failed with one line that matches `says`, without a traceback."""
    text = done.stderr.decode()
    lines = [line for line in text.splitlines() if line.startswith("k2flow: error: ")]
    assert done.returncode != 0, text
    assert len(lines) == 1, text
    assert text.splitlines()[-1] == lines[0], text
    assert re.search(says, lines[0]), text
    assert "Traceback" not in text
    assert "panicked" not in text


BAD_STARTS: list[tuple[Mapping[str, str], str]] = [
    ({"K2FLOW_BINANCE_TRIGGER_SECONDS": "0"}, r"K2FLOW_BINANCE_TRIGGER_SECONDS='0' is wrong: .*greater"),
    ({"K2FLOW_LOG_LEVEL": "LOUD"}, r"K2FLOW_LOG_LEVEL='LOUD' is wrong: .*'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ({"K2FLOW_BINANCE_TRIGER_SECONDS": "1"}, r"unknown setting .*: did you mean K2FLOW_BINANCE_TRIGGER_SECONDS\?"),
    ({"K2FLOW_KAFKA_NO_SUCH": "1"}, r'K2FLOW_KAFKA_\* setting is wrong: .*"no\.such"'),
    (
        {"PYICEBERG_CATALOG__K2FLOW__TYPE": "sql", "PYICEBERG_CATALOG__K2FLOW__URI": "sqlite:////nonexistent/x.db"},
        r"catalog or its storage cannot be used: .*check PYICEBERG_CATALOG__K2FLOW__\*",
    ),
    (
        {"PYICEBERG_CATALOG__K2FLOW__TYPE": "rest", "PYICEBERG_CATALOG__K2FLOW__URI": f"http://{NOWHERE}/"},
        r"catalog or its storage cannot be used: .*Connection refused.*check PYICEBERG_CATALOG__K2FLOW__\*",
    ),
    (
        {"PYICEBERG_CATALOG__K2FLOW__TYPE": "no-such-type", "PYICEBERG_CATALOG__K2FLOW__URI": "x"},
        r"catalog is configured wrongly: .*PYICEBERG_CATALOG__K2FLOW__\*",
    ),
]
WITH_KAFKA: list[tuple[Mapping[str, str], str]] = [
    ({"K2FLOW_BINANCE_TOPIC": "nowhere"}, r"topic nowhere does not exist on .*: create it, or set K2FLOW_.*_TOPIC"),
    ({"K2FLOW_KAFKA_ISOLATION_LEVEL": "read_uncommitted"}, r"K2FLOW_KAFKA_ISOLATION_LEVEL must be read_committed"),
    ({"K2FLOW_KAFKA_LOG_CONNECTION_CLOSE": "false"}, r"K2FLOW_KAFKA_LOG_CONNECTION_CLOSE must be true"),
    ({"K2FLOW_KAFKA_ENABLE_AUTO_COMMIT": "true"}, r"K2FLOW_KAFKA_ENABLE_AUTO_COMMIT must be false"),
]


@pytest.mark.parametrize("command", [RUN, BYTEWAX], ids=["run", "bytewax"])
@pytest.mark.parametrize(("extra", "says"), BAD_STARTS)
def test_failed_start_is_one_line(lake: Lake, command: Sequence[str], extra: Mapping[str, str], says: str) -> None:
    """A wrong or unknown setting or an unreachable catalog: one line, for any number of processes."""
    assert_one_line(call(lake, command, **extra), says)


@pytest.mark.parametrize("command", [RUN, BYTEWAX], ids=["run", "bytewax"])
@pytest.mark.parametrize(("extra", "says"), WITH_KAFKA)
def test_start_refused_by_the_broker_is_one_line(
    new_lake: NewLake, command: Sequence[str], extra: Mapping[str, str], says: str
) -> None:
    """A missing topic, or a property that would break exactly-once delivery."""
    assert_one_line(call(new_lake(), command, **extra), says)


@pytest.mark.parametrize("command", [RUN, BYTEWAX], ids=["run", "bytewax"])
def test_different_table_is_an_error_that_says_how(lake: Lake, command: Sequence[str]) -> None:
    """A flow never alters an existing table by itself."""
    k2flow(lake, "tables", "create", "binance")
    done = call(lake, command, K2FLOW_BINANCE_DLQ_RETENTION_DAYS="31")
    assert_one_line(done, r"table market_data\.dlq_binance_trades differs: .*retention-days is 30, not 31.*rename it")


def test_unknown_exchange_is_an_error_with_the_known_ones(lake: Lake) -> None:
    """The error lists the known exchanges, and says how to add one."""
    for arguments in (("run", "coinbase"), ("tables", "create", "coinbase"), ("produce", "coinbase")):
        done = call(lake, (*K2FLOW, *arguments))
        assert_one_line(done, "unknown exchange 'coinbase': known are binance, kraken; .*flows/coinbase.py")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ((*K2FLOW, "--debug", "run", "binance", "--processes", "1"), {}),
        (BYTEWAX, {"K2FLOW_DEBUG": "1"}),
        ((*K2FLOW, "run", "binance"), {"K2FLOW_DEBUG": "1"}),
        ((*K2FLOW, "--debug", "tables", "create"), {}),
    ],
)
def test_debug_shows_the_traceback(lake: Lake, command: Sequence[str], extra: Mapping[str, str]) -> None:
    """The traceback comes from the process that failed, also under `k2flow run`."""
    uri = {"PYICEBERG_CATALOG__K2FLOW__URI": "sqlite:////nonexistent/x.db", "PYICEBERG_CATALOG__K2FLOW__TYPE": "sql"}
    done = call(lake, command, **uri, **extra)
    assert done.returncode != 0
    assert b"Traceback" in done.stderr
    assert b"k2flow.errors.CatalogError: " in done.stderr


@pytest.mark.slow
def test_flow_waits_for_a_broker_that_is_down(kafka: LocalKafka, tmp_path: Path) -> None:
    """The flow logs what it waits for and what to do, and continues when the broker comes up."""
    port = free_port()
    broker = LocalKafka(tmp_path / "kafka", port)
    lake = Lake("binance", "trades", tmp_path / "lake", broker.bootstrap)
    with broker:
        broker.start({lake.topic: 2})
        fill(lake, count=300, seed=1)
    with start(lake, RUN, K2FLOW_UNTIL_CAUGHT_UP="1") as flow:
        flow.wait_for_log(f"no Kafka broker answers at {lake.bootstrap}")
        flow.wait_for_log("waiting for it (start one with `k2flow kafka start`, or set K2FLOW_KAFKA_BOOTSTRAP_SERVERS)")
        with LocalKafka(tmp_path / "kafka", port):
            log = flow.wait()
            assert flow.codes() == [0], log
            assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    assert "k2flow: error" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize(("command", "number"), [(RUN, signal.SIGTERM), (BYTEWAX, signal.SIGINT)])
def test_flow_that_waits_for_the_broker_stops_on_a_signal(
    lake: Lake, command: Sequence[str], number: signal.Signals
) -> None:
    """Nothing has started, so it exits at once with code 0."""
    with start(lake, command) as flow:
        flow.wait_for_log("waiting for it")
        flow.signal(number)
        log = flow.wait(20)
        assert flow.codes() == [0], log
    assert "Traceback" not in log


def test_flow_that_waits_for_the_registry_stops_on_a_signal(new_lake: NewLake) -> None:
    """The messages read are in no table, so it exits with an error. The next start reads them again."""
    lake = new_lake()
    fill(lake, count=100, seed=8)
    extra = {"K2FLOW_SCHEMA_REGISTRY_URL": f"http://{NOWHERE}", "K2FLOW_BINANCE_TRIGGER_SECONDS": "1"}
    with start(lake, (*K2FLOW, "run", "binance", "--processes", "1"), **extra) as flow:
        flow.wait_for_log("waiting, no message is rejected for it")
        flow.signal(signal.SIGTERM)
        log = flow.wait(30)
        assert flow.codes() == [EXIT_UNAVAILABLE], log
    assert log.splitlines()[-1].startswith(f"k2flow: error: schema registry http://{NOWHERE}: no schema 1 yet"), log
    assert "Traceback" not in log
    assert "panicked" not in log
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def settings_of(printed: bytes) -> dict[str, tuple[str, str]]:
    """Return value and source by setting, from the output of `k2flow config`."""
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in printed.decode().splitlines() if "│" in line]
    return {name: (value, source) for name, value, source in rows}


def test_config_shows_values_and_sources(lake: Lake) -> None:
    """Every setting is listed, and secrets are masked wherever they occur."""
    extra = {
        "K2FLOW_KAFKA_SASL_PASSWORD": "hunter2",
        "K2FLOW_KAFKA_SASL_JAAS_CONFIG": "hunter2",
        "K2FLOW_KAFKA_SSL_KEY_PEM": "hunter2",
        "K2FLOW_SCHEMA_REGISTRY_URL": "https://me:hunter2@registry:8081",
        "K2FLOW_BINANCE_TRIGGER_SECONDS": "2.5",
        "PYICEBERG_CATALOG__K2FLOW__URI": "postgresql+psycopg2://me:hunter2@db/lake",
        "PYICEBERG_CATALOG__K2FLOW__S3__SECRET_ACCESS_KEY": "hunter2",
    }
    printed = k2flow(lake, "config", **extra)
    assert b"hunter2" not in printed
    rows = settings_of(printed)
    assert rows["K2FLOW_KAFKA_SASL_PASSWORD"] == ("****", "environment")
    assert rows["K2FLOW_SCHEMA_REGISTRY_URL"] == ("https://me:****@registry:8081", "environment")
    assert rows["K2FLOW_KAFKA_BOOTSTRAP_SERVERS"] == (NOWHERE, "environment")
    assert rows["K2FLOW_BINANCE_TRIGGER_SECONDS"] == ("2.5", "environment")
    assert rows["K2FLOW_BINANCE_PROCESSES"] == ("3", "flows/binance.py")
    assert rows["K2FLOW_KRAKEN_TRIGGER_SECONDS"] == ("30.0", "flows/kraken.py")
    assert rows["K2FLOW_KRAKEN_DEDUP_WINDOW_HOURS"] == ("24", "default")
    assert rows["K2FLOW_SCHEMA_IDS"] == ("1", "default")
    assert rows["catalog uri"] == ("postgresql+psycopg2://me:****@db/lake", "PyIceberg's configuration")
    by_default = settings_of(k2flow(lake, "config"))
    assert by_default["catalog type"] == ("sql", "default, under K2FLOW_HOME")
    assert by_default["K2FLOW_BINANCE_TOPIC"] == ("trades", "environment")


def test_tables_create_is_idempotent_and_list_counts(lake: Lake) -> None:
    """The list counts the five medallion tables, and says which are missing."""
    assert b"0/5 medallion tables" in k2flow(lake, "tables", "list")
    made = k2flow(lake, "tables", "create", "kraken").decode()
    assert made.count(": created") == 4
    listed = k2flow(lake, "tables", "list").decode()
    assert "3/5 medallion tables" in listed
    assert listed.count("missing") == 4
    second = k2flow(lake, "tables", "create").decode()
    assert (second.count(": created"), second.count(": up to date")) == (4, 5)
    third = k2flow(lake, "tables", "create", "all").decode()
    assert (third.count(": created"), third.count(": up to date")) == (0, 9)
    assert b"5/5 medallion tables" in k2flow(lake, "tables", "list")


def test_kafka_status_without_a_broker(lake: Lake) -> None:
    """A local address is stopped. Another machine's address is an error that names it."""
    assert b"is stopped at 127.0.0.1:9" in k2flow(lake, "kafka", "status")
    done = call(lake, (*K2FLOW, "kafka", "status"), K2FLOW_KAFKA_BOOTSTRAP_SERVERS="127.0.0.2:9")
    assert_one_line(done, "no broker answers at 127.0.0.2:9 from K2FLOW_KAFKA_BOOTSTRAP_SERVERS")


def test_kafka_status_of_a_foreign_broker(new_lake: NewLake) -> None:
    """k2flow uses it, and does not claim to have started it."""
    lake = new_lake()
    assert f"the broker at {lake.bootstrap}".encode() in k2flow(lake, "kafka", "status")


def test_produce_run_list_and_query(new_lake: NewLake, tmp_path: Path) -> None:
    """One round of a user: messages with a manifest, a flow of two processes, the tables, queries, dead letters."""
    lake = new_lake("kraken", partitions=2)
    path = tmp_path / "manifest.json"
    printed = k2flow(
        lake,
        *("produce", "kraken", "--count", "2000", "--bad", "0.05", "--duplicates", "0.05", "--seed", "3"),
        *("--manifest", str(path)),
    )
    manifest = Manifest.from_json(path.read_text())
    assert (manifest.topic, manifest.sent, manifest.exchange) == (lake.topic, 2000, "KRAKEN")
    assert f"2,000 messages to {lake.topic}".encode() in printed
    k2flow(lake, "run", "kraken", "--until-caught-up", "--processes", "2", "--trigger", "1")
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "KRAKEN"))
    listed = k2flow(lake, "tables", "list").decode()
    assert "3/5 medallion tables" in listed
    rows = {cells[1].strip(): cells[2].strip() for line in listed.splitlines() if len(cells := line.split("│")) > 5}
    assert rows["bronze_kraken_trades"] == "2,000"
    assert rows["silver_kraken_trades"] == f"{manifest.silver:,}"
    assert rows["gold_crypto_trades"] == f"{manifest.gold:,}"
    assert rows["dlq_kraken_trades"] == f"{manifest.dlq:,}"
    answer = k2flow(lake, "query", "SELECT count(*) AS n FROM gold_crypto_trades", "--format", "json")
    assert json.loads(answer) == {"n": manifest.gold}
    counted = [json.loads(line) for line in k2flow(lake, "dlq", "list", "kraken", "--json").decode().splitlines()]
    assert {each["reason"]: each["count"] for each in counted} == manifest.bad
    assert "invalid_side" in k2flow(lake, "dlq", "list").decode()
    bad = k2flow(lake, "query", 'SELECT "partition", "offset", reason FROM dlq_kraken_trades', "-f", "csv").decode()
    one = next(line.split(",") for line in bad.splitlines() if line.endswith(",invalid_utf8"))
    shown = k2flow(lake, "dlq", "show", "kraken", *one[:2]).decode()
    assert re.search(r"reason +invalid_utf8: ", shown)
    assert "defect at byte" in shown
    assert_one_line(call(lake, (*K2FLOW, "dlq", "show", "kraken", "0", "999999")), "has no row of partition 0")


def test_produce_replays_recorded_trades(new_lake: NewLake, tmp_path: Path) -> None:
    """`produce --replay` sends the trades of a file, and writes a manifest per exchange."""
    lake = new_lake("kraken", partitions=2)
    manifest = tmp_path / "sent.json"
    k2flow(lake, "produce", "--replay", str(SAMPLE), "--manifest", str(manifest))
    assert Manifest.from_json((tmp_path / "sent-kraken.json").read_text()).sent == 300
    k2flow(lake, "run", "kraken", "--until-caught-up", "--processes", "1")
    assert lake.table("gold").scan().count() == 300
    done = call(lake, (*K2FLOW, "produce", "kraken", "--replay", str(SAMPLE)))
    assert_one_line(done, "omit the exchange")


def test_unwritable_manifest_is_an_error_before_anything_is_sent(new_lake: NewLake) -> None:
    """Messages without the requested manifest are useless."""
    lake = new_lake()
    for manifest in ("/nonexistent/sent.json", str(lake.home.parent)):
        done = call(lake, (*K2FLOW, "produce", "binance", "--count", "10", "--manifest", manifest))
        assert_one_line(done, re.escape(manifest))
    assert read_topic(lake.bootstrap, lake.topic) == []


VALUES = {
    "id": (1, 2, 3),
    "amount": (Decimal("9999999999.99999999"), Decimal("0.00000001"), None),
    "text": ('say "hi", you', "ключ\nline", ""),
    "moment": (datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC), datetime(2026, 3, 14, 9, 26, 53, 589_793, UTC), None),
    "day": (date(1, 1, 1), date(2026, 3, 14), None),
    "conditions": (["a", "b, c"], [], None),
    "vendor": ([("k", "v"), ("a", "")], [], None),
    "payload": (b"\x00\xff'\"\\", b"", None),
}
SQL = r"""
SELECT * FROM (VALUES
    (1, 9999999999.99999999::DECIMAL(18, 8), 'say "hi", you', TIMESTAMPTZ '1969-12-31 23:59:59.999999+00',
     DATE '0001-01-01', ['a', 'b, c'], MAP {'k': 'v', 'a': ''}, '\x00\xFF''"\x5C'::BLOB),
    (2, 0.00000001, 'ключ' || chr(10) || 'line', TIMESTAMPTZ '2026-03-14 09:26:53.589793+00',
     DATE '2026-03-14', CAST([] AS VARCHAR[]), CAST(MAP {} AS MAP(VARCHAR, VARCHAR)), ''::BLOB),
    (3, NULL, '', NULL, NULL, NULL, NULL, NULL)
) AS t(id, amount, text, moment, day, conditions, vendor, payload) ORDER BY id; -- a comment at the end
"""


def test_query_in_every_format(lake: Lake, tmp_path: Path) -> None:
    """Another program reads the same rows from each format: exact decimals, and null apart from empty."""
    rows = [dict(zip(VALUES, row, strict=True)) for row in zip(*VALUES.values(), strict=True)]
    in_arrow = pa.ipc.open_stream(k2flow(lake, "query", SQL, "--format", "arrow")).read_all()
    assert in_arrow.to_pylist() == rows
    in_parquet = pq.read_table(io.BytesIO(k2flow(lake, "query", SQL, "-f", "parquet")))
    assert in_parquet.to_pylist() == rows
    assert in_parquet.schema.field("amount").type == pa.decimal128(18, 8)
    in_json = k2flow(lake, "query", SQL, "-f", "json").decode().splitlines()
    assert [from_json(line) for line in in_json] == rows
    path = tmp_path / "rows.csv"
    path.write_bytes(k2flow(lake, "query", SQL, "-f", "csv"))
    types = [
        *("INTEGER", "DECIMAL(18, 8)", "VARCHAR", "TIMESTAMPTZ", "DATE"),
        *("VARCHAR[]", "MAP(VARCHAR, VARCHAR)", "BLOB"),
    ]
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    columns = dict(zip(VALUES, types, strict=True))
    found = connection.read_csv(str(path), header=True, dtype=columns, allow_quoted_nulls=False)  # type: ignore[call-arg, arg-type]
    assert found.to_arrow_table().to_pylist() == rows
    lines = list(csv.reader(path.read_text("utf-8").splitlines(keepends=True)))
    assert lines[0] == list(VALUES)
    assert [line[2] for line in lines[1:]] == list(VALUES["text"])
    table = k2flow(lake, "query", SQL).decode()
    assert "9999999999.99999999" in table
    assert table.count("NULL") == 6


def from_json(line: str) -> dict[str, Any]:
    """Parse a line of JSON into the types of VALUES."""
    row = json.loads(line, parse_float=Decimal)
    blob = row["payload"]
    return {
        **row,
        "amount": None if row["amount"] is None else Decimal(row["amount"]),
        "moment": row["moment"] and datetime.fromisoformat(row["moment"]),
        "day": row["day"] and date.fromisoformat(row["day"]),
        "vendor": None if row["vendor"] is None else list(row["vendor"].items()),
        "payload": None if blob is None else re.sub(r"\\x(..)", lambda m: chr(int(m[1], 16)), blob).encode("latin-1"),
    }


CANNOT_BE_CAST = ("SELECT CAST(v AS INT) FROM (VALUES ('q')) t(v)", "Could not convert string 'q'")


@pytest.mark.parametrize(
    ("format", "sql", "says"),
    [
        ("table", "SELEC 1", "Parser Error: .*SELEC"),
        ("csv", "SELECT * FROM gold_crypto_trade", "gold_crypto_trade does not exist"),
        *((format, *CANNOT_BE_CAST) for format in ("table", "csv", "json", "parquet", "arrow")),
    ],
)
def test_bad_sql_is_an_error_of_one_line(lake: Lake, format: str, sql: str, says: str) -> None:
    """The error is in the text or in the evaluation of a row. Nothing is printed on standard output."""
    done = call(lake, (*K2FLOW, "query", sql, "--format", format))
    assert_one_line(done, says)
    assert done.stdout == b""


def test_query_runs_any_statement_of_duckdb(lake: Lake) -> None:
    """Statements without rows, SHOW, several statements, and an empty table."""
    k2flow(lake, "tables", "create")
    assert k2flow(lake, "query", "SET threads = 1", "-f", "csv") == b""
    shown = k2flow(lake, "query", "SHOW TABLES", "-f", "csv").decode().split()
    assert (len(shown), shown[0]) == (10, "name")
    assert k2flow(lake, "query", "SELECT 1 AS a; SELECT 2 AS b", "-f", "json") == b'{"b":2}\n'
    assert k2flow(lake, "query", "SELECT count(*) AS n FROM gold_crypto_trades", "-f", "csv") == b"n\n0\n"


def children_of(flow: Flow, count: int) -> list[psutil.Process]:
    """Return the processes of the flow, in the order of their start."""
    supervisor = psutil.Process(flow.processes[0].pid)
    children = sorted(supervisor.children(recursive=True), key=lambda child: child.create_time())
    assert len(children) == count
    return children


def test_sigterm_drains_all_processes(new_lake: NewLake) -> None:
    """On SIGTERM to `k2flow run` every process commits all messages it has read, and exits with 0."""
    lake = new_lake(partitions=4)
    fill(lake, count=2_000, bad=0.05, seed=5)
    with start(lake, (*RUN, "--trigger", "600")) as flow:
        flow.wait_for_log(f"reads {lake.topic}", 2)
        children = children_of(flow, 2)
        time.sleep(2)  # the processes read all messages
        flow.signal(signal.SIGTERM)
        log = flow.wait(60)
        assert flow.codes() == [0], log
    assert not any(child.is_running() for child in children)
    assert sum(ledger_offsets(lake)["bronze"].values()) == 2_000, log
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_all_processes_restart_after_one_is_killed(new_lake: NewLake, victim: int) -> None:
    """One line names it, all processes restart, and nothing is lost or duplicated."""
    lake = new_lake(partitions=4)
    fill(lake, count=500, seed=6)
    with start(lake, (*RUN, "--trigger", "1")) as flow:
        flow.wait_for_log(f"reads {lake.topic}", 2)
        first = children_of(flow, 2)
        first[victim].send_signal(signal.SIGKILL)
        flow.wait_for_log(f"reads {lake.topic}", 4)
        second = children_of(flow, 2)
        assert not any(child.is_running() for child in first)
        time.sleep(2)
        flow.signal(signal.SIGTERM)
        log = flow.wait(60)
        assert flow.codes() == [0], log
    assert f"process {victim} of 2 of binance was killed by signal 9" in log
    assert "starting binance again in" in log
    assert "Traceback" not in log
    assert "panicked" not in log
    assert not any(child.is_running() for child in second)
    k2flow(lake, "run", "binance", "--until-caught-up", "--processes", "1")
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


@pytest.mark.slow
def test_crash_loop_backs_off(new_lake: NewLake) -> None:
    """Pauses double, and SIGTERM ends a pause at once."""
    lake = new_lake(partitions=1)
    with start(lake, (*K2FLOW, "run", "binance", "--processes", "1"), K2FLOW_FAILPOINTS="opened=die") as flow:
        flow.wait_for_log("failure 4 in a row")
        flow.signal(signal.SIGTERM)
        log = flow.wait(5)
    pauses = [float(found) for found in re.findall(r"again in ([0-9.]+) s", log)]
    assert len(pauses) == 4
    assert all(2**i / 2 <= pause <= 2**i for i, pause in enumerate(pauses)), pauses
