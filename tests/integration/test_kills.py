"""kill -9 at random moments, with a varying number of processes: the tables end as if nothing had happened."""

import random
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta

import pytest

from k2flow.errors import CatalogError
from tests.candles import assert_candles_of, rows_by_key
from tests.integration.conftest import fill
from tests.integration.harness import DEADLINE_SECONDS, Lake, assert_tables, batches, ledger_offsets, read_topic
from tests.oracle import expect

KILLS = 12
REFILL, PENDING = 15_000, 7_500
PEERS_SECONDS = 5
ROUNDS = 10  # with three kills each


@pytest.mark.timeout(600)
def test_random_kills_lose_and_duplicate_nothing(new_lake: Callable[..., Lake], seed: int) -> None:
    """Small batches make many commits, so that kills hit every step of one. The result is compared with the oracle.

    The moments, the victims and the messages come from the seed of the run. Messages are always pending at a kill.
    """
    lake = new_lake(partitions=5)
    chance = random.Random(seed)
    produced = 0
    progress = []
    for kill in range(KILLS):
        before = committed(lake)
        while produced - before < PENDING:
            fill(lake, count=REFILL, bad=0.05, duplicates=0.1, seed=chance.randrange(2**32))
            produced += REFILL
        processes = 1 + kill % 3
        with lake.start(processes, **batches(100, together=1 + kill % 4)) as flow:
            if kill:
                wait_for_commit(lake, before)
            time.sleep(chance.uniform(0, 0.8))
            victim = chance.choice(flow.processes)
            assert victim.poll() is None, flow.log()
            victim.send_signal(signal.SIGKILL)
            time.sleep(chance.uniform(0, PEERS_SECONDS) if kill % 2 else 0)  # the peers live on for a while
        progress.append(committed(lake))
    assert progress == sorted(progress)
    assert progress[-1] < produced, "the flow was done before the last kill"
    lake.catch_up(2)
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


@pytest.mark.timeout(300)
def test_random_kills_of_three_flows_change_no_candle(new_lake: Callable[..., Lake], seed: int) -> None:
    """The flows of two exchanges and of the candles die ROUNDS times each. Trades are of several hours."""
    lakes = [new_lake("binance"), new_lake("kraken")]
    chance = random.Random(seed)
    quick = {"K2FLOW_CANDLES_TRIGGER_SECONDS": "0.1", **batches(100), **batches(100, "kraken")}
    for _ in range(ROUNDS):
        for lake in lakes:
            start = datetime.now(UTC) - timedelta(hours=chance.randrange(3))
            fill(lake, count=1_000, bad=0.05, duplicates=0.1, seed=chance.randrange(2**32), start=start)
        with ExitStack() as running:
            flows = [lake.start(**quick) for lake in lakes] + [lakes[0].start(flow="candles", **quick)]
            for flow in map(running.enter_context, flows):
                flow.wait_for_log("trigger")
            for delay in sorted(chance.uniform(0, 1) for _ in flows):
                time.sleep(delay / len(flows))
                victim = flows.pop(chance.randrange(len(flows)))
                assert victim.processes[0].poll() is None, victim.log()
                victim.signal(signal.SIGKILL)
                victim.wait()
    assert rows_by_key(lakes[0].table("candles").scan().to_arrow().to_pylist()), "no candle was committed"
    for lake in lakes:
        lake.catch_up()
    lakes[0].catch_up(flow="candles")
    ids = lakes[0].table("gold").scan(selected_fields=("message_id",)).to_arrow()["message_id"].to_pylist()
    expected = [expect(read_topic(lake.bootstrap, lake.topic), lake.exchange.upper()) for lake in lakes]
    assert sorted(ids) == sorted(id_ for each in expected for id_ in each.gold_ids)
    assert_candles_of(lakes[0].table("candles"), lakes[0].table("gold"))
    done = lakes[0].command("audit", "--json", K2FLOW_KRAKEN_TOPIC=lakes[1].topic)
    assert done.returncode == 0, done.stdout


def wait_for_commit(lake: Lake, before: int) -> None:
    """Wait until a table has just changed and every layer holds more offsets than `before`."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    seen = metadata_files(lake)
    while True:
        assert time.monotonic() < deadline, f"no commit within {DEADLINE_SECONDS} s"
        time.sleep(0.02)
        last, seen = seen, metadata_files(lake)
        if seen != last and committed(lake) > before:
            return


def metadata_files(lake: Lake) -> list[tuple[str]]:
    """Return the tables' metadata files; each commit replaces one."""
    with closing(sqlite3.connect(lake.home / "catalog.db", timeout=60)) as catalog:
        return catalog.execute("SELECT metadata_location FROM iceberg_tables ORDER BY table_name").fetchall()


def committed(lake: Lake) -> int:
    """Return the number of offsets that every layer holds."""
    try:
        return min(sum(offsets.values()) for offsets in ledger_offsets(lake).values())
    except CatalogError:
        return 0
