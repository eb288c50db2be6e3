"""A flow that dies, fails, hangs or is stopped at each step: the tables are as if nothing had happened."""

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

pytestmark = pytest.mark.integration

NewLake = Callable[..., Lake]

FENCED_TABLES = 4  # each start passes the points of a commit this often before its first batch
BATCH = batches(60)
HITS = {
    Point.OPENED: (1,),
    Point.FENCE: (1, 3),
    Point.GOLD_LOAD: (1, 10),
    Point.GOLD_READ: (1, 5),
    Point.COMMIT_BEGUN: (2, FENCED_TABLES + 1, FENCED_TABLES + 7),
    Point.MANIFEST_WRITTEN: (2, FENCED_TABLES + 1, FENCED_TABLES + 6),
    Point.COMMIT_LANDED: (2, FENCED_TABLES + 1, FENCED_TABLES + 7),
    Point.COMMIT_DONE: (1, 2, 3),  # between the commits of two tables
}
LATER = (1, 3)
REPLACING = (Point.REWRITTEN, Point.STAGED, Point.DECIDED, Point.PUBLISHED)  # no flow comes by those
RETRIED = (Point.COMMIT_BEGUN, Point.MANIFEST_WRITTEN, Point.COMMIT_LANDED)  # an OSError there is an outage


@dataclass(frozen=True)
class Fault:
    """One start of a flow, and whether it outlives what is armed in it."""

    armed: str
    action: Action
    until_caught_up: bool = False
    workers: int = 1


def faults() -> Iterator[Fault]:
    """Every point, dying and failing, when it is first reached and later."""
    yield Fault(f"{Point.EPOCH_COMPLETE}=die@9", Action.DIE)  # two batches, so that Gold has something to be read
    for point in Point:
        if point not in (Point.SHUTDOWN, *REPLACING):
            for hit in HITS.get(point, LATER):
                yield Fault(f"{point}=die@{hit}", Action.DIE)
                if point not in RETRIED:
                    yield Fault(f"{point}=raise@{hit}", Action.RAISE)
    for hits in ((2, 3, 1), (FENCED_TABLES + 1, FENCED_TABLES + 2, FENCED_TABLES + 3), (9, 8, 10)):
        retried = ",".join(f"{point}=raise@{hit}" for point, hit in zip(RETRIED, hits, strict=True))
        yield Fault(f"{retried},{Point.COMMIT_DONE}=die@10", Action.DIE)


def shutdown_faults() -> Iterator[Fault]:
    """At the end of a run that has caught up; with two workers the point is reached twice."""
    for action in (Action.DIE, Action.RAISE):
        yield Fault(f"{Point.SHUTDOWN}={action}@1", action, until_caught_up=True)
        yield Fault(f"{Point.SHUTDOWN}={action}@2", action, until_caught_up=True, workers=2)


@pytest.mark.timeout(600)
def test_every_point(new_lake: NewLake) -> None:
    """Two lakes side by side, each a chain of starts that all end in a fault, the next one taking up what is left."""
    every = list(faults())
    half = len(every) // 2
    chains = [[*every[:half], *list(shutdown_faults())[:2]], [every[0], *every[half:], *list(shutdown_faults())[2:]]]
    lakes = [new_lake(home=f"lake{i}") for i in range(len(chains))]
    with ThreadPoolExecutor(len(chains)) as threads:
        list(threads.map(run_chain, lakes, chains))


def run_chain(lake: Lake, chain: list[Fault]) -> None:
    fill(lake, count=5_000, bad=0.05, duplicates=0.1, seed=3)
    for fault in chain:
        run_fault(lake, fault)
        assert_consistent(lake)
    log = lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    assert "error" not in log


