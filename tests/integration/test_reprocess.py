"""Reprocessing: afterwards the tables are as if the flow had used today's rules from the start."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from k2flow.errors import CommitError, FencedError
from k2flow.exchange import Exchange, find_exchange
from k2flow.iceberg.commit import STAGED_BRANCH, STAGED_KEY, Committer
from k2flow.iceberg.staging import Staging, publish
from k2flow.layers import GOLD_TABLE
from k2flow.query.connection import connect_to
from tests.integration.conftest import fill
from tests.integration.harness import ROOT, Lake, assert_tables, batches, read_topic
from tests.integration.test_audit import audited
from tests.oracle import expect

NewLake = Callable[..., Lake]

OTHER = [sys.executable, "-m", "tests.integration.other_rules"]
TODAY = date.today().isoformat()
MANY = 100_000


def k2flow(lake: Lake, *arguments: str, other: bool = False, code: int = 0, **extra: str) -> str:
    """Return the output of a command, with today's rules or the `other` ones."""
    if other:
        done = lake.command("k2flow", *arguments, module="tests.integration.other_rules", **extra)
    else:
        done = lake.command(*arguments, **extra)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if "--json" in arguments else done.stdout + done.stderr


def reprocess(lake: Lake, *arguments: str, other: bool = True, **extra: str) -> Any:
    """Return the outcome of `k2flow reprocess` of the last days."""
    since = (datetime.now(UTC).date() - timedelta(days=2)).isoformat()
    return json.loads(
        k2flow(lake, "reprocess", lake.exchange, "--from", since, "--json", *arguments, other=other, **extra)
    )


def killed(lake: Lake, failpoint: str, *arguments: str, other: bool = True) -> None:
    """Run a command that dies at a failpoint."""
    k2flow(lake, *arguments, other=other, code=-signal.SIGKILL, K2FLOW_FAILPOINTS=failpoint)


