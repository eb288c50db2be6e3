"""The audit's exit code: 0 on the tables of correct flows, 1 if an invariant is violated, 2 if it is incomplete."""

import dataclasses
import json
import re
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from k2flow.audit import AuditReport, audit
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.sandbox.kafka.local import free_port
from tests.integration import damage
from tests.integration.conftest import fill
from tests.integration.harness import ROOT, Lake, batches, ledger_offsets
from tests.integration.test_flow import new_good_value

NewLake = Callable[..., Lake]


def audited(lake: Lake, code: int = 0, full: bool = True, **extra: str) -> dict[str, Any]:
    """Return the report of an audit in this process, whose verdict must have exit code `code`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in lake.environment(**extra).items():
            patch.setenv(name, value)
        exchange = dataclasses.replace(find_exchange(lake.exchange))  # one that reads its settings now
        report = audit(lake.catalog(), load_settings(exchange_names()), [exchange], full=full)
    assert report.verdict.exit_code == code, report.to_dict()
    return report.to_dict()


def printed(lake: Lake, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Return the report of `k2flow audit EXCHANGE --json`, which must end with `code`."""
    done = lake.command("audit", lake.exchange, "--json", *arguments)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_clean_run_has_no_findings(new_lake: NewLake) -> None:
    lake = new_lake()
    fill(lake, count=6_000, bad=0.05, duplicates=0.05, seed=1)
    lake.catch_up(2, K2FLOW_BINANCE_BATCH_ROWS="500")
    report = printed(lake)
    assert report["verdict"] == "holds"
    assert report["findings"] == []
    assert sum(part["bronze"]["rows"] for part in report["partitions"]) == 6_000


def test_aborted_transactions_are_not_lost_messages(new_lake: NewLake) -> None:
    """Markers and aborted messages are gaps, however many; a committed message without a row is lost."""
    lake = new_lake(partitions=1)
    good = new_good_value(lake)
    producer = Producer({"bootstrap.servers": lake.bootstrap, "transactional.id": lake.topic})
    producer.init_transactions(30)
    for i in range(10):
        producer.begin_transaction()
        for _ in range(5):
            producer.produce(lake.topic, good)
        producer.flush(30)
        if i % 3:
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)
    lake.catch_up()
    report = audited(lake)
    assert report["findings"] == []
    (part,) = report["partitions"]
    assert part["bronze"] == {"first": 0, "next": 61, "rows": 21}
    lake.table("bronze").delete("offset = 3")
    (finding,) = printed(lake, code=1)["findings"]
    assert (finding["check"], finding["count"]) == ("bronze_missing", 1)
    assert finding["samples"] == [{"topic": lake.topic, "partition": 0, "offset": 3}]


def test_audits_all_exchanges_and_prints_tables(new_lake: NewLake) -> None:
    """All exchanges at once, printed as tables. An exchange without tables is a note, and an error if it is named."""
    lake = new_lake()
    fill(lake, count=500, bad=0.05, seed=1)
    lake.catch_up()
    done = lake.command("audit")
    assert done.returncode == 0, done.stderr
    assert "all invariants hold" in done.stdout
    assert "there are no tables of kraken" in done.stdout
    assert lake.command("audit", "kraken").returncode == 2
    other = new_lake("kraken")
    fill(other, count=500, bad=0.05, seed=2)
    other.catch_up()
    done = lake.command("audit", "--json", K2FLOW_KRAKEN_TOPIC=other.topic)
    assert done.returncode == 0, done.stdout
    assert {part["exchange"] for part in json.loads(done.stdout)["partitions"]} == {"binance", "kraken"}


def test_recreated_topic_is_an_accepted_loss(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=300, bad=0.05, seed=1)
    lake.catch_up()
    remake(lake)
    assert checks(audited(lake)) == {("topic_recreated", "note")}  # Kafka's offsets are another topic's now
    fill(lake, count=200, bad=0.05, seed=2)
    lake.catch_up(K2FLOW_BINANCE_ACCEPT_LOST_OFFSETS="1")
    report = audited(lake)
    assert checks(report) == {("topic_recreated", "note")}
    assert [(p["current"], p["bronze"]["rows"]) for p in report["partitions"]] == [(False, 300), (True, 200)]
    lake.table("bronze").delete("offset = 3")  # one of each topic
    report = audited(lake, code=1)
    assert sum(f["count"] for f in report["findings"] if f["check"] == "bronze_missing") == 2