def run_fault(lake: Lake, fault: Fault) -> None:
    """Starts a flow, which must meet everything that is armed in it and end by it."""
    extra = {"K2FLOW_UNTIL_CAUGHT_UP": "1"} if fault.until_caught_up else BATCH
    with lake.start(1, ("-w", str(fault.workers)), K2FLOW_FAILPOINTS=fault.armed, **extra) as flow:
        log = flow.wait(60)
        for part in fault.armed.split(","):
            point, _, rest = part.partition("=")
            assert f"failpoint {point}: {rest.partition('@')[0]}" in log, f"{fault}\n{log}"
        (code,) = flow.codes()
        assert code == -signal.SIGKILL if fault.action is Action.DIE else code not in (0, None), f"{fault}\n{log}"


def test_an_outcome_that_is_unknown_is_looked_up(new_lake: NewLake) -> None:
    """The first commit of each table lands, and the answer is lost."""
    lake = new_lake()
    fill(lake, count=600, bad=0.05, duplicates=0.1, seed=3)
    for hit in range(FENCED_TABLES + 1, 2 * FENCED_TABLES + 1):
        run_fault(lake, Fault(f"{Point.COMMIT_LANDED}=raise@{hit},{Point.COMMIT_DONE}=die@4", Action.DIE))
        assert_consistent(lake)
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_a_death_between_two_tables_commits(new_lake: NewLake) -> None:
    """The tables are left at different offsets; the next start writes to each what it lacks."""
    lake = new_lake()
    fill(lake, count=600, bad=0.05, duplicates=0.1, seed=3)
    for hit in (1, 2, 3):
        run_fault(lake, Fault(f"{Point.COMMIT_DONE}=die@{hit}", Action.DIE))
    assert len({str(offsets) for offsets in ledger_offsets(lake).values()}) > 1
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_a_death_among_batches_of_one_commit(new_lake: NewLake) -> None:
    """Those since the last commit are read again, and the late trades that were held back with them."""
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
def test_a_stopped_predecessor_commits_nothing_more(new_lake: NewLake, armed: str) -> None:
    """It is stopped at a step of its commit; goes on once a successor has fenced it and committed nothing yet."""
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
            assert "has taken over from epoch 1; this copy of the flow stops" in log.splitlines()[-1]
            assert ledger_offsets(lake) == before
            assert_consistent(lake)
            new.signal(signal.SIGCONT)
            log = new.wait(60)
            assert new.codes() == [0], log
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_a_predecessor_that_hangs(new_lake: NewLake) -> None:
    """A second copy on its host refuses; one on another host takes over, and the one that hung is killed later."""
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


def test_a_predecessor_that_commits_until_it_is_fenced(new_lake: NewLake) -> None:
    """The successor has read where the tables end; before it fences them, the predecessor commits once more."""
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


def test_an_unforeseen_error_in_one_of_two_processes(new_lake: NewLake) -> None:
    """Where it went wrong it is shown, as a single process shows it; the other one only loses touch."""
    lake = new_lake()
    fill(lake, count=100, seed=3)
    with lake.start(2, K2FLOW_FAILPOINTS=f"{Point.SOURCE_EMITTED}=raise", **BATCH) as flow:
        log = flow.wait(60)
        assert EXIT_FAILED in flow.codes(), log
    assert "InjectedError" in log


def test_an_error_that_cannot_be_printed(new_lake: NewLake) -> None:
    """Standard error is on a disk that is full: the flow ends all the same."""
    lake = new_lake()
    fill(lake, count=100, seed=3)
    command = [sys.executable, "-m", "bytewax.run", f"flows.{lake.exchange}"]
    environment = lake.environment(K2FLOW_FAILPOINTS=f"{Point.FILE_WRITTEN}=raise", **BATCH)
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, cwd=ROOT, env=environment, stderr=full, check=False, timeout=60)
    assert process.returncode == EXIT_TRY_AGAIN


def await_stop(flow: Flow, seconds: float = 60) -> None:
    """Until the one process of `flow` has stopped itself."""
    flow.wait_for_log("failpoint", seconds=seconds)
    deadline = time.monotonic() + seconds
    while psutil.Process(flow.processes[0].pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, flow.log()
        time.sleep(0.02)


def on_another_host() -> str:
    """PYTHONPATH by which a process heeds TORTURE_HOST."""
    return os.pathsep.join([str(ROOT / "torture" / "hooks"), str(ROOT)])
