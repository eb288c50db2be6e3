"""The supervisor: the processes that a host runs, their metrics, and the cause of their end."""

import socket
import threading
from pathlib import Path

import pytest

from k2flow.errors import SettingsError
from k2flow.observability.metrics import ProcessCounts
from k2flow.process_exit import EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_UNAVAILABLE, PEER_LOST
from k2flow.supervisor.failure import FlowFailure, find_failure
from k2flow.supervisor.plan import ProcessPlan, plan_processes

ADDRESSES = "a:2101;b:2101;c:2101"


def test_without_a_cluster_a_host_runs_all_processes() -> None:
    assert plan_processes("binance", 3, None, None) == ProcessPlan("binance", range(3))


def test_host_of_a_cluster_runs_one_process() -> None:
    assert plan_processes("binance", 3, " a:2101; b:2101;c:2101", 1) == ProcessPlan("binance", [1], ADDRESSES)


def test_number_in_the_cluster_comes_from_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "binance-2.flows.example")
    assert plan_processes("binance", 3, ADDRESSES, None).numbers == [2]


@pytest.mark.parametrize(
    ("cluster", "number", "text"),
    [
        (None, 1, "K2FLOW_PROCESS_ID needs K2FLOW_CLUSTER"),
        (ADDRESSES, 3, "process 3 is not in the cluster: its processes are 0 to 2"),
        ("a:2101,b:2101", 0, "host:port"),
        ("a;b:2101", 0, "host:port"),
        (" ; ", 0, "host:port"),
        (ADDRESSES, None, "does not end with its number"),
    ],
)
def test_wrong_cluster_is_refused(
    cluster: str | None, number: int | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "flows")
    with pytest.raises(SettingsError, match=text):
        plan_processes("binance", 3, cluster, number)


def test_half_written_counts_are_read_again(tmp_path: Path) -> None:
    """Prometheus' client fails on a file that is still empty."""
    unfinished = tmp_path / "gauge_liveall_1.db"
    unfinished.touch()
    threading.Timer(0.1, unfinished.unlink).start()
    assert list(ProcessCounts(str(tmp_path)).collect()) == []


CRASHED = "process 0 of 2 of binance ended with exit code 1; nothing is lost: a restart resumes where the tables end"
KILLED = "process 1 of 2 of binance was killed by signal 9; nothing is lost: a restart resumes where the tables end"
HUNG = "process 1 of 2 of binance hung; nothing is lost: a restart resumes where the tables end"


@pytest.mark.parametrize(
    ("codes", "errors", "was_up", "failure"),
    [
        ([0, 0], [], True, None),
        ([EXIT_FAILED, EXIT_TRY_AGAIN], ["wrong", PEER_LOST], True, FlowFailure("wrong", False, True)),
        ([EXIT_TRY_AGAIN, EXIT_TRY_AGAIN], [PEER_LOST, "outage"], True, FlowFailure("outage", True, False)),
        ([EXIT_UNAVAILABLE, EXIT_UNAVAILABLE], ["down", "down"], False, FlowFailure("down", False, False)),
        ([EXIT_UNAVAILABLE, EXIT_UNAVAILABLE], ["down", "down"], True, FlowFailure("down", True, False)),
        ([EXIT_TRY_AGAIN], [PEER_LOST], True, FlowFailure(PEER_LOST, True, False)),
        ([EXIT_TRY_AGAIN, -9], [PEER_LOST], False, FlowFailure(KILLED, True, False)),
        ([EXIT_FAILED, EXIT_TRY_AGAIN], [PEER_LOST], True, FlowFailure(CRASHED, True, False)),
        ([EXIT_FAILED, EXIT_TRY_AGAIN], [PEER_LOST], False, FlowFailure(CRASHED, False, True)),
        ([EXIT_FAILED, None], [], True, FlowFailure(CRASHED, True, False)),
        ([0, None], [], True, FlowFailure(HUNG, True, False)),
    ],
)
def test_cause_of_a_failure(
    codes: list[int | None], errors: list[str], was_up: bool, failure: FlowFailure | None
) -> None:
    """A reported error counts more than a lost peer; unexpected errors lead to a restart."""
    assert find_failure("binance", codes, errors, was_up) == failure
