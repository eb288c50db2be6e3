"""Gold's new files, less those that are gone: the rows of the new messages, and none twice.

A row of a new file is proven if an earlier audit has seen its id in its hour: compaction wrote it again. Each check
raises NotProvenError:

- the proven rows are those of the files that are gone, by their sum;
- each other row is one that a new message gives, in all columns that Gold does not derive;
- its id is in no other row of its hour or of the deduplication window. An id with a `message_id` is under no other
  exchange there;
- the id of each new message is in Gold.

The earlier ids come from the proof, which has those of the window. Those of other hours, with rows of late trades or
late duplicates, are read from Gold. Ids outside both are not compared: only a full audit finds an id that two exchanges
have on different days.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from k2flow.audit.context import AuditContext
from k2flow.audit.database import within
from k2flow.audit.gold import UNAUDITED, UNDECLARED, GoldKeyCheck, is_global, newest_hour
from k2flow.audit.id_runs import found_in
from k2flow.audit.proof import NotProvenError, Proof, ProofStore, RowSum
from k2flow.audit.sorted_ids import count_without, sorted_ids
from k2flow.audit.sums import SUMS
from k2flow.iceberg.manifests import hour_of
from k2flow.inspection.files import ReadPlan, read
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import HOUR, hashable
from k2flow.layers import GOLD, GOLD_TABLE

_EARLIER = "CREATE OR REPLACE TABLE earlier (exchange TINYINT, hour INTEGER, id UBIGINT)"
_SAME = "e.exchange = g.exchange AND e.hour = g.hour AND e.id = g.id"
_NEW = (
    f"CREATE OR REPLACE TABLE new_gold AS SELECT * FROM gold g WHERE NOT EXISTS (SELECT 1 FROM earlier e WHERE {_SAME})"
)
_PROVEN = (
    f"SELECT g.exchange, {SUMS.format(row='g.row')} FROM gold g "
    f"WHERE EXISTS (SELECT 1 FROM earlier e WHERE {_SAME}) GROUP BY 1"
)


def check_gold_changes(
    context: AuditContext, proof: Proof, store: ProofStore, keys: GoldKeyCheck, pinned: Sequence[PinnedTables]
) -> None:
    """Check the rows of new files, which `keys` has read. Leaves those that are not proven in `new_gold`."""
    database = context.store
    database.run(_EARLIER)
    owners = {each.exchange.name: each.number for each in pinned}
    _find_in_runs(context, proof, store, owners)
    newest = newest_hours(context, pinned, proof)
    wanted = {hour for each in pinned for hour in window_hours(each, newest)} | set(_touched_hours(context))
    _read_hours(context, keys, pinned[0], wanted - proof.ids.keys())
    database.run(_NEW)
    if database.count(f"FROM gold WHERE exchange = {UNDECLARED}"):
        raise NotProvenError(f"{GOLD_TABLE}: rows of an undeclared exchange")
    proven = {number: RowSum.of(*sums) for number, *sums in database.run(_PROVEN)}
    for each in pinned:
        if proven.get(each.number, RowSum()) != context.scope.removed(GOLD_TABLE, each.exchange.name):
            raise NotProvenError(
                f"{GOLD_TABLE}: the rows of files that are gone are not those of the files in their place, or an id is "
                "there twice"
            )
        _check_exchange(context, each, newest[each.exchange.name])


def _check_exchange(context: AuditContext, pinned: PinnedTables, newest: int) -> None:
    x, row = pinned.number, context.hashes.column(GOLD)
    window = newest - pinned.exchange.settings.dedup_window_hours
    due = f"FROM valid v {within(GOLD)} WHERE e_gold.exchange = {x}"
    new, earlier = (f"FROM {table} WHERE exchange = {x}" for table in ("new_gold", "earlier"))
    before = (
        f"FROM new_gold g JOIN earlier e USING (id) WHERE g.exchange = {x} AND "
        f"CASE e.exchange WHEN {x} THEN least(g.hour, e.hour) > {window} ELSE {is_global(pinned.exchange)} END"
    )
    if count := count_without(context.store, f"SELECT row AS id {new}", f"SELECT v.{row} AS id {due}"):
        raise NotProvenError(f"{GOLD_TABLE}: {count:,} new rows: no new message gives them")
    if count := context.store.count(before):
        raise NotProvenError(f"{GOLD_TABLE}: {count:,} new rows: their ids were there before")
    if count := count_without(context.store, f"SELECT v.id {due}", f"SELECT id {new}", f"SELECT id {earlier}"):
        raise NotProvenError(f"{GOLD_TABLE}: {count:,} ids of new messages are missing")


def newest_hours(context: AuditContext, pinned: Sequence[PinnedTables], proof: Proof | None) -> dict[str, int]:
    """Return Gold's newest hour of each exchange, of new and of proven rows."""
    before = proof.newest if proof else {}
    return {
        each.exchange.name: max(newest_hour(context.store, each), before.get(each.exchange.name, 0)) for each in pinned
    }


def window_hours(pinned: PinnedTables, newest: Mapping[str, int]) -> range:
    """Return the hours of an exchange in which each id may be once."""
    last = newest[pinned.exchange.name]
    return range(last - pinned.exchange.settings.dedup_window_hours + 1, last + 1)


def _touched_hours(context: AuditContext) -> list[int]:
    return context.store.column(f"SELECT hour FROM gold UNION SELECT v.hour FROM valid v {within(GOLD)}")


def _find_in_runs(context: AuditContext, proof: Proof, store: ProofStore, owners: dict[str, int]) -> None:
    """Fill `earlier` with the ids of new rows and messages that the proof has, in ascending order, CHUNK at once."""
    rows = f"SELECT id FROM gold UNION ALL SELECT v.id FROM valid v {within(GOLD)}"
    for ids in sorted_ids(context.store, rows):
        for hour, runs_of in proof.ids.items():
            for owner, runs in runs_of.items():
                found = np.zeros(len(ids), np.bool_)
                for run in runs:
                    found |= found_in(store.folder, run, ids)
                if found.any():
                    rows = pa.RecordBatch.from_pydict({"id": ids[found]})
                    context.store.insert("earlier", rows, f"{owners.get(owner, UNAUDITED)}, {hour}, id")


def _read_hours(context: AuditContext, keys: GoldKeyCheck, pinned: PinnedTables, hours: set[int]) -> None:
    """Fill `earlier` with all proven rows of some hours: the proof has no ids of them."""
    scope = context.scope.tables[GOLD_TABLE]
    tasks = [task for task in scope.tasks.values() if hour_of(task.file.partition) in hours]
    if not tasks:
        return
    files = ReadPlan(GOLD, pinned.tables[GOLD], tasks, 0)
    columns = list(dict.fromkeys((*(c for each in keys.exchanges for c in each.dedup_key), "exchange", "timestamp")))
    for batch in map(hashable, read(files, columns, None, context.advance(files))):
        context.store.insert("earlier", batch, f"{keys.number}, {HOUR}, {keys.id}")
