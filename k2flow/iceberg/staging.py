"""Replaces rows of several tables of an exchange as if in one step: written, staged, decided, published.

No transaction spans tables, so the replacement is made durable before any reader sees some of it:

1. `Staging.begin` fences the flow off and lets a branch of each table begin at its fence. While a table has it,
   maintenance leaves its files alone.
2. `Staging.stage` commits, on the branch, which data files go and which come.
3. `Staging.decide` sets one property of the Bronze table: which branches, and by how much each ledger's counts change.
   **From here on the replacement happens, whoever dies.** It lands only if nobody has taken over since `begin`, and
   after it nobody who has read Bronze before can.
4. `finish` publishes each branch on its table's main, with the ledger, in one commit that also drops the branch; then
   it removes the property, and leaves another that says so. It may be repeated, also by several processes at once. A
   flow that starts does it first.

What dies before 3 leaves the tables as they were, and branches that the next flow or the next replacement drops.

Delivery guarantee: exactly once. Write-audit-publish as Iceberg's branches are made for (spec, "Snapshot References"),
but published by applying the same files to a newer main: flows of other exchanges append to Gold meanwhile.
"""

import json
import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile, ManifestEntryStatus
from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update import (
    AssertRefSnapshotId,
    RemovePropertiesUpdate,
    RemoveSnapshotRefUpdate,
    RemoveSnapshotsUpdate,
    SetPropertiesUpdate,
    TableUpdate,
)

from k2flow.errors import CommitError, FencedError
from k2flow.exchange import Exchange
from k2flow.failpoints import Point, reach
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.commit import REPLACED_KEY, STAGED_BRANCH, STAGED_KEY, Committer
from k2flow.iceberg.rewrite import Change, CommitConflictError, Rewrite, apply, keep_for_readers

log = logging.getLogger(__name__)

RETRY_SECONDS = 120
TAKEN_OVER = "the flow of {} has begun meanwhile: nothing was replaced. Stop it and start again"


@dataclass(frozen=True)
class Staged:
    """What is decided of one table: a branch, its head, and by how many rows each partition's count changes."""

    branch: str
    head: int
    rows: Mapping[int, int]


class Staging:
    """One replacement of rows of one exchange in tables `names`, up to its decision. Bronze's rows stay."""

    def __init__(self, catalog: Catalog, exchange: Exchange, names: Sequence[str]) -> None:
        self._catalog = catalog
        self._exchange = exchange
        self._names = names
        self._bronze = Committer(catalog, exchange.bronze, exchange.name, exchange.settings.topic)
        self._branch = ""

    def begin(self) -> None:
        """Raises AlreadyRunningError where the flow runs on this host, CommitError, CatalogError."""
        exchange = self._exchange
        self._bronze.fence("")
        abandon(self._catalog, exchange, self._bronze.ledger.epoch)
        self._branch = f"{STAGED_BRANCH}{exchange.name}-{self._bronze.ledger.epoch}"
        for name in self._names:
            self._bronze.check()
            Committer(self._catalog, name, exchange.name, exchange.settings.topic).fence("", branch=self._branch)

    def give_up(self) -> None:
        """Leaves the tables as they were: nothing was decided. Raises CommitError, CatalogError."""
        abandon(self._catalog, self._exchange, self._bronze.ledger.epoch + 1)

    def stage(self, name: str, removed: Collection[str], added: Sequence[DataFile]) -> None:
        """Files of table `name`, by their paths, that go, and those that come in their place."""
        if not removed and not added:
            return
        self._bronze.check()

        def change(table: Table) -> Change:
            if self._branch not in table.metadata.refs:
                raise FencedError(f"{name}: {TAKEN_OVER.format(self._exchange.name)}")
            return Rewrite(table, Operation.OVERWRITE, removed, added, branch=self._branch)._commit()

        _apply(self._catalog, name, change)
        reach(Point.STAGED)

    def decide(self, rows: Mapping[str, Mapping[int, int]], what: str) -> None:
        """`rows`: by table and partition how many more rows come of the same offsets.

        `what` is told to whoever finishes it. Raises FencedError: then nothing was decided; CommitError, CatalogError:
        then it may have been.
        """
        tables = {}
        for name in self._names:
            ref = load_table(self._catalog, name).metadata.refs.get(self._branch)
            if ref is None:
                raise FencedError(f"{name}: {TAKEN_OVER.format(self._exchange.name)}")
            tables[name] = asdict(Staged(self._branch, ref.snapshot_id, rows.get(name, {})))
        self._bronze.decide(STAGED_KEY + self._exchange.name, json.dumps({"what": what, "tables": tables}))
        reach(Point.COMMITTED)


def finish(catalog: Catalog, exchange: Exchange) -> str | None:
    """Publishes what was decided for `exchange` and is not all published; what it was, None where there is nothing.

    Raises CommitError, CatalogError; then it may be called again.
    """
    key = STAGED_KEY + exchange.name
    properties = load_table(catalog, exchange.bronze).properties
    decision = decided(properties, exchange)
    if decision is None:
        return None
    text, (what, tables) = properties[key], decision
    for name, staged in tables.items():
        _apply(catalog, name, lambda table, staged=staged: _publication(table, exchange, staged))
        reach(Point.PUBLISHED)
    branch = next(iter(tables.values())).branch
    # Set once more, since PyIceberg fails to remove what another has just removed.
    properties = {key: text, REPLACED_KEY + exchange.name: branch}
    done = SetPropertiesUpdate(updates=properties), RemovePropertiesUpdate(removals=[key])

    def end(table: Table) -> Change:
        """Another may have ended it, and have begun and decided a next one since, whose fence moved the head."""
        return (done, (_head_is(table),)) if table.properties.get(key) == text else ((), ())

    _apply(catalog, exchange.bronze, end)
    log.info("%s: %s: published", exchange.name, what)
    return what


