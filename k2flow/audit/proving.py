"""The proof after an audit that found all invariants to hold: that of before, less what is gone, with what was read."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import duckdb

from k2flow.audit.context import AuditContext
from k2flow.audit.coverage import compares_rows
from k2flow.audit.gold_changes import newest_hours, window_hours
from k2flow.audit.id_runs import merge_runs, write_run
from k2flow.audit.proof import Extents, FileProof, Hours, NotProvenError, Proof, ProofStore
from k2flow.audit.scope import behind_from, identity, log_name
from k2flow.audit.sorted_ids import sorted_ids
from k2flow.audit.sums import OTHER_ROWS, file_sums
from k2flow.config.settings import Settings
from k2flow.iceberg.manifests import hour_of
from k2flow.inspection.partitions import TopicPartitions
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import content_hash, hash_of, id_hash
from k2flow.layers import BRONZE, GOLD_TABLE

FORMAT = 1


def made_for(settings: Settings, pinned: Sequence[PinnedTables]) -> str:
    """Return what must be the same for a proof to hold: versions, settings, columns, tables, topics."""
    exchanges = [
        (
            each.exchange.name,
            each.exchange.code,
            each.exchange.settings.dedup_window_hours,
            each.exchange.settings.unknown_fields,
            [rule.reason for rule in each.exchange.rules],
            id_hash(each.exchange),
            [
                (layer.name, compares_rows(layer), content_hash(layer), hash_of(layer.columns, layer.arrow_schema))
                for layer in each.exchange.layers
            ],
        )
        for each in pinned
    ]
    parts = [FORMAT, version("k2flow"), duckdb.__version__, settings.schema_ids, exchanges, identity(pinned)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def bronze_holds_all(exchanges: Sequence[TopicPartitions]) -> bool:
    """Return whether Bronze has all messages of today's topics that other tables hold."""
    current = [partition for each in exchanges for partition in each if partition.current]
    return all(each.ledger_extent(BRONZE).next >= max(e.next for e in each.extents.values()) for each in current)


def next_proof(
    context: AuditContext, settings: Settings, exchanges: Sequence[TopicPartitions], store: ProofStore
) -> Proof:
    """Return the proof of an audit whose verdict is that all invariants hold. Writes the ids.

    Raises OSError, and NotProvenError if a pending file has other rows than before.
    """
    before, pinned = context.scope.proof, [each.pinned for each in exchanges]
    newest = newest_hours(context, pinned, before)
    return Proof(
        made_for=made_for(settings, pinned),
        full_at=before.full_at if before else time.time(),
        extents={each.pinned.exchange.name: _extents(each) for each in exchanges},
        tables=_tables(context, exchanges),
        newest=newest,
        ids=_ids(context, pinned, newest, store),
    )


def _extents(partitions: TopicPartitions) -> Extents:
    return {
        log_name(each): {layer.name: (held.first, held.next, held.rows) for layer, held in each.extents.items()}
        for each in partitions
    }


def _tables(context: AuditContext, exchanges: Sequence[TopicPartitions]) -> dict[str, dict[str, FileProof]]:
    scope = context.scope
    sums, pending = file_sums(context, [each.pinned for each in exchanges]), _pending(context, exchanges)
    tables: dict[str, dict[str, FileProof]] = {name: dict(table.proven) for name, table in scope.tables.items()}
    for number, file in enumerate(scope.files):
        now, before = FileProof(file.partition, number in pending, sums[number]), tables[file.table].get(file.path)
        if before and before.total != now.total:
            raise NotProvenError(OTHER_ROWS.format(file.path))
        tables[file.table][file.path] = now
    return tables


def _pending(context: AuditContext, exchanges: Sequence[TopicPartitions]) -> set[int]:
    """Return the files with messages that a layer does not hold yet: they are compared with its rows next time."""
    behind = behind_from([partition for each in exchanges for partition in each])
    found = context.store.arrays("SELECT file, number, max(last) AS last FROM summed WHERE number >= 0 GROUP BY ALL")
    return set(found["file"][found["last"] >= behind[found["number"]]].tolist())


def _ids(context: AuditContext, pinned: Sequence[PinnedTables], newest: Mapping[str, int], store: ProofStore) -> Hours:
    """Return the ids of the deduplication windows: the runs of before, and one of each hour with new rows."""
    before = context.scope.proof
    kept = {hour for each in pinned for hour in window_hours(each, newest)}
    if before:
        read_before = {hour_of(f.partition) for f in before.tables.get(GOLD_TABLE, {}).values()}
        kept -= read_before - before.ids.keys()  # the proof does not have all of their ids
    owners = {each.number: each.exchange.name for each in pinned}
    table = "new_gold" if before else "gold"
    hours: Hours = {
        hour: {owner: list(runs) for owner, runs in of.items()}
        for hour, of in (before.ids if before else {}).items()
        if hour in kept
    }
    for number, hour in context.store.run(f"SELECT DISTINCT exchange, hour FROM {table} ORDER BY ALL"):
        if hour in kept:
            rows = f"SELECT id FROM {table} WHERE exchange = {number} AND hour = {hour}"
            if run := write_run(store.folder, sorted_ids(context.store, rows)):
                owner = owners.get(number, "")
                runs = [*hours.setdefault(hour, {}).get(owner, []), run]
                hours[hour][owner] = merge_runs(store.folder, runs)
    for hour in kept:
        hours.setdefault(hour, {})
    return hours