def catch_up_by_other_rules(lake: Lake) -> None:
    environment = lake.environment(K2FLOW_UNTIL_CAUGHT_UP="1")
    command = [*OTHER, "bytewax.run", f"flows.{lake.exchange}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)


def contents(lake: Lake) -> dict[str, Any]:
    """Return the number of rows and the sum of their hashes by table.

    It ignores when a dead letter was written, and which of several trades with one id is in Gold.
    """
    connection = connect_to(lake.catalog())
    found = {}
    for layer in ("silver", "dlq", "gold"):
        shown = {"silver": "*", "dlq": "* EXCLUDE (failed_at, failed_date)", "gold": "exchange, message_id"}[layer]
        rows = f"SELECT {shown} FROM {lake.table(layer).name()[-1]}"
        sums = f"SELECT count(*), sum(hash(row::VARCHAR)::HUGEINT) FROM ({rows}) row"
        found[layer] = connection.sql(sums).fetchone()
    return found


def assert_nothing_staged(lake: Lake) -> None:
    for layer in ("bronze", "silver", "dlq", "gold"):
        metadata = lake.table(layer).metadata
        assert [name for name in metadata.refs if name.startswith(STAGED_BRANCH)] == []
        assert STAGED_KEY + lake.exchange not in metadata.properties


def audit_holds(lake: Lake, other: bool = False, **extra: str) -> bool:
    return bool(json.loads(k2flow(lake, "audit", lake.exchange, "--json", other=other, **extra))["verdict"] == "holds")


def test_killed_reprocess_changes_nothing_or_is_completed(new_lake: NewLake) -> None:
    """Killed before its commit, it changes nothing. Killed during its publication, the next run completes it."""
    lake = new_lake()
    fill(lake, count=MANY, bad=0.05, duplicates=0.03, seed=5)
    lake.catch_up()
    wanted = replace(lake, home=lake.home.with_name("wanted"))
    catch_up_by_other_rules(wanted)
    before = contents(lake)
    assert before != contents(wanted)
    command = ["reprocess", lake.exchange, "--from", TODAY]
    killed(lake, "staging.staged=die@2", *command)
    assert contents(lake) == before
    killed(lake, "staging.published=die@1", *command)
    assert contents(lake)["gold"] == before["gold"]
    last = reprocess(lake)
    assert last["finished"]
    assert last["messages"] == MANY
    assert last["moved"] == []
    assert contents(lake) == contents(wanted)
    assert_nothing_staged(lake)
    assert audit_holds(lake, other=True)
    fill(lake, count=2_000, bad=0.05, duplicates=0.1, seed=6)
    for each in (lake, wanted):
        catch_up_by_other_rules(each)
    assert contents(lake) == contents(wanted)
    moved = reprocess(lake, other=False)["moved"]
    assert {(each["before"], each["after"]) for each in moved} == {("quantity_too_large", "valid"), ("valid", "valid")}
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_killed_replay_changes_nothing_or_is_completed(new_lake: NewLake) -> None:
    """All messages are dead letters with an unknown schema. Once it is known, they move into Silver and Gold."""
    lake = new_lake()
    fill(lake, count=MANY, bad=0.05, duplicates=0.03, seed=7)
    lake.catch_up(K2FLOW_SCHEMA_IDS="77")
    letters = contents(lake)
    assert letters["silver"][0] == letters["gold"][0] == 0
    command = ["dlq", "replay", lake.exchange]
    killed(lake, "reprocess.rewritten=die@3", *command, other=False)
    assert contents(lake) == letters
    killed(lake, "staging.published=die@2", *command, "--reason", "unknown_schema", other=False)
    done = json.loads(k2flow(lake, *command, "--json"))
    assert done["finished"] == "dlq replay unknown_schema"
    assert done["moved"] == []
    expected = expect(read_topic(lake.bootstrap, lake.topic), "BINANCE")
    assert contents(lake)["silver"][0] == sum(expected.silver.values())
    assert contents(lake)["gold"][0] == len({row[0] for row in expected.silver})
    reprocess(lake, other=False)  # the letters that are left have the reasons of today
    assert_tables(lake, expected)
    assert audit_holds(lake)


def test_flow_completes_a_committed_replacement(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=2_000, bad=0.05, duplicates=0.05, seed=8)
    lake.catch_up()
    wanted = replace(lake, home=lake.home.with_name("wanted"))
    catch_up_by_other_rules(wanted)
    killed(lake, "staging.committed=die", "reprocess", lake.exchange, "--from", TODAY)
    assert "being replaced" in k2flow(lake, "audit", lake.exchange, code=2)
    assert k2flow(lake, "maintain").count("skipped: rows are being replaced") == 3
    fill(lake, count=500, bad=0.05, duplicates=0.05, seed=9)
    for each in (lake, wanted):
        catch_up_by_other_rules(each)
    assert contents(lake) == contents(wanted)
    assert_nothing_staged(lake)
    assert audit_holds(lake, other=True)


def test_flow_fences_an_uncommitted_reprocess(new_lake: NewLake) -> None:
    """To the flow a stopped process does not run, like one on another host."""
    lake = new_lake(partitions=1)
    fill(lake, count=2_000, seed=10)
    lake.catch_up()
    command = [*OTHER, "k2flow", "reprocess", lake.exchange, "--from", TODAY]
    environment = lake.environment(K2FLOW_FAILPOINTS="reprocess.rewritten=stop@3")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until_stopped(process)
        fill(lake, count=500, seed=11)
        lake.catch_up()
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "has fenced" in said
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    assert_nothing_staged(lake)
    assert audit_holds(lake)


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_dry_run_beside_the_flow_changes_nothing(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=2_000, bad=0.05, duplicates=0.05, seed=12)
    with lake.start(K2FLOW_BINANCE_TRIGGER_SECONDS="1") as flow:
        flow.wait_for_log(" offsets, commit ", 4)
        before = {layer: lake.table(layer).metadata_location for layer in ("bronze", "silver", "dlq", "gold")}
        shown = k2flow(lake, "reprocess", lake.exchange, "--from", TODAY, "--dry-run", other=True)
        assert before == {layer: lake.table(layer).metadata_location for layer in before}
        refused = k2flow(lake, "reprocess", lake.exchange, "--from", TODAY, other=True, code=1)
        assert "already runs" in refused
    for text in ("quantity_too_large", "with other values", "currency", "EUR", "rows would be removed"):
        assert text in shown
    planned = reprocess(lake, "--dry-run")
    done = reprocess(lake)
    assert [planned[key] for key in ("messages", "moved", "tables")] == [
        done[key] for key in ("messages", "moved", "tables")
    ]
    assert not planned["published"]
    assert done["published"]


def test_reprocess_while_another_exchange_writes_to_gold(new_lake: NewLake) -> None:
    binance, kraken = new_lake(partitions=1), new_lake("kraken", partitions=1)
    fill(binance, count=5_000, bad=0.02, duplicates=0.03, seed=13)
    binance.catch_up()
    with kraken.start(K2FLOW_KRAKEN_TRIGGER_SECONDS="0.2") as flow, filling(kraken):
        flow.wait_for_log(f"{GOLD_TABLE}: ", 3)
        assert reprocess(binance)["published"]
        assert reprocess(binance, other=False)["published"]
        flow.signal(signal.SIGTERM)
        flow.wait()
    kraken.catch_up()
    for lake in (binance, kraken):
        assert audited(lake)["verdict"] == "holds"
    assert_tables_of_both(binance, kraken)


@contextmanager
def filling(lake: Lake) -> Iterator[None]:
    """Produce a few messages again and again."""
    stop = threading.Event()

    def produce() -> None:
        seed = 100
        while not stop.wait(0.1):
            seed += 1
            fill(lake, count=50, bad=0.02, seed=seed)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def assert_tables_of_both(*lakes: Lake) -> None:
    gold = connect_to(lakes[0].catalog()).sql(f"SELECT exchange, count(*) FROM {GOLD_TABLE} GROUP BY 1").fetchall()
    for lake in lakes:
        expected = expect(read_topic(lake.bootstrap, lake.topic), lake.exchange.upper())
        ids = {row[0] for row in expected.silver}
        assert (lake.exchange.upper(), len(ids)) in gold


def test_refused_reprocess_changes_nothing(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    assert "does not exist" in k2flow(lake, "reprocess", lake.exchange, "--from", TODAY, code=1)
    fill(lake, count=1_000, bad=0.05, duplicates=0.05, seed=14)
    lake.catch_up()
    before = contents(lake)
    command = ["reprocess", lake.exchange, "--from", TODAY]
    assert "cannot be decoded any more" in k2flow(lake, *command, code=1, K2FLOW_SCHEMA_IDS="77")
    assert "is before" in k2flow(lake, *command, "--to", "2020-01-01", code=2)
    assert "no dead letter has reason" in k2flow(lake, "dlq", "replay", lake.exchange, "--reason", "typo", code=1)
    assert "nothing changed" in k2flow(lake, *command)
    assert contents(lake) == before
    assert_nothing_staged(lake)
    assert audit_holds(lake)


def exchange_of(lake: Lake) -> Exchange:
    found = find_exchange(lake.exchange)
    return replace(found, declared={**found.declared, "topic": lake.topic})


def staging_of(lake: Lake) -> Staging:
    exchange = replace(
        find_exchange(lake.exchange), declared={**find_exchange(lake.exchange).declared, "topic": lake.topic}
    )
    return Staging(lake.catalog(), exchange, (exchange.dlq, exchange.silver, GOLD_TABLE))


def test_stale_reader_cannot_fence_after_commit(new_lake: NewLake) -> None:
    """It would drop the branches of a committed replacement."""
    lake = new_lake(partitions=1)
    fill(lake, count=500, seed=15)
    lake.catch_up()
    staging = staging_of(lake)
    staging.begin()
    late = Committer(lake.catalog(), lake.table("bronze").name()[-1], lake.exchange, lake.topic)
    staging.commit_replacement({}, "nothing")
    with pytest.raises(FencedError):
        late.fence("")
    late = Committer(lake.catalog(), lake.table("bronze").name()[-1], lake.exchange, lake.topic)
    with pytest.raises(CommitError, match="are being replaced: start again"):
        late.fence("")
    assert publish(lake.catalog(), exchange_of(lake)) == "nothing"
    assert_nothing_staged(lake)
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_two_exchanges_cannot_be_reprocessed_at_once(new_lake: NewLake) -> None:
    """One file of Gold may have rows of both."""
    binance, kraken = new_lake(partitions=1), new_lake("kraken", partitions=1)
    for lake in (binance, kraken):
        fill(lake, count=500, seed=16)
        lake.catch_up()
    first = staging_of(binance)
    first.begin()
    refused = k2flow(kraken, "reprocess", "kraken", "--from", TODAY, other=True, code=1)
    assert "already being replaced, on branch k2flow-staged-binance" in refused
    assert_no_branch_of(kraken)
    first.abort()
    assert reprocess(kraken)["published"]
    for lake in (binance, kraken):
        assert_nothing_staged(lake)


def assert_no_branch_of(lake: Lake) -> None:
    for layer in ("silver", "dlq", "gold"):
        assert not [name for name in lake.table(layer).metadata.refs if f"-{lake.exchange}-" in name]


def test_duplicates_on_two_days_are_ambiguous_for_one_day(new_lake: NewLake) -> None:
    """Silver has a row of each. One day alone does not know which row is its own. Both days together do."""
    lake = new_lake(partitions=1)
    start = datetime.now(UTC) - timedelta(hours=3)
    for _ in range(2):
        fill(lake, count=400, bad=0.05, duplicates=0.05, seed=17, start=start)
    two_days = [sys.executable, "-m", "tests.integration.day_a_batch", "2", lake.exchange]
    environment = lake.environment(K2FLOW_UNTIL_CAUGHT_UP="1", **batches(400))
    subprocess.run(two_days, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    wanted = replace(lake, home=lake.home.with_name("wanted"))
    catch_up_by_other_rules(wanted)
    yesterday = (datetime.now(UTC).date() - timedelta(days=1)).isoformat()
    day = ["reprocess", lake.exchange, "--from", yesterday, "--to", yesterday, "--json"]
    first = json.loads(k2flow(lake, *day, other=True))
    assert first["messages"] == 400
    second = json.loads(k2flow(lake, "reprocess", lake.exchange, "--from", TODAY, "--json", other=True))
    assert second["messages"] == 400
    assert second["ambiguous"] > first["ambiguous"]  # of the first day only ids that come with other times too
    both = reprocess(lake)
    assert both["ambiguous"] == 0
    assert contents(lake) == contents(wanted)
    assert audit_holds(lake, other=True)


def test_trades_older_than_silver_are_reprocessed(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    start = datetime.now(UTC) - timedelta(days=60)
    fill(lake, count=400, bad=0.05, duplicates=0.05, seed=18, start=start)
    lake.catch_up()
    wanted = replace(lake, home=lake.home.with_name("wanted"))
    catch_up_by_other_rules(wanted)
    assert reprocess(lake)["ambiguous"] == 0
    assert contents(lake) == contents(wanted)
    k2flow(lake, "maintain", lake.table("silver").name()[-1])
    outcome = reprocess(lake, other=False)
    assert contents(lake)["silver"][0] == 400 - 20 - contents(wanted)["silver"][0]  # those that were dead letters
    assert outcome["ambiguous"] > 0
    assert_nothing_staged(lake)


def test_interrupted_reprocess_leaves_no_branch(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=500, seed=19)
    lake.catch_up()
    before = contents(lake)
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [*OTHER, "k2flow", "reprocess", lake.exchange, "--from", TODAY]
        environment = lake.environment(K2FLOW_FAILPOINTS="staging.staged=hang")
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            while "failpoint staging.staged" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(number)
            process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode not in (0, None)
        assert contents(lake) == before
        assert_nothing_staged(lake)


def test_waiting_flow_is_recognised_as_running(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=500, seed=20)
    lake.catch_up()
    with lake.start() as flow:
        flow.wait_for_log("reads")
        time.sleep(1)
        assert "already runs" in k2flow(lake, "reprocess", lake.exchange, "--from", TODAY, other=True, code=1)
        flow.signal(signal.SIGTERM)
        flow.wait()