def remake(lake: Lake) -> None:
    admin = AdminClient({"bootstrap.servers": lake.bootstrap})
    admin.delete_topics([lake.topic])[lake.topic].result(30)
    for _ in range(50):
        time.sleep(0.2)
        try:
            admin.create_topics([NewTopic(lake.topic, 1, 1)])[lake.topic].result(30)
            return
        except KafkaException:
            continue


def checks(report: dict[str, Any]) -> set[tuple[str, str]]:
    return {(finding["check"], finding["severity"]) for finding in report["findings"]}


def test_without_kafka_the_ledgers_prove_a_loss(new_lake: NewLake) -> None:
    lake = new_lake()
    fill(lake, count=1_000, bad=0.05, seed=1)
    lake.catch_up()
    down = {"K2FLOW_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    assert checks(audited(lake, code=2, **down)) == {("kafka_unreachable", "unknown")}
    lake.table("bronze").delete("partition = 0 and offset = 3")
    report = audited(lake, code=1, **down)
    assert ("bronze_missing", "broken") in checks(report)
    (missing,) = [f for f in report["findings"] if f["check"] == "bronze_missing"]
    assert missing["samples"] == [{"topic": lake.topic, "partition": 0, "offset": 3}]


def test_incomplete_audit_has_exit_code_2(new_lake: NewLake, tmp_path: Path) -> None:
    lake = new_lake()
    fill(lake, count=100, seed=1)
    lake.catch_up()
    for name, value, text in (
        ("K2FLOW_HOME", str(tmp_path / "empty"), "no tables"),
        ("PYICEBERG_CATALOG__K2FLOW__URI", "http://127.0.0.1:1", "catalog"),
        ("K2FLOW_BINANCE_TOPIC", "another", "topic"),
        ("K2FLOW_NONSENSE", "1", "K2FLOW_NONSENSE"),
    ):
        done = lake.command("audit", "binance", **{name: value})
        assert done.returncode == 2, done.stdout + done.stderr
        assert text in done.stderr
    done = lake.command("audit", "binance", "--full", "--since", "2026-01-01")
    assert (done.returncode, "exclude each other" in done.stderr) == (2, True)
    lake.catalog().drop_table(("market_data", "dlq_binance_trades"))
    done = lake.command("audit", "binance")
    assert done.returncode == 2
    assert "dlq_binance_trades" in done.stderr


def test_running_flow_has_no_findings(new_lake: NewLake) -> None:
    """The tables are at different offsets all the time: messages in flight are not lost."""
    lake = new_lake()
    fill(lake, count=2_000, bad=0.05, duplicates=0.05, seed=1)
    lake.catch_up()
    with lake.start(2, K2FLOW_BINANCE_TRIGGER_SECONDS="0.2", **batches(300)) as flow:
        for seed in range(2, 6):
            fill(lake, count=3_000, bad=0.05, duplicates=0.05, seed=seed)
            assert audited(lake, full=False)["findings"] == []
        assert flow.codes() == [None, None]


def test_each_table_may_be_ahead_or_behind(new_lake: NewLake) -> None:
    """Undo one table's last commits, ledger and rows: as if the flow had crashed before them."""
    lake = new_lake()
    fill(lake, count=1_000, bad=0.05, duplicates=0.05, seed=1)
    lake.catch_up()
    with sqlite3.connect(lake.home / "catalog.db") as catalog:
        before = dict(catalog.execute("SELECT table_name, metadata_location FROM iceberg_tables"))
    fill(lake, count=1_000, bad=0.05, duplicates=0.05, seed=2)
    lake.catch_up()
    for layer in ("bronze", "silver", "dlq", "gold"):
        name = lake.table(layer).name()[-1]
        with sqlite3.connect(lake.home / "catalog.db") as catalog:
            catalog.execute(
                "UPDATE iceberg_tables SET metadata_location = ? WHERE table_name = ?", [before[name], name]
            )
        assert ledger_offsets(lake)[layer] != ledger_offsets(lake)["gold" if layer == "bronze" else "bronze"]
        assert audited(lake, full=False)["findings"] == []
        lake.catch_up()
        assert audited(lake, full=False)["findings"] == []


def test_since_checks_only_newer_messages(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=500, bad=0.05, duplicates=0.05, seed=1)
    lake.catch_up()
    time.sleep(1.1)
    moment = datetime.now(UTC)
    fill(lake, count=300, bad=0.05, duplicates=0.05, seed=2)
    lake.catch_up()
    since = ("--since", f"{moment:%Y-%m-%dT%H:%M:%S}")
    report = printed(lake, *since)
    assert report["findings"] == []
    assert report["since"] == f"{moment:%Y-%m-%dT%H:%M:%S}+00:00"
    lake.table("bronze").delete("offset = 3")
    assert printed(lake, *since)["findings"] == []
    lake.table("bronze").delete("offset = 600")
    assert checks(printed(lake, *since, code=1)) == {("bronze_missing", "broken")}


def test_rows_removed_by_retention_are_not_lost(new_lake: NewLake) -> None:
    """Bronze's and Silver's old days are removed: the rest holds, and damage to it is still found."""
    lake = new_lake(partitions=1)
    fill(lake, count=500, bad=0.05, duplicates=0.05, seed=1, start=datetime.now(UTC) - timedelta(days=40))
    fill(lake, count=300, bad=0.05, duplicates=0.05, seed=2)
    lake.catch_up()
    table = lake.table("bronze")
    table.delete("offset < 500")
    assert ("bronze_missing", "broken") in checks(audited(lake, code=1)), "nothing is too old in a table of today"
    with lake.table("bronze").transaction() as transaction:  # forgets when the table was created, as an old one has
        transaction.set_properties({"write.metadata.previous-versions-max": "1"})
    lake.table("silver").delete(f"exchange_date < '{datetime.now(UTC).date() - timedelta(days=30)}'")
    assert checks(audited(lake)) == {("expired", "note")}
    down = audited(lake, code=2, K2FLOW_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert ("bronze_unknown", "unknown") in checks(down)
    one = damage.single_trade(lake)
    damage.append(lake, "silver", one)
    assert checks(audited(lake)) == {("silver_repeated", "note"), ("expired", "note")}
    damage.delete(lake, "silver", f"message_id = '{one['message_id'][0].as_py()}'")
    assert ("in_neither", "broken") in checks(audited(lake, code=1))
    lake.table("bronze").delete("offset < 503")
    missing = [f for f in audited(lake, code=1)["findings"] if f["check"] == "bronze_missing"]
    assert [f["count"] for f in missing] == [3]


def test_json_is_as_documented(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=50, seed=1)
    lake.catch_up()
    report = printed(lake)
    documented = set(re.findall(r"`(\w+)`", AuditReport.__doc__ or ""))
    assert list(report) == [
        *("version", "verdict", "started_at", "since", "seconds", "rows"),
        *("layers", "tables", "partitions", "findings"),
        *("reading", "why_full", "proven_rows", "sampled_files", "seed", "last_full"),
    ]
    assert (report["reading"], report["why_full"]) == ("full", "no earlier audit has proven anything")
    again = printed(lake)
    assert (again["reading"], again["proven_rows"], again["last_full"]) == ("incremental", 150, report["last_full"])
    (part,) = report["partitions"]
    assert report["layers"] == ["bronze", "silver", "dlq", "gold"]
    keys = {*report, *part, *part["kafka"], *part["bronze"], *report["tables"]["bronze_binance_trades"]}
    assert keys - set(report["layers"]) <= documented
    assert part["kafka"] == {"low": 0, "high": 50, "lag": 0}


def test_repeated_audit_serves_its_verdict(new_lake: NewLake) -> None:
    """The second audit reports rows lost since the first, for an alert. SIGTERM ends it with 0."""
    lake = new_lake()
    fill(lake, count=1_000, bad=0.05, seed=1)
    lake.catch_up()
    port = free_port()
    line = [sys.executable, "-m", "k2flow", "audit", "binance", "--every", "0.2s"]
    with subprocess.Popen(
        line, cwd=ROOT, env=lake.environment(K2FLOW_METRICS_PORT=str(port)), stderr=subprocess.PIPE, text=True
    ) as repeated:
        assert repeated.stderr is not None
        log = iter(repeated.stderr.readline, "")
        assert any("audit verdict: holds" in each for each in log)
        assert any("audit verdict: holds" in each and "incremental audit" in each for each in log)
        assert "k2flow_audit_verdict 0.0" in scraped(port)
        assert re.search(r"k2flow_audit_full_timestamp_seconds 1\.\d+e\+09", scraped(port))
        lake.table("silver").delete("side = 'BUY'")
        assert any("audit verdict: broken" in each for each in log)
        assert "k2flow_audit_verdict 1.0" in scraped(port)
        assert re.search(r'k2flow_audit_findings\{severity="broken"\} [1-9]', scraped(port))
        repeated.terminate()
        repeated.stderr.read()
        assert repeated.wait(60) == 0


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text
