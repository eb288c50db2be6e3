"""kill -9 at any moment, with another number of processes each time: the tables are as if nothing had happened."""

import random
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from k2flow.errors import CatalogError
from tests.integration.conftest import fill
from tests.integration.harness import Lake, assert_tables, batches, ledger_offsets, read_topic
from tests.oracle import expect

pytestmark = pytest.mark.integration

KILLS = 12
MESSAGES = 30_000
PEERS_SECONDS = 5


@pytest.mark.timeout(600)
def test_kills(new_lake: Callable[..., Lake]) -> None:
    """Small batches make many commits, so that kills meet every step of one; ends compared with the oracle."""
    lake = new_lake(partitions=5)
    fill(lake, count=MESSAGES, bad=0.05, duplicates=0.1, seed=11)
    chance = random.Random(5)
    progress = []
    for kill in range(KILLS):
        processes = 1 + kill % 3
        before = committed(lake)
        with lake.start(processes, **batches(100, together=1 + kill % 4)) as flow:
            deadline = time.monotonic() + 60
            seen = newest(lake)
            while kill and time.monotonic() < deadline:
                time.sleep(0.02)
                last, seen = seen, newest(lake)
                if seen != last and committed(lake) > before:
                    break
            time.sleep(chance.uniform(0, 0.8))
            victim = chance.choice(flow.processes)
            assert victim.poll() is None, flow.log()
            victim.send_signal(signal.SIGKILL)
            time.sleep(chance.uniform(0, PEERS_SECONDS) if kill % 2 else 0)  # some peers live on for a while
        progress.append(committed(lake))
    assert progress == sorted(progress)
    assert progress[-1] < MESSAGES, "the flow was done before the last kill"
    lake.catch_up(2)
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def newest(lake: Lake) -> list[tuple[str]]:
    """The tables' metadata files: others after each commit."""
    with closing(sqlite3.connect(lake.home / "catalog.db", timeout=60)) as catalog:
        return catalog.execute("SELECT metadata_location FROM iceberg_tables ORDER BY table_name").fetchall()


def committed(lake: Lake) -> int:
    """Offsets that every layer holds."""
    try:
        return min(sum(offsets.values()) for offsets in ledger_offsets(lake).values())
    except CatalogError:
        return 0
