"""Plans of maintenance: retention, compaction, expired snapshots, orphan files."""

from datetime import UTC, date, datetime, timedelta

import pytest
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.table.metadata import TableMetadata, TableMetadataV2
from pyiceberg.table.refs import SnapshotRef, SnapshotRefType
from pyiceberg.table.snapshots import Operation, Snapshot, Summary
from pyiceberg.typedef import Record

from k2flow.exchange import find_exchange
from k2flow.iceberg.snapshots import KEEP_SNAPSHOTS, plan_expiration, readers_tag
from k2flow.iceberg.tables import definitions
from k2flow.maintain.plans import HOT_FILES, UNIX_EPOCH, LiveFile, expired_files, orphan_files, plan_compactions

MIB = 1 << 20
TODAY = date(2026, 3, 10)
NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)


def live(day: date, size: int = MIB, hour: int | None = None, lower: int = 0, name: str = "f") -> LiveFile:
    days = (day - UNIX_EPOCH).days
    partition = (days,) if hour is None else (days, hour)
    file = DataFile.from_args(
        content=DataFileContent.DATA,
        file_path=name,
        file_format=FileFormat.PARQUET,
        partition=Record(*partition),
        record_count=10,
        file_size_in_bytes=size,
    )
    return LiveFile(file, partition, lower)


def test_retention_is_exact_to_the_day() -> None:
    files = [live(TODAY - timedelta(days=n)) for n in range(20)]
    today = (TODAY - UNIX_EPOCH).days
    assert [each.day for each in expired_files(files, 7, TODAY)] == [today - n for n in range(8, 20)]
    assert expired_files(files, None, TODAY) == []


def test_closed_partition_keeps_at_most_one_small_file() -> None:
    yesterday = TODAY - timedelta(days=1)
    files = [live(yesterday, name="a"), live(yesterday, 64 * MIB, name="b"), live(yesterday, 30 * MIB, name="c")]
    (plan,) = plan_compactions(files, 128 * MIB, NOON)
    assert {each.file.file_path for each in plan.files} == {"a", "c"}
    assert plan_compactions(files[:2], 128 * MIB, NOON) == []


@pytest.mark.parametrize(("hour", "closed"), [(9, True), (10, True), (11, False), (12, False)])
def test_hour_closes_one_hour_after_its_end(hour: int, closed: bool) -> None:
    assert bool(plan_compactions([live(TODAY, hour=hour)] * 2, 128 * MIB, NOON)) is closed


def test_open_partition_waits_for_many_files() -> None:
    assert plan_compactions([live(TODAY)] * (HOT_FILES - 1), 128 * MIB, NOON) == []
    (plan,) = plan_compactions([live(TODAY)] * HOT_FILES, 128 * MIB, NOON)
    assert len(plan.files) == HOT_FILES


def test_large_partition_becomes_several_files_by_time() -> None:
    yesterday = TODAY - timedelta(days=1)
    files = [live(yesterday, 10 * MIB, lower=-n, name=str(n)) for n in range(100)]
    plan = plan_compactions(files, 100 * MIB, NOON)
    assert [each.file.file_path for one in plan for each in one.files] == [str(n) for n in range(99, -1, -1)]
    assert all(50 * MIB <= 10 * MIB * len(one.files) < 160 * MIB for one in plan)
    assert len(plan) == 10


def metadata(snapshots: int, refs: dict[str, int]) -> TableMetadata:
    definition = definitions(find_exchange("binance"))["gold_crypto_trades"]
    created = [
        Snapshot(
            snapshot_id=n,
            sequence_number=n,
            timestamp_ms=n,
            manifest_list=f"{n}.avro",
            summary=Summary(Operation.APPEND),
        )
        for n in range(1, snapshots + 1)
    ]
    tags = {name: SnapshotRef(snapshot_id=n, snapshot_ref_type=SnapshotRefType.TAG) for name, n in refs.items()}
    main = SnapshotRef(snapshot_id=snapshots, snapshot_ref_type=SnapshotRefType.BRANCH)
    return TableMetadataV2(
        location="file:///nowhere",
        last_updated_ms=0,
        last_column_id=20,
        schemas=[definition.schema],
        current_schema_id=definition.schema.schema_id,
        partition_specs=[definition.spec],
        default_spec_id=0,
        last_partition_id=1001,
        sort_orders=[definition.sort_order],
        default_sort_order_id=1,
        last_sequence_number=snapshots,
        current_snapshot_id=snapshots,
        snapshots=created,
        refs={"main": main, **tags},
    )


def test_newest_snapshots_and_heads_of_refs_stay() -> None:
    young, old = readers_tag(9_000, 4), readers_tag(1_000, 5)
    plan = plan_expiration(metadata(150, {"users": 3, young: 4, old: 5}), tags_before_ms=5_000)
    assert plan.tags == (old,)
    assert plan.snapshot_ids == (1, 2, *range(5, 150 - KEEP_SNAPSHOTS + 1))
    assert plan_expiration(metadata(KEEP_SNAPSHOTS, {}), 10_000).snapshot_ids == ()


def test_orphan_files_are_old_and_unreachable() -> None:
    listed = [("reachable", 1, 0.0), ("young", 2, 950.0), ("old", 3, 10.0)]
    assert orphan_files(listed, {"reachable"}, now=1_000, orphan_seconds=100) == [("old", 3)]


@pytest.mark.parametrize("ahead", [0, 59, 600, 1e9])
def test_clock_ahead_of_the_storage_deletes_no_file_too_early(ahead: float) -> None:
    listed = [("metadata of the lease", 1, 10_000.0), ("young", 2, 9_900.0), ("old", 3, 9_800.0)]
    assert orphan_files(listed, {"metadata of the lease"}, now=10_000 + ahead, orphan_seconds=165) == [("old", 3)]
    assert orphan_files(listed, set(), now=9_000, orphan_seconds=165) == []
    assert orphan_files([], set(), now=9_000, orphan_seconds=165) == []
