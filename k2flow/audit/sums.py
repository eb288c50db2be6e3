"""The sums of the rows of each file that was read, for the proof, and their comparison with those of files gone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.audit.context import AuditContext
from k2flow.audit.coverage import compares_rows
from k2flow.audit.file_checks import read_files
from k2flow.audit.proof import NotProvenError, RowSum
from k2flow.audit.scope import Ints, TableScope
from k2flow.inspection.files import ReadPlan, prefetch
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import content_hash, hash_of, hashable
from k2flow.layers import GOLD, Layer

SUMS = "count(*), sum({row}::HUGEINT), sum(hash({row})::HUGEINT)"
"""The SQL of a RowSum. `hash` of a hash is the second, independent one."""
OTHER_ROWS = "{} no longer has the rows that were proven"
FileSums = list[dict[str, RowSum]]  # by file number, then by owner


def add_sums(
    context: AuditContext, layer: Layer, batch: pa.RecordBatch, number: Ints, proven: npt.NDArray[np.bool_]
) -> None:
    """Add rows of Bronze, dead letters or a layer that is not compared to `summed`.

    `number` (n,) are the partitions of the rows, `proven` (n,) whether an earlier audit has proven them.
    """
    batch = batch.append_column("number", pa.array(number.astype(np.int32))).append_column("proven", pa.array(proven))
    last = '"offset"' if "offset" in layer.columns else "0"
    sums = SUMS.format(row=hash_of(layer.columns, layer.arrow_schema))
    context.store.insert("summed", hashable(batch), f"file, number, proven, {sums}, max({last})", "true GROUP BY ALL")


def check_proven_rows(context: AuditContext, pinned: PinnedTables, layer: Layer) -> None:
    """Check that the proven rows of new files of Bronze or dead letters are those of the files gone."""
    name = pinned.name(layer)
    added = [number for number, file in enumerate(context.scope.files) if file.table == name and file.added]
    rows = "SELECT sum(rows), sum(hashes), sum(mixed) FROM summed WHERE proven AND file IN (SELECT unnest(?))"
    found = RowSum.of(*(value or 0 for value in context.store.one(rows, [added])))
    if found != context.scope.removed(name):
        raise NotProvenError(f"{name}: the rows of files that are gone are not those of the files in their place")


def file_sums(context: AuditContext, pinned: Sequence[PinnedTables]) -> FileSums:
    """Return the sums of all files that were read."""
    found: FileSums = [{} for _ in context.scope.files]
    owners = {each.number: each.exchange.name for each in pinned}
    summed = "SELECT file, NULL, sum(rows), sum(hashes), sum(mixed) FROM summed GROUP BY ALL"
    trades = [
        f"SELECT file, NULL, {SUMS.format(row=context.hashes.column(layer))} FROM trades "
        f"WHERE layer = '{layer.name}' GROUP BY ALL"
        for layer in dict.fromkeys(layer for each in pinned for layer in each.exchange.layers if compares_rows(layer))
    ]
    gold = f"SELECT file, exchange, {SUMS.format(row='row')} FROM gold GROUP BY ALL"
    for file, owner, *sums in context.store.run(" UNION ALL ".join([summed, *trades, gold])):
        found[file]["" if owner is None else owners.get(owner, "")] = RowSum.of(*sums)
    return found


def check_sample(context: AuditContext, scope: TableScope, plan: ReadPlan) -> None:
    """Read proven files again. Raises NotProvenError if one has other rows."""
    layer = scope.layer
    row = content_hash(layer) if layer is GOLD or compares_rows(layer) else hash_of(layer.columns, layer.arrow_schema)
    found: dict[str, RowSum] = {}
    for task, batch in prefetch(read_files(context, plan)):
        path = task.file.file_path
        (sums,) = context.store.select(hashable(batch), f"SELECT {SUMS.format(row=row)} FROM batch")
        found[path] = found.get(path, RowSum()).plus(RowSum.of(*sums))
    for task in plan.tasks:
        path = task.file.file_path
        if found.get(path, RowSum()) != scope.proven[path].total:
            raise NotProvenError(OTHER_ROWS.format(path))
