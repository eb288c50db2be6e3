"""Repeated commits: conflicts and outages run again, and the last error is raised."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import TypeAdapter
from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException
from pyiceberg.table import Table
from tenacity import stop_after_attempt

from k2flow.iceberg.catalog import OUTAGES
from k2flow.iceberg.retry import commit_once, retry_conflicts


def failing(error: Exception) -> Table:
    """Return a table whose commits raise `error`."""

    class FailingTable:
        metadata = SimpleNamespace(last_updated_ms=0, snapshot_log=(), metadata_log=(), snapshots=())

        def name(self) -> tuple[str, ...]:
            return ("market_data", "x")

        def _do_commit(self, *_: object) -> None:
            raise error

    return cast(Table, FailingTable())


def unreadable_answer() -> Exception:
    """Return the error of PyIceberg's REST client for a commit response that is no JSON."""
    with pytest.raises(ValueError, match="Invalid JSON") as error:
        TypeAdapter(dict[str, Any]).validate_json("<html>")
    return error.value


class NotJsonError(OSError, ValueError):
    """Has the bases of requests.JSONDecodeError."""


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (CommitFailedException("the head has moved"), CommitFailedException),
        (ValueError("snapshot 5 does not exist"), CommitFailedException),
        (unreadable_answer(), CommitStateUnknownException),
        (NotJsonError("<html>"), NotJsonError),
        (TimeoutError(), TimeoutError),
    ],
)
def test_error_of_a_commit_is_a_conflict_or_an_outage(error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised):
        commit_once(failing(error), ((), ()))
    assert raised is CommitFailedException or issubclass(raised, OUTAGES)


def attempts(*errors: Exception) -> Callable[[], str]:
    """Return a call that raises each of `errors` once, then returns."""
    left = list(errors)

    def attempt() -> str:
        if left:
            raise left.pop(0)
        return "committed"

    return attempt


def test_conflicts_and_given_outages_run_again() -> None:
    waits: list[bool] = []
    attempt = attempts(CommitFailedException(), OSError())
    found = retry_conflicts(
        attempt, stop_after_attempt(3), max_wait_seconds=0, outages=OUTAGES, on_retry=lambda _: waits.append(True)
    )
    assert (found, len(waits)) == ("committed", 2)


def test_last_error_is_raised() -> None:
    with pytest.raises(CommitFailedException, match="second"):
        retry_conflicts(
            attempts(CommitFailedException("first"), CommitFailedException("second")),
            stop_after_attempt(2),
            max_wait_seconds=0,
        )
    with pytest.raises(TimeoutError):
        retry_conflicts(attempts(TimeoutError()), stop_after_attempt(2), max_wait_seconds=0)
