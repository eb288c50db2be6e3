"""`scripts/demo`: run all flows on simulated trades and kill one midway. Exit code 1 if any count is wrong."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import duckdb
import typer
from rich.console import Console
from rich.table import Table

import k2flow
from k2flow.audit import AuditReport, audit
from k2flow.audit.report import Verdict
from k2flow.cli.output import console as output_console
from k2flow.cli.output import progress_bars
from k2flow.config.settings import load_settings
from k2flow.errors import CatalogError
from k2flow.exchange import Exchange, find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.ledger import read
from k2flow.layers import GOLD_TABLE
from k2flow.report import Unavailable, attempt, gather, render, write
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import Manifest, ProduceOptions, produce

HOME = Path(".k2flow/demo")
COUNTS = {"binance": 200_000, "kraken": 20_000}
BAD, DUPLICATES = 0.02, 0.03
SPREAD_SECONDS = 3600.0  # so that one-minute candles look like a market
DEADLINE_SECONDS = 180
CANDLES = """
    SELECT strftime(open_time, '%H:%M') AS minute, open, high, low, close, volume, trades
    FROM candles('1m') WHERE exchange = 'BINANCE' AND symbol = 'BTCUSDT' ORDER BY open_time DESC LIMIT 8"""

console = Console(width=110)


def main(keep: Annotated[bool, typer.Option("--keep", help="Leave Kafka running afterwards.")] = False) -> None:
    """Run the demo in a fresh folder, .k2flow/demo."""
    began = time.monotonic()
    logging.getLogger("k2flow").setLevel(logging.ERROR)  # librdkafka warns of what it retries while the broker starts
    if HOME.exists():
        LocalKafka(HOME / "kafka").stop()
        shutil.rmtree(HOME)
    kafka = LocalKafka(HOME / "kafka", free_port())
    os.environ |= {"K2FLOW_HOME": str(HOME), "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap}
    exchanges = [find_exchange(name) for name in COUNTS]
    try:
        print_heading(f"Kafka at {kafka.bootstrap} (the first start downloads it: about 46 MB)")
        kafka.start({e.settings.topic: e.settings.partitions for e in exchanges})
        print_heading("tables")
        subprocess.run([sys.executable, "-m", "k2flow", "tables", "create", "all"], check=True)
        manifests = {e.name: fill(e, kafka.bootstrap) for e in exchanges}
        run_flows(exchanges)
        run_candles()
        correct = compare_counts(exchanges, manifests)
        audited = run_audit(exchanges)
        correct &= isinstance(audited, AuditReport) and audited.verdict is Verdict.HOLDS
        page = write_report(exchanges, audited)
        show_candles()
        show_next_steps(kafka, keep, page)
    finally:
        if not keep:
            kafka.stop()
    print_heading(f"done in {time.monotonic() - began:.0f} s")
    if not correct:
        raise SystemExit(1)


def print_heading(what: str) -> None:
    console.rule(f"[bold]{what}", align="left")


def fill(exchange: Exchange, bootstrap: str) -> Manifest:
    """Produce the trades of an exchange, and return what was sent."""
    count = COUNTS[exchange.name]
    print_heading(
        f"{count:,} trades of {exchange.name}, over the last hour: {BAD:.0%} bad, {DUPLICATES:.0%} duplicates"
    )
    options = ProduceOptions(count=count, bad=BAD, duplicates=DUPLICATES, seed=1, over_seconds=SPREAD_SECONDS)
    manifest = produce(exchange.code, exchange.settings.topic, {"bootstrap.servers": bootstrap}, options)
    path = HOME / f"manifest-{exchange.name}.json"
    path.write_text(manifest.to_json())
    print(f"sent in {manifest.seconds:.1f} s; the manifest is {path}")
    return manifest


def run_flows(exchanges: list[Exchange]) -> None:
    """Run both flows until caught up. Kill the first with -9 after its first commit, and restart it."""
    first, *others = exchanges
    print_heading(f"the flows; {first.name} is killed with -9 midway and restarted")
    running = {e.name: start_flow(e) for e in others}
    victim = start_flow(first, batch_rows=20_000, commit_batches=1)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while committed(first) == 0:
        if victim.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the flow of {first.name} did not commit: see its output above")
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    print(f"-- killed {first.name} with {committed(first):,} of {COUNTS[first.name]:,} offsets in all four tables --")
    running[first.name] = start_flow(first)
    for name, process in running.items():
        if process.wait(DEADLINE_SECONDS):
            raise SystemExit(f"the flow of {name} failed: see its output above")


def run_candles() -> None:
    """Run the flow from Gold to the candles until caught up."""
    print_heading("the flow of the candles, from Gold")
    subprocess.run([sys.executable, "-m", "k2flow", "run", "candles", "--until-caught-up"], check=True)


def start_flow(exchange: Exchange, **settings: int) -> subprocess.Popen[bytes]:
    own = {f"K2FLOW_{exchange.name.upper()}_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "bytewax.run", f"flows.{exchange.name}"]
    return subprocess.Popen(command, env={**os.environ, "K2FLOW_UNTIL_CAUGHT_UP": "1", **own})


def committed(exchange: Exchange) -> int:
    """Return the number of offsets that all four tables hold."""
    catalog = open_catalog(load_settings(COUNTS))
    try:
        ledgers = [
            read(load_table(catalog, name).properties, exchange.name, exchange.settings.topic)
            for name in exchange.tables
        ]
    except CatalogError:
        return 0
    return min(sum(e.next - e.first for e in ledger.partitions.values()) for ledger in ledgers)


def compare_counts(exchanges: list[Exchange], manifests: dict[str, Manifest]) -> bool:
    """Show the counts of the tables next to the manifests. Return whether all are equal."""
    connection = k2flow.connect()
    print_heading("rows per layer, next to the producer's manifest")
    rows: list[tuple[str, int, int]] = []
    for e in exchanges:
        sent = manifests[e.name]
        in_gold = scalar(connection, f"SELECT count(*) FROM {GOLD_TABLE} WHERE exchange = '{e.code}'")
        rows += [
            (e.bronze, scalar(connection, f"SELECT count(*) FROM {e.bronze}"), sent.sent),
            (e.silver, scalar(connection, f"SELECT count(*) FROM {e.silver}"), sent.silver),
            (e.dlq, scalar(connection, f"SELECT count(*) FROM {e.dlq}"), sent.dlq),
            (f"{GOLD_TABLE} ({e.code})", in_gold, sent.gold),
        ]
    equal = print_counts("table", rows)
    print_heading("dead letters by reason")
    reasons: list[tuple[str, int, int]] = []
    for e in exchanges:
        found = dict(connection.sql(f"SELECT reason, count(*) FROM {e.dlq} GROUP BY reason").fetchall())
        expected = manifests[e.name].bad
        for reason in sorted({*found, *expected}):
            reasons.append((f"{e.name} {reason}", found.get(reason, 0), expected.get(reason, 0)))
    return equal & print_counts("reason", reasons)


def run_audit(exchanges: list[Exchange]) -> AuditReport | Unavailable:
    """Audit as `k2flow audit` does."""
    print_heading("the audit: a proof from Kafka's offsets to Gold's files")
    settings = load_settings(COUNTS)
    with progress_bars() as progress:
        audited = attempt(lambda: audit(open_catalog(settings), settings, exchanges, progress=progress))
    if isinstance(audited, Unavailable):
        print(f"audit incomplete: {audited.text}")
    else:
        audited.show(output_console())
    return audited


def show_candles() -> None:
    print_heading("one-minute candles of BTCUSDT, by DuckDB")
    found = k2flow.connect().sql(CANDLES)
    table = Table(*found.columns)
    for row in found.fetchall():
        table.add_row(*map(str, row))
    console.print(table)


def write_report(exchanges: list[Exchange], audited: AuditReport | Unavailable) -> Path:
    """Write the page as `k2flow report` does, with the audit above. Return its path."""
    print_heading("the report: one page with all of it")
    settings, path = load_settings(COUNTS), HOME / "report.html"
    write(path, render(gather(open_catalog(settings), settings, exchanges, ()), audited))
    return path


def scalar(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    return int(connection.sql(sql).fetchall()[0][0])


def print_counts(what: str, rows: list[tuple[str, int, int]]) -> bool:
    table = Table(what, "found", "sent", "")
    for name, found, sent in rows:
        table.add_row(name, f"{found:,}", f"{sent:,}", "ok" if found == sent else "[red]DIFFERS")
    console.print(table)
    return all(found == sent for _, found, sent in rows)


def show_next_steps(kafka: LocalKafka, keep: bool, page: Path) -> None:
    print_heading("next steps")
    print(f"export K2FLOW_HOME={HOME}")
    if keep:
        print(f"export K2FLOW_KAFKA_BOOTSTRAP_SERVERS={kafka.bootstrap}")
        print(".venv/bin/k2flow produce kraken --count 5000 --bad 0.02 --over 10m")
        print(".venv/bin/k2flow run kraken candles --trigger 1")
        print(".venv/bin/k2flow kafka stop")
    else:
        print("scripts/demo --keep    # leaves Kafka running")
    print(".venv/bin/k2flow tables list")
    print(".venv/bin/k2flow audit")
    print(f'.venv/bin/k2flow query "SELECT symbol, count(*) FROM {GOLD_TABLE} GROUP BY 1 ORDER BY 2 DESC LIMIT 5"')
    print(f"and open {page.resolve().as_uri()} in a browser")


typer.run(main)
