"""Which snapshots a table keeps: one rule, for commits and for maintenance."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from pyiceberg.table.metadata import TableMetadata

KEEP_SNAPSHOTS = 100
_READERS_TAG = re.compile(r"k2flow-readers-(\d+)-\d+")


def readers_tag(at_ms: int, snapshot_id: int | None) -> str:
    """The name of a tag that keeps the files of a snapshot, some of them replaced since, for who still reads it."""
    return f"k2flow-readers-{at_ms}-{snapshot_id}"


@dataclass(frozen=True)
class Expiry:
    """Snapshots and tags to drop from a table's metadata. Their files go when nothing else reaches them."""

    snapshot_ids: tuple[int, ...]
    tags: tuple[str, ...]


def superfluous_snapshots(metadata: TableMetadata, dropped_refs: Collection[str] = ()) -> list[int]:
    """Return the ids of all snapshots but the newest KEEP_SNAPSHOTS and the heads of the branches and tags that stay."""
    named = {ref.snapshot_id for name, ref in metadata.refs.items() if name not in dropped_refs}
    newest = sorted(metadata.snapshots, key=lambda snapshot: snapshot.sequence_number or 0)
    return [s.snapshot_id for s in newest[:-KEEP_SNAPSHOTS] if s.snapshot_id not in named]


def expiry(metadata: TableMetadata, now_ms: int, reader_ms: int) -> Expiry:
    """Drops maintenance's tags that are older than `reader_ms`, and then all snapshots but those that anything needs:

    the newest KEEP_SNAPSHOTS, and the heads of the branches and tags that are left.
    """
    tags = tuple(
        name for name in metadata.refs if (made := _READERS_TAG.fullmatch(name)) and now_ms - int(made[1]) > reader_ms
    )
    return Expiry(tuple(superfluous_snapshots(metadata, tags)), tags)