def abandon(catalog: Catalog, exchange: Exchange, epoch: int) -> None:
    """Drops the branches of replacements that were begun before `epoch` of Bronze's ledger and never decided.

    Only for who has begun that epoch, after which they cannot be decided any more. Raises CatalogError, CommitError.
    """
    own = re.compile(re.escape(f"{STAGED_BRANCH}{exchange.name}-") + r"(\d+)")

    def change(table: Table) -> Change:
        found = {name: own.fullmatch(name) for name in table.metadata.refs}
        old = [name for name, match in found.items() if match and int(match[1]) < epoch]
        return tuple(update for name in old for update in _without(table, name)), ()

    for name in exchange.tables:
        _apply(catalog, name, change)


def _publication(table: Table, exchange: Exchange, staged: Staged) -> Change:
    """The commit that replaces on main what `staged` replaces on its branch; nothing where that is done."""
    branch = staged.branch
    ref = table.metadata.refs.get(branch)
    if ref is None:
        return (), ()
    if ref.snapshot_id != staged.head:
        raise CommitError(f"{table.name()[-1]}: branch {branch} is not what was decided: another program has moved it")
    removed, added = _files(table, staged.head)
    ledger = ledgers.read(table.properties, exchange.name, exchange.settings.topic).corrected(staged.rows)
    entry = {ledgers.KEY + exchange.name: ledger.to_json()}
    updates: tuple[TableUpdate, ...] = (SetPropertiesUpdate(updates=entry), *_without(table, branch))
    same_branch = AssertRefSnapshotId.model_validate({"ref": branch, "snapshot-id": staged.head})
    if removed or added:
        made, _ = Rewrite(table, Operation.OVERWRITE, removed, added, entry)._commit()
        updates = (*made, keep_for_readers(table, time.time_ns() // 1_000_000), *updates)
    return updates, (same_branch, _head_is(table))


def _head_is(table: Table) -> AssertRefSnapshotId:
    """That main's head is still what `table` has."""
    return AssertRefSnapshotId.model_validate({"ref": MAIN_BRANCH, "snapshot-id": table.metadata.current_snapshot_id})


def _files(table: Table, head: int) -> tuple[list[str], list[DataFile]]:
    """The paths that a branch's head removed, and the files it added."""
    removed, added = [], []
    snapshot = table.metadata.snapshot_by_id(head)
    for manifest in snapshot.manifests(table.io) if snapshot else []:
        if manifest.added_snapshot_id != head:
            continue
        for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=False):
            if entry.snapshot_id == head and entry.status == ManifestEntryStatus.DELETED:
                removed.append(entry.data_file.file_path)
            elif entry.snapshot_id == head and entry.status == ManifestEntryStatus.ADDED:
                added.append(entry.data_file)
    return removed, added


def _without(table: Table, branch: str) -> tuple[TableUpdate, ...]:
    """Drops a branch, and its head where nothing else has it."""
    head = table.metadata.refs[branch].snapshot_id
    dropped = RemoveSnapshotRefUpdate.model_validate({"ref-name": branch})
    if _is_on_main(table, head):
        return (dropped,)
    return dropped, RemoveSnapshotsUpdate.model_validate({"snapshot-ids": [head]})


def _is_on_main(table: Table, snapshot_id: int) -> bool:
    parents: dict[int, int | None] = {s.snapshot_id: s.parent_snapshot_id for s in table.metadata.snapshots}
    at = table.metadata.current_snapshot_id
    while at is not None and at != snapshot_id:
        at = parents.get(at)
    return at == snapshot_id


def _apply(catalog: Catalog, name: str, change: Any) -> None:
    """Makes a change however often others commit in between, for RETRY_SECONDS. Raises CommitError, CatalogError."""
    deadline = time.monotonic() + RETRY_SECONDS
    try:
        with catalog_errors():
            while not apply(catalog, name, change):
                if time.monotonic() > deadline:
                    raise CommitError(f"{name}: gave up after {RETRY_SECONDS} s of conflicting commits: start again")
    except CommitConflictError as error:
        raise CommitError(
            f"{name}: {error}: another program has replaced them since. Let that table's main go back to the snapshot "
            "before it, and start again"
        ) from error


def decided(bronze: Mapping[str, str], exchange: Exchange) -> tuple[str, dict[str, Staged]] | None:
    """What is decided of `exchange` and not all published, by Bronze's properties: in words, and by table.

    Raises CommitError.
    """
    key = STAGED_KEY + exchange.name
    text = bronze.get(key)
    if text is None:
        return None
    try:
        raw = json.loads(text)
        tables = {
            name: Staged(one["branch"], one["head"], {int(p): n for p, n in one["rows"].items()})
            for name, one in raw["tables"].items()
        }
        return raw["what"], tables
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CommitError(f"table property {key} cannot be read ({error}): restore it from a snapshot") from error
