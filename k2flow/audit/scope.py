"""Which files and offsets one audit reads: all, or those that the proof of earlier audits does not have.

An incremental audit is the audit of a difference. The files that are new, less those that are gone, must hold the rows
of the messages that the ledgers count since the proof. `Scope` says which these are:

- the beginnings of the ledgers' extents are left out, up to the proven offsets;
- Bronze and the dead letters have offsets. A file that compaction wrote may hold proven rows too: those must be the
  rows of the files that are gone, by their sum;
- the other tables have no offsets. So the sum of the new files must be that of the new messages and the files gone.

Whatever does not add up raises NotProvenError.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pyiceberg.table import FileScanTask

from k2flow.audit.proof import FileProof, NotProvenError, Proof, RowSum
from k2flow.iceberg.ledger import CommittedRange
from k2flow.iceberg.manifests import partition_values
from k2flow.inspection.files import ReadPlan, plan
from k2flow.inspection.partitions import TopicPartition, TopicPartitions
from k2flow.inspection.pinned import PinnedTables
from k2flow.layers import Layer

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FileRead:
    """A data file that is read. `added`: the proof does not have it."""

    table: str
    path: str
    partition: tuple[object, ...]
    added: bool


@dataclass
class TableScope:
    """The files of one table: those that are proven and still exist, and the sums of those that are gone, by owner."""

    layer: Layer
    pinned: PinnedTables
    first_day: int
    proven: dict[str, FileProof] = field(default_factory=dict)
    tasks: dict[str, FileScanTask] = field(default_factory=dict)
    removed: dict[str, RowSum] = field(default_factory=dict)


class Scope:
    """The files and offsets of one audit. `files` are those planned so far: their index is their number."""

    def __init__(self, proof: Proof | None = None) -> None:
        self.proof = proof
        self.files: list[FileRead] = []
        self.tables: dict[str, TableScope] = {}
        self._numbers: dict[str, int] = {}

    def limit(self, partitions: TopicPartitions) -> None:
        """Leave the proven offsets of an exchange out of its extents. Raises NotProvenError if a ledger went back."""
        if self.proof is None:
            return
        proven = self.proof.extents.get(partitions.pinned.exchange.name, {})
        if gone := proven.keys() - {log_name(partition) for partition in partitions}:
            raise NotProvenError(f"{partitions.pinned.exchange.name}: the ledgers lost {', '.join(sorted(gone))}")
        for partition in partitions:
            for layer in partitions.pinned.exchange.layers:
                if before := proven.get(log_name(partition), {}).get(layer.name):
                    held, was = partition.ledger_extent(layer), CommittedRange(*before)
                    if held.first != was.first or held.next < was.next or held.rows < was.rows:
                        raise NotProvenError(f"{partition}: the ledger of {layer.name} went back since")
                    partition.proven[layer] = was

    def plan(self, pinned: PinnedTables, layer: Layer, first_day: int, last_day: int | None = None) -> ReadPlan:
        """Return the files to read of a table, from `first_day` on: the new ones, and those that are pending."""
        whole, name = plan(pinned, layer, first_day, last_day), pinned.name(layer)
        known = self.proof.tables.get(name, {}) if self.proof else {}
        scope = TableScope(layer, pinned, first_day)
        read = []
        for task in whole.tasks:
            path = task.file.file_path
            before = known.get(path)
            if before:
                scope.proven[path], scope.tasks[path] = before, task
            if before is None or before.pending:
                read.append(task)
                self._numbers[path] = len(self.files)
                self.files.append(FileRead(name, path, partition_values(task.file), before is None))
        for path, file in known.items():
            if path not in scope.tasks and file.partition[0] >= first_day:
                for owner, its in file.sums.items():
                    scope.removed[owner] = scope.removed.get(owner, RowSum()).plus(its)
        self.tables[name] = scope
        rows = sum(task.file.record_count for task in read)
        return ReadPlan(layer, whole.table, read, whole.rows + whole.skipped_rows - rows)

    def number(self, path: str) -> int:
        """Return the number of a planned file; -1 for another."""
        return self._numbers.get(path, -1)

    def removed(self, table: str, owner: str = "") -> RowSum:
        """Return the sum of the rows of the proven files that are gone."""
        return self.tables[table].removed.get(owner, RowSum())

    def sample(self, share: float, seed: int) -> list[tuple[TableScope, list[FileScanTask]]]:
        """Return a random share of the proven files that this audit does not read, at least one, by table."""
        known = sorted(
            (t, path) for t, scope in self.tables.items() for path, f in scope.proven.items() if not f.pending
        )
        count = min(len(known), -int(-len(known) * share // 1))
        chosen = sorted(random.Random(seed).sample(known, count))
        return [
            (scope, [scope.tasks[path] for t, path in chosen if t == table])
            for table, scope in self.tables.items()
            if any(t == table for t, _ in chosen)
        ]


def log_name(partition: TopicPartition) -> str:
    """Return the name of one log of one partition, in a proof."""
    return f"{partition.topic_id}/{partition.partition}/{partition.log}"


def proven_before(partitions: Iterable[TopicPartition], layer: Layer) -> Ints:
    """Return the offset that the proven rows of a layer end before, by partition number; last, 0 for no partition."""
    return _by_number({each.number: _proven_next(each, layer) for each in partitions})


def compared_from(partitions: Iterable[TopicPartition]) -> Ints:
    """Return the first offset that any layer is yet to be compared at, by partition number, as `proven_before`."""
    return _by_number(
        {each.number: min(_proven_next(each, layer) for layer in each.pinned.exchange.layers) for each in partitions}
    )


def behind_from(partitions: Iterable[TopicPartition]) -> Ints:
    """Return the first offset that any layer does not hold yet, by partition number, as `proven_before`."""
    return _by_number(
        {
            each.number: min(each.ledger_extent(layer).next for layer in each.pinned.exchange.layers)
            for each in partitions
        }
    )


def identity(pinned: Sequence[PinnedTables]) -> str:
    """Return what must be the same for a proof to hold: tables, topics, accepted losses."""
    return json.dumps(
        [
            (
                each.exchange.name,
                [
                    (
                        each.name(layer),
                        str(table.metadata.table_uuid),
                        each.ledgers[layer].topic_id,
                        repr(each.ledgers[layer].former_topics),
                        repr(sorted(each.ledgers[layer].evidence.lost.items())),
                    )
                    for layer, table in each.tables.items()
                ],
            )
            for each in pinned
        ]
    )


def _proven_next(partition: TopicPartition, layer: Layer) -> int:
    proven = partition.proven.get(layer)
    return proven.next if proven else 0


def _by_number(values: dict[int, int]) -> Ints:
    found = np.zeros(max(values, default=-1) + 2, np.int64)
    for number, value in values.items():
        found[number] = value
    return found
