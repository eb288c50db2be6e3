"""A flow that dies, fails, hangs or stops at each step: the tables end as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest

from k2flow.failpoints import Action, Point
from k2flow.process_exit import EXIT_FAILED, EXIT_TRY_AGAIN
from tests.integration.conftest import fill
from tests.integration.harness import (
    ROOT,
    Flow,
    Lake,
    assert_consistent,
    assert_tables,
    batches,
    ledger_offsets,
    read_topic,
)
from tests.oracle import expect

NewLake = Callable[..., Lake]

FENCED_TABLES = 4  # each start passes the failpoints of a commit this often before its first batch
BATCH = batches(60)
HITS = {
    Point.OPENED: (1,),
    Point.FENCE: (1, 3),
    Point.GOLD_LOAD: (1, 2),  # of a batch: the windows, then the ids
    Point.GOLD_READ: (1, 2),
    Point.COMMIT_BEGUN: (2, FENCED_TABLES + 1, FENCED_TABLES + 7),
    Point.MANIFEST_WRITTEN: (2, FENCED_TABLES + 1, FENCED_TABLES + 6),
    Point.COMMIT_LANDED: (2, FENCED_TABLES + 1, FENCED_TABLES + 7),
    Point.COMMIT_DONE: (1, 2, 3),  # between the commits of two tables
}
LATER = (1, 3)
REPLACING = (Point.REWRITTEN, Point.STAGED, Point.COMMITTED, Point.PUBLISHED)  # no flow reaches those
WINDOW = (Point.RUN_WRITTEN, Point.CACHE_WRITTEN, Point.CACHE_REPLACED)  # after an OSError ids stay in memory
RETRIED = (Point.COMMIT_BEGUN, Point.MANIFEST_WRITTEN, Point.COMMIT_LANDED)  # an OSError there is an outage


@dataclass(frozen=True)
class FaultyStart:
    """One start of a flow with armed failpoints, and the way it ends."""

    armed: str
    action: Action
    until_caught_up: bool = False
    workers: int = 1


def faulty_starts() -> Iterator[FaultyStart]:
    """Yield a start for every failpoint, to die and to fail, the first time it is reached and later."""
    yield FaultyStart(f"{Point.EPOCH_COMPLETE}=die@9", Action.DIE)  # after two batches, so that Gold has rows to read
    for point in Point:
        if point not in (Point.SHUTDOWN, *REPLACING):
            for hit in HITS.get(point, LATER):
                yield FaultyStart(f"{point}=die@{hit}", Action.DIE)
                if point not in (*RETRIED, *WINDOW):
                    yield FaultyStart(f"{point}=raise@{hit}", Action.RAISE)
    for point in WINDOW:
        yield FaultyStart(f"{point}=raise@1,{Point.COMMIT_DONE}=die@10", Action.DIE)
    for hits in ((2, 3, 1), (FENCED_TABLES + 1, FENCED_TABLES + 2, FENCED_TABLES + 3), (9, 8, 10)):
        retried = ",".join(f"{point}=raise@{hit}" for point, hit in zip(RETRIED, hits, strict=True))
        yield FaultyStart(f"{retried},{Point.COMMIT_DONE}=die@10", Action.DIE)


def shutdown_starts() -> Iterator[FaultyStart]:
    """Yield starts that fail at the end of a run that has caught up; two workers reach the point twice."""
    for action in (Action.DIE, Action.RAISE):
        yield FaultyStart(f"{Point.SHUTDOWN}={action}@1", action, until_caught_up=True)
        yield FaultyStart(f"{Point.SHUTDOWN}={action}@2", action, until_caught_up=True, workers=2)


@pytest.mark.timeout(600)
def test_every_failpoint_loses_and_duplicates_nothing(new_lake: NewLake) -> None:
    """Run two chains of starts side by side. Each start ends in a fault, and the next one continues from there."""
    every = list(faulty_starts())
    half = len(every) // 2
    chains = [[*every[:half], *list(shutdown_starts())[:2]], [every[0], *every[half:], *list(shutdown_starts())[2:]]]
    lakes = [new_lake(home=f"lake{i}") for i in range(len(chains))]
    with ThreadPoolExecutor(len(chains)) as threads:
        list(threads.map(run_chain, lakes, chains))


def run_chain(lake: Lake, chain: list[FaultyStart]) -> None:
    fill(lake, count=5_000, bad=0.05, duplicates=0.1, seed=3)
    for start in chain:
        run_faulty(lake, start)
        assert_consistent(lake)
    log = lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    assert "error" not in log


def run_faulty(lake: Lake, start: FaultyStart) -> None:
    """Start a flow, which must hit every armed failpoint and end by the last."""
    extra = {"K2FLOW_UNTIL_CAUGHT_UP": "1"} if start.until_caught_up else BATCH
    if any(point in start.armed for point in WINDOW):
        extra = {**extra, "K2FLOW_WINDOW_MEMORY_IDS": "50"}  # so that ids are spilled after each batch
    with lake.start(1, ("-w", str(start.workers)), K2FLOW_FAILPOINTS=start.armed, **extra) as flow:
        log = flow.wait(60)
        for part in start.armed.split(","):
            point, _, rest = part.partition("=")
            assert f"failpoint {point}: {rest.partition('@')[0]}" in log, f"{start}\n{log}"
        (code,) = flow.codes()
        assert code == -signal.SIGKILL if start.action is Action.DIE else code not in (0, None), f"{start}\n{log}"


def test_unknown_commit_state_is_reconciled(new_lake: NewLake) -> None:
    """The first commit of each table lands, but the answer is lost."""
    lake = new_lake()
    fill(lake, count=600, bad=0.05, duplicates=0.1, seed=3)
    for hit in range(FENCED_TABLES + 1, 2 * FENCED_TABLES + 1):
        run_faulty(lake, FaultyStart(f"{Point.COMMIT_LANDED}=raise@{hit},{Point.COMMIT_DONE}=die@4", Action.DIE))
        assert_consistent(lake)
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_death_between_the_commits_of_two_tables_is_repaired(new_lake: NewLake) -> None:
    """The tables end at different offsets; the next start writes the missing rows to each."""
    lake = new_lake()
    fill(lake, count=600, bad=0.05, duplicates=0.1, seed=3)
    for hit in (1, 2, 3):
        run_faulty(lake, FaultyStart(f"{Point.COMMIT_DONE}=die@{hit}", Action.DIE))
    assert len({str(offsets) for offsets in ledger_offsets(lake).values()}) > 1
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_death_within_a_group_commit_rereads_its_batches(new_lake: NewLake) -> None:
    """The batches since the last commit are read again, with the late trades that were held back."""
    lake = new_lake(partitions=1)
    fill(lake, count=1_500, bad=0.05, duplicates=0.1, seed=3)
    settings = {"K2FLOW_BINANCE_TRIGGER_SECONDS": "3600", **batches(60, together=4)}
    held = [0]
    for armed in (f"{Point.SOURCE_EMITTED}=die@8", f"{Point.GOLD_WRITTEN}=die@7", f"{Point.SOURCE_EMITTED}=die@4"):
        with lake.start(1, K2FLOW_FAILPOINTS=armed, **settings) as flow:
            assert f"failpoint {armed.split('=')[0]}: die" in flow.wait(60)
        assert_consistent(lake)
        held.append(sum(ledger_offsets(lake)["gold"].values()))
    assert held == [0, 240, 480, 480]
    lake.catch_up(2)
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


@pytest.mark.parametrize(
    "armed",
    [
        f"{Point.SOURCE_EMITTED}=stop@2",
        f"{Point.EPOCH_COMPLETE}=stop@6",
        f"{Point.COMMIT_BEGUN}=stop@{FENCED_TABLES + 6}",
        f"{Point.MANIFEST_WRITTEN}=stop@{FENCED_TABLES + 5}",
    ],
)
def test_fenced_predecessor_cannot_commit(new_lake: NewLake, armed: str) -> None:
    """It stops at a step of its commit and continues after a successor has fenced it, before that one commits."""
    lake = new_lake()
    fill(lake, count=1_000, bad=0.05, duplicates=0.1, seed=3)
    with lake.start(K2FLOW_FAILPOINTS=armed, **BATCH) as old:
        await_stop(old)
        first_batch = f"{Point.EPOCH_COMPLETE}=stop"
        with lake.start(K2FLOW_FAILPOINTS=first_batch, K2FLOW_UNTIL_CAUGHT_UP="1") as new:
            await_stop(new)
            before = ledger_offsets(lake)
            old.signal(signal.SIGCONT)
            log = old.wait(60)
            assert old.codes() == [1], log
            assert "has fenced writer epoch 1; this copy of the flow stops" in log.splitlines()[-1]
            assert ledger_offsets(lake) == before
            assert_consistent(lake)
            new.signal(signal.SIGCONT)
            log = new.wait(60)
            assert new.codes() == [0], log
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_hung_predecessor_blocks_its_host_and_is_fenced_from_another(new_lake: NewLake) -> None:
    """A second copy on its host refuses to start. One on another host fences it; the hung one is killed later."""
    lake = new_lake()
    fill(lake, count=1_000, bad=0.05, duplicates=0.1, seed=3)
    armed = f"{Point.MANIFEST_WRITTEN}=hang@{FENCED_TABLES + 6}"
    with lake.start(K2FLOW_FAILPOINTS=armed, **BATCH) as old:
        old.wait_for_log(f"failpoint {Point.MANIFEST_WRITTEN}")
        before = ledger_offsets(lake)
        with lake.start() as second:
            log = second.wait(60)
            assert second.codes() == [1]
            assert f"the flow of binance already runs: process {old.processes[0].pid} " in log.splitlines()[-1]
        assert ledger_offsets(lake) == before
        lake.catch_up(PYTHONPATH=on_another_host(), TORTURE_HOST="another-host")
        old.signal(signal.SIGKILL)
        old.wait()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_successor_stops_if_the_predecessor_commits_before_the_fence(new_lake: NewLake) -> None:
    """The successor has read where the tables end. Before it fences them, the predecessor commits once more."""
    lake = new_lake()
    fill(lake, count=1_000, bad=0.05, duplicates=0.1, seed=3)
    armed = f"{Point.COMMIT_DONE}=stop@6,{Point.EPOCH_COMPLETE}=die@14"
    with lake.start(K2FLOW_FAILPOINTS=armed, **BATCH) as old:
        await_stop(old)
        with lake.start(K2FLOW_FAILPOINTS=f"{Point.OPENED}=stop", K2FLOW_UNTIL_CAUGHT_UP="1") as new:
            await_stop(new)
            old.signal(signal.SIGCONT)
            old.wait(60)
            before = ledger_offsets(lake)
            new.signal(signal.SIGCONT)
            log = new.wait(60)
            assert new.codes() == [EXIT_TRY_AGAIN], log
            assert "has committed since this copy of the flow began" in log.splitlines()[-1]
            assert ledger_offsets(lake) == before
            assert_consistent(lake)
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_unexpected_error_is_shown_by_the_process_that_had_it(new_lake: NewLake) -> None:
    """That process shows the error as a single process does; the other one only loses its peer."""
    lake = new_lake()
    fill(lake, count=100, seed=3)
    with lake.start(2, K2FLOW_FAILPOINTS=f"{Point.SOURCE_EMITTED}=raise", **BATCH) as flow:
        log = flow.wait(60)
        assert EXIT_FAILED in flow.codes(), log
    assert "InjectedError" in log


def test_flow_ends_before_bytewax_unwinds(new_lake: NewLake) -> None:
    """Bytewax panics at an error, and its output is hidden: an abort there would hide the reason too."""
    lake = new_lake()
    fill(lake, count=100, seed=3)
    with lake.start(1, K2FLOW_FAILPOINTS=f"{Point.SOURCE_EMITTED}=raise", K2FLOW_DEBUG="1", **BATCH) as flow:
        log = flow.wait(60)
        assert flow.codes() == [EXIT_FAILED], log
    assert "InjectedError" in log
    assert "panicked" not in log


def test_error_ends_the_flow_even_if_it_cannot_be_printed(new_lake: NewLake) -> None:
    """Standard error is on a full disk."""
    lake = new_lake()
    fill(lake, count=100, seed=3)
    command = [sys.executable, "-m", "bytewax.run", f"flows.{lake.exchange}"]
    environment = lake.environment(K2FLOW_FAILPOINTS=f"{Point.FILE_WRITTEN}=raise", **BATCH)
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, cwd=ROOT, env=environment, stderr=full, check=False, timeout=60)
    assert process.returncode == EXIT_TRY_AGAIN


def await_stop(flow: Flow, seconds: float = 60) -> None:
    """Wait until the one process of `flow` has stopped itself."""
    flow.wait_for_log("failpoint", seconds=seconds)
    deadline = time.monotonic() + seconds
    while psutil.Process(flow.processes[0].pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, flow.log()
        time.sleep(0.02)


def on_another_host() -> str:
    """Return the PYTHONPATH that makes a process read TORTURE_HOST."""
    return os.pathsep.join([str(ROOT / "torture" / "hooks"), str(ROOT)])
