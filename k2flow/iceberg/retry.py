"""Commits that conflict with others' are tried again: one loop, for flows, replacements, maintenance and evolution."""

from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError
from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException, RESTError
from pyiceberg.table import Table
from pyiceberg.table.update import AddSnapshotUpdate, TableRequirement, TableUpdate
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_all, wait_random_exponential
from tenacity.stop import stop_base

from k2flow.compat.pyiceberg.commit_times import in_order, last_time_ms
from k2flow.iceberg.append import append_files
from k2flow.iceberg.ledger import first_error
from k2flow.observability import clocks

T = TypeVar("T")
Changes = tuple[tuple[TableUpdate, ...], tuple[TableRequirement, ...]]
"""The updates of one commit, and the requirements without which the catalog refuses it."""
BEHIND = "invalid update timestamp"
"""In the answer of catalogs whose clock is behind the newest snapshot, from `TableMetadata` of iceberg-core."""
MIN_ATTEMPTS = 2
FIRST_WAIT_SECONDS = 0.05  # the flows of two exchanges meet at Gold whenever their triggers coincide


def retry_conflicts(
    attempt: Callable[[], T],
    stop: stop_base,
    *,
    max_wait_seconds: float = 1,
    outages: tuple[type[Exception], ...] = (),
    on_retry: Callable[[BaseException | None], None] = lambda _: None,
) -> T:
    """Run `attempt`, which reads the table and commits, until it raises no CommitFailedException and no outage.

    The waits are random and grow exponentially; `on_retry` takes the error before each. Once `stop` says so (by
    attempts or by delay), the last error is raised, but not before MIN_ATTEMPTS: one attempt on a slow storage may
    outlast a delay.
    """
    retrying = Retrying(
        retry=retry_if_exception_type((CommitFailedException, *outages)),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=max_wait_seconds),
        stop=stop_all(stop, stop_after_attempt(MIN_ATTEMPTS)),
        before_sleep=lambda state: on_retry(state.outcome.exception() if state.outcome else None),
        reraise=True,
    )
    return retrying(attempt)


def commit_once(table: Table, changes: Changes) -> None:
    """Commit to the table as it was read. A snapshot is later than all others, whatever this host's clock says.

    A REST catalog refuses a commit without a snapshot while its own clock is behind the newest snapshot. Such a commit
    is sent once more with an empty snapshot.

    No error proves that nothing was committed. If a proxy repeats a request whose answer was lost, the catalog refuses
    the second one, though the first has landed. So read the table again before deleting any file. Raises
    CommitFailedException if another commit came first, CommitStateUnknownException if the answer cannot be read.
    """
    updates, requirements = changes
    name = table.name()[-1]
    clocks.compare_with_table(name, last_time_ms(table.metadata))
    try:
        _send(table, updates, requirements)
    except RESTError as error:
        if BEHIND not in str(error).lower() or any(isinstance(update, AddSnapshotUpdate) for update in updates):
            raise
        clocks.warn_of_catalog(name)
        appended, unchanged_head = append_files(table)._commit()
        _send(table, (*appended, *updates), (*requirements, *unchanged_head))


def _send(table: Table, updates: tuple[TableUpdate, ...], requirements: tuple[TableRequirement, ...]) -> None:
    try:
        table._do_commit(in_order(updates, table.metadata), requirements)
    except OSError:  # requests' JSONDecodeError is one, and a ValueError too
        raise
    except ValidationError as error:
        text = f"the catalog's answer to a commit cannot be read: {first_error(error)}"
        raise CommitStateUnknownException(text) from error
    except ValueError as error:
        # PyIceberg raises it if the updates do not fit the table any more: another process has created a snapshot
        # elsewhere than on the head, or has expired one that this attempt expires.
        raise CommitFailedException(f"the table has changed: {error}") from error
