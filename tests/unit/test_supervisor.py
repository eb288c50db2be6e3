"""Which processes of a flow a host runs."""

import socket
import threading
from pathlib import Path

import pytest

from k2flow.errors import SettingsError
from k2flow.process_exit import EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_UNAVAILABLE, PEER_LOST
from k2flow.supervisor.supervise import Counts, Failure, Plan, cause_of_end, plan

ADDRESSES = "a:2101;b:2101;c:2101"


def test_alone_a_host_runs_all_processes() -> None:
    assert plan("binance", 3, None, None) == Plan("binance", range(3))


def test_of_a_cluster_a_host_runs_the_process_it_is_told() -> None:
    assert plan("binance", 3, " a:2101; b:2101;c:2101", 1) == Plan("binance", [1], ADDRESSES)


def test_a_host_whose_name_ends_with_its_number_need_not_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "binance-2.flows.example")
    assert plan("binance", 3, ADDRESSES, None).numbers == [2]


@pytest.mark.parametrize(
    ("cluster", "number", "text"),
    [
        (None, 1, "means nothing without K2FLOW_CLUSTER"),
        (ADDRESSES, 3, "not one of the cluster's 3"),
        ("a:2101,b:2101", 0, "host:port"),
        ("a;b:2101", 0, "host:port"),
        (" ; ", 0, "host:port"),
        (ADDRESSES, None, "does not end with its number"),
    ],
)
def test_what_makes_no_cluster_is_refused(
    cluster: str | None, number: int | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "flows")
    with pytest.raises(SettingsError, match=text):
        plan("binance", 3, cluster, number)


def test_counts_that_a_process_is_just_about_to_write_are_read_again(tmp_path: Path) -> None:
    """Prometheus' client fails on a file that is still empty."""
    unfinished = tmp_path / "gauge_liveall_1.db"
    unfinished.touch()
    threading.Timer(0.1, unfinished.unlink).start()
    assert list(Counts(str(tmp_path)).collect()) == []


CRASHED = "process 0 of 2 of binance ended with exit code 1; nothing is lost: it goes on where the tables end"
KILLED = "process 1 of 2 of binance was ended by signal 9; nothing is lost: it goes on where the tables end"
HUNG = "process 1 of 2 of binance hung; nothing is lost: it goes on where the tables end"


@pytest.mark.parametrize(
    ("codes", "errors", "was_up", "failure"),
    [
        ([0, 0], [], True, None),
        ([EXIT_FAILED, EXIT_TRY_AGAIN], ["wrong", PEER_LOST], True, Failure("wrong", False)),
        ([EXIT_TRY_AGAIN, EXIT_TRY_AGAIN], [PEER_LOST, "outage"], True, Failure("outage", True)),
        ([EXIT_UNAVAILABLE, EXIT_UNAVAILABLE], ["down", "down"], False, Failure("down", False)),
        ([EXIT_UNAVAILABLE, EXIT_UNAVAILABLE], ["down", "down"], True, Failure("down", True)),
        ([EXIT_TRY_AGAIN], [PEER_LOST], True, Failure(PEER_LOST, True)),
        ([EXIT_TRY_AGAIN, -9], [PEER_LOST], False, Failure(KILLED, True)),
        ([EXIT_FAILED, EXIT_TRY_AGAIN], [PEER_LOST], True, Failure(CRASHED, True)),
        ([EXIT_FAILED, EXIT_TRY_AGAIN], [PEER_LOST], False, Failure(CRASHED, False)),
        ([EXIT_FAILED, None], [], True, Failure(CRASHED, True)),
        ([0, None], [], True, Failure(HUNG, True)),
    ],
)
def test_why_a_flow_has_ended(
    codes: list[int | None], errors: list[str], was_up: bool, failure: Failure | None
) -> None:
    """What one process told counts, not that others then lost touch with it; what nobody foresaw is tried again."""
    assert cause_of_end("binance", codes, errors, was_up) == failure
