"""A slow storage delays, but stops nothing: many requests at once, one load of a table, deadlines without progress."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.io import InputFile, OutputFile
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

from k2flow.errors import CommitError
from k2flow.exchange import find_exchange
from k2flow.flow.sink import MAX_FILE_SECONDS, check_age
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.concurrent import THREADS, ByteBudget, read_ahead
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.actions import Timing
from k2flow.timeouts import DeadlinePassedError, Progress, run_with_timeout
from k2flow.trades import gold_ids
from k2flow.trades.messages import MessageBatch
from tests.messages import NOW_US, messages, value
from tests.pipeline import PipelineRun

LATENCY_SECONDS = 0.03
HOURS = 150
HOUR_US = 3_600_000_000
EXCHANGE = find_exchange("binance")


class SlowFile(PyArrowFile):
    def open(self, seekable: bool = True) -> object:  # type: ignore[override]
        time.sleep(LATENCY_SECONDS)
        return super().open(seekable)

    def create(self, overwrite: bool = False) -> object:  # type: ignore[override]
        time.sleep(LATENCY_SECONDS)
        return super().create(overwrite)


class SlowFileIO(PyArrowFileIO):
    def new_input(self, location: str) -> InputFile:
        return self._slow(super().new_input(location))

    def new_output(self, location: str) -> OutputFile:
        return self._slow(super().new_output(location))

    def _slow(self, file: object) -> SlowFile:
        assert isinstance(file, PyArrowFile)
        return SlowFile(file.location, file._path, file._filesystem)


@pytest.fixture
def slow_catalog(tmp_path: Path) -> Catalog:
    io = {"py-io-impl": f"{SlowFileIO.__module__}.{SlowFileIO.__name__}"}
    uri, warehouse = f"sqlite:///{tmp_path}/catalog.db", f"file://{tmp_path}/warehouse"
    return load_catalog("k2flow", type="sql", uri=uri, warehouse=warehouse, **io)


def test_many_hours_in_one_batch(slow_catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of many hours are written and read side by side. Gold is loaded twice: for the windows, and for the ids."""
    loads: list[str] = []
    load = gold_ids.load_table
    monkeypatch.setattr(gold_ids, "load_table", lambda catalog, name: loads.append(name) or load(catalog, name))
    for number in range(2):
        values = [
            value(message_id=f"{hour}", timestamp=NOW_US - hour * HOUR_US, ingestion_timestamp=NOW_US)
            for hour in range(HOURS)
        ]
        rows = messages(values).rows
        offsets = np.arange(number * HOURS, (number + 1) * HOURS)
        batch = MessageBatch(rows, np.zeros(HOURS, np.int32), offsets, [(0, number * HOURS, (number + 1) * HOURS)])
        run = PipelineRun(slow_catalog, EXCHANGE)
        loads.clear()
        began = time.monotonic()
        run.commit(batch)
        one_by_one = 2 * HOURS * LATENCY_SECONDS  # of Silver's days and Gold's hours, or of Gold's files and ids
        assert time.monotonic() - began < one_by_one
        assert loads == [GOLD_TABLE] * 2
    assert load_table(slow_catalog, GOLD_TABLE).scan().count() == HOURS


def test_files_that_maintenance_may_delete_are_not_committed() -> None:
    for age in (0.0, MAX_FILE_SECONDS - 60):
        check_age("gold", time.monotonic() - age, "start again")
    with pytest.raises(CommitError, match=r"gold: .* took 18\d\d s, .* nothing is lost: start again"):
        check_age("gold", time.monotonic() - MAX_FILE_SECONDS - 1, "start again")
    assert Timing().orphan_seconds > MAX_FILE_SECONDS


def test_deadline_counts_from_the_last_progress() -> None:
    progress, ticks = Progress(), 12

    def slow() -> str:
        for _ in range(ticks):
            time.sleep(0.1)
            progress.made()
        return "done"

    def hung() -> None:
        progress.made()
        time.sleep(5)

    assert run_with_timeout(0.5, slow, progress) == "done"
    for call, counted in ((slow, None), (hung, progress)):
        began = time.monotonic()
        with pytest.raises(DeadlinePassedError, match=r"within 0\.5 s"):
            run_with_timeout(0.5, call, counted)
        assert 0.5 <= time.monotonic() - began < 3


def test_results_come_in_order_and_in_bounded_memory() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def call(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01 if number % 3 else 0.03)
        with lock:
            running -= 1
        return number

    for size, at_once in ((1, THREADS), (10, 10), (1000, 1)):
        running = most = 0
        calls = [(size, lambda number=number: call(number)) for number in range(120 if size < 1000 else 10)]
        assert list(read_ahead(calls, 100)) == list(range(len(calls)))
        assert most <= at_once
        assert most > at_once // 3


def test_error_comes_in_its_place() -> None:
    def fail() -> int:
        raise OSError("gone")

    results = read_ahead([(1, lambda: 1), (1, fail), (1, lambda: 3)], 10)
    assert next(results) == 1
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_budget_lets_one_large_file_through() -> None:
    budget = ByteBudget(10)
    budget.take(100)
    waiting = threading.Thread(target=budget.take, args=(5,))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    budget.give_back(100)
    waiting.join(5)
    assert not waiting.is_alive()
    budget.take(5)
    budget.give_back(10)
