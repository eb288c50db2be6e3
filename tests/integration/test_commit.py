"""Commits to a real catalog: exactly once, fenced, reconciled after an unknown outcome, constant in cost."""

import pickle
import threading
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.serializers import FromInputFile, ToOutputFile
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update import RemoveSnapshotRefUpdate, RemoveSnapshotsUpdate, SetSnapshotRefUpdate
from sqlalchemy.exc import OperationalError

from k2flow.compat.pyiceberg import metadata_cache
from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.errors import AlreadyRunningError, CommitError, FencedError, HeadMovedError, OffsetGapError
from k2flow.exchange import find_exchange
from k2flow.failpoints import Point
from k2flow.iceberg import append, head
from k2flow.iceberg import commit as commits
from k2flow.iceberg import snapshots as snapshots_kept
from k2flow.iceberg.catalog import NAMESPACE, load_table
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import EVIDENCE_KEY, KEY, CommittedRange, Ledger, OffsetRange, Writer, read
from k2flow.iceberg.rewrite import rewrite_files
from k2flow.iceberg.snapshots import KEEP_SNAPSHOTS
from k2flow.iceberg.tables import create, definitions
from k2flow.iceberg.writer import DataFileWriter
from k2flow.maintain.storage import TableStorage, reachable_files

TABLE = "bronze_binance_trades"
TOPIC = "topic"


@pytest.fixture
def writer(catalog: Catalog) -> DataFileWriter:
    wanted = definitions(find_exchange("binance"))
    create(catalog, wanted.values())
    return DataFileWriter(load_table(catalog, TABLE), wanted[TABLE])


def rows(first: int, end: int) -> pa.RecordBatch:
    n, now = end - first, datetime.now(UTC)
    time = pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), n)
    columns = {
        "message_key": pa.repeat("k", n),
        "avro_payload": pa.repeat(b"payload", n),
        "topic": pa.repeat(TOPIC, n),
        "partition": pa.array(np.zeros(n, np.int32)),
        "offset": pa.array(np.arange(first, end)),
        "kafka_timestamp": time,
        "ingestion_timestamp": time,
        "ingestion_date": pa.repeat(pa.scalar(now.date(), pa.date32()), n),
    }
    return pa.RecordBatch.from_pydict(columns)


@pytest.fixture(autouse=True)
def as_in_a_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache metadata as a flow does, and restore the process afterwards."""
    for owner in (FromInputFile, ToOutputFile):
        monkeypatch.setattr(owner, "table_metadata", owner.table_metadata)
    install_metadata_cache()


def open_committer(catalog: Catalog) -> Committer:
    committer = Committer(catalog, TABLE, "binance", TOPIC)
    committer.fence("id")
    return committer


def offsets_in(catalog: Catalog) -> list[int]:
    return sorted(load_table(catalog, TABLE).scan().to_arrow()["offset"].to_pylist())


def test_rows_and_ledger_are_one_commit(catalog: Catalog, writer: DataFileWriter) -> None:
    committer = open_committer(catalog)
    files = pickle.loads(pickle.dumps(writer.write(rows(0, 5))))  # as from another process
    committer.commit(files, [OffsetRange(0, 0, 5, 5)])
    table = load_table(catalog, TABLE)
    ledger = read(table.properties, "binance", TOPIC)
    assert ledger.next_offset(0) == 5
    snapshot = table.current_snapshot()
    assert snapshot is not None
    assert snapshot.summary is not None
    assert snapshot.summary.additional_properties[KEY + "binance"] == ledger.to_json()
    assert offsets_in(catalog) == [0, 1, 2, 3, 4]


def test_offsets_without_rows_advance_the_ledger_without_a_snapshot(catalog: Catalog, writer: DataFileWriter) -> None:
    committer = open_committer(catalog)
    before = len(load_table(catalog, TABLE).snapshots())
    committer.commit([], [OffsetRange(0, 0, 5, 0)])
    table = load_table(catalog, TABLE)
    assert len(table.snapshots()) == before
    assert read(table.properties, "binance", TOPIC).next_offset(0) == 5


def test_gap_and_overlap_are_refused(catalog: Catalog, writer: DataFileWriter) -> None:
    committer = open_committer(catalog)
    committer.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])
    for first in (4, 6):
        with pytest.raises(OffsetGapError):
            committer.commit(writer.write(rows(first, 9)), [OffsetRange(0, first, 9, 9 - first)])
    assert offsets_in(catalog) == [0, 1, 2, 3, 4]


def test_fenced_committer_commits_nothing(catalog: Catalog, writer: DataFileWriter) -> None:
    old = open_committer(catalog)
    files = writer.write(rows(0, 5))
    new = open_committer(catalog)
    with pytest.raises(FencedError, match="writer epoch 2"):
        old.commit(files, [OffsetRange(0, 0, 5, 5)])
    with pytest.raises(FencedError):
        old.commit([], [OffsetRange(0, 0, 5, 0)])
    assert offsets_in(catalog) == []
    new.commit(files, [OffsetRange(0, 0, 5, 5)])
    assert offsets_in(catalog) == [0, 1, 2, 3, 4]


def test_flow_that_began_before_another_commit_must_start_again(catalog: Catalog, writer: DataFileWriter) -> None:
    """The rows that it has read (above all Gold's ids) may lack those of the commit. The other flow is fenced."""
    old = open_committer(catalog)
    began_with = read(load_table(catalog, TABLE).properties, "binance", TOPIC)
    old.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])
    new = Committer(catalog, TABLE, "binance", TOPIC)
    with pytest.raises(CommitError, match="has committed since this copy of the flow began"):
        new.fence("id", began_with)
    with pytest.raises(FencedError):
        old.commit(writer.write(rows(5, 9)), [OffsetRange(0, 5, 9, 4)])
    again = Committer(catalog, TABLE, "binance", TOPIC)
    again.fence("id", again.ledger)
    again.commit(writer.write(rows(5, 9)), [OffsetRange(0, 5, 9, 4)])
    assert offsets_in(catalog) == list(range(9))


def test_first_of_two_flows_to_fence_continues(catalog: Catalog, writer: DataFileWriter) -> None:
    one, other = (Committer(catalog, TABLE, "binance", TOPIC) for _ in range(2))
    late = Committer(catalog, TABLE, "binance", TOPIC)
    one.fence("id", one.ledger)
    with pytest.raises(FencedError, match="has fenced writer epoch 0"):
        other.fence("id", other.ledger)
    with pytest.raises(FencedError, match="has fenced writer epoch 0"):
        Committer(catalog, TABLE, "binance", TOPIC).fence("id", late.ledger)
    one.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])
    assert offsets_in(catalog) == list(range(5))


def test_error_names_another_running_copy(
    catalog: Catalog, writer: DataFileWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    import psutil

    parent = psutil.Process(os.getppid())
    other = Writer(Writer.this().host, parent.pid, parent.create_time())
    first = Committer(catalog, TABLE, "binance", TOPIC)
    monkeypatch.setattr(first, "_writer", other)
    first.fence("id")
    with pytest.raises(AlreadyRunningError, match=f"process {parent.pid}"):
        open_committer(catalog)


@pytest.mark.parametrize("landed", [True, False])
@pytest.mark.parametrize(
    "answer",
    [OperationalError("commit", {}, Exception("connection lost")), CommitFailedException("a proxy has repeated it")],
)
def test_unknown_commit_state_is_reconciled(
    catalog: Catalog,
    writer: DataFileWriter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: Exception,
    landed: bool,
) -> None:
    """A refusal leaves the state unknown too: the answer to the first request may be lost, and the second refused."""
    committer = open_committer(catalog)
    real = type(catalog).commit_table
    calls = 0

    def flaky(self: Catalog, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            if landed:
                real(self, *args, **kwargs)  # type: ignore[arg-type]
            raise answer
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(catalog), "commit_table", flaky)
    committer.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])
    committer.commit(writer.write(rows(5, 7)), [OffsetRange(0, 5, 7, 2)])
    assert offsets_in(catalog) == list(range(7))
    assert calls == (2 if landed else 3)
    table = load_table(catalog, TABLE)
    orphans = {path for path, _, _ in TableStorage(table).list_files()} - reachable_files(table)
    refused = isinstance(answer, CommitFailedException)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in logged if "OperationalError" in text and "trying again for" in text] == logged
    assert bool(logged) is not refused
    assert any(path.endswith(".avro") for path in orphans) is not (landed or refused)


def test_two_exchanges_commit_to_one_table(catalog: Catalog, writer: DataFileWriter) -> None:
    """Two flows share Gold: neither changes the other's ledger, and conflicting commits are repeated."""
    ours = open_committer(catalog)
    theirs = Committer(catalog, TABLE, "kraken", TOPIC)
    theirs.fence("id")
    for i in range(5):
        ours.commit(writer.write(rows(i, i + 1)), [OffsetRange(0, i, i + 1, 1)])
        theirs.commit(writer.write(rows(100 + i, 101 + i)), [OffsetRange(0, 100 + i, 101 + i, 1)])
    properties = load_table(catalog, TABLE).properties
    assert read(properties, "binance", TOPIC).next_offset(0) == 5
    assert read(properties, "kraken", TOPIC).next_offset(0) == 105
    assert offsets_in(catalog) == [*range(5), *range(100, 105)]


def test_lasting_conflict_is_a_clear_error(
    catalog: Catalog, writer: DataFileWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = open_committer(catalog)

    def refuse(*_: object, **__: object) -> object:
        raise CommitFailedException("always")

    monkeypatch.setattr(type(catalog), "commit_table", refuse)
    monkeypatch.setattr(commits, "RETRY_SECONDS", 0.2)
    with pytest.raises(CommitError, match="conflicting commits"):
        committer.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])


def test_frozen_catalog_is_a_clear_error(
    catalog: Catalog, writer: DataFileWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = open_committer(catalog)
    thawed = threading.Event()
    monkeypatch.setattr(type(catalog), "commit_table", lambda *_, **__: thawed.wait())
    monkeypatch.setattr(commits, "HUNG_SECONDS", 0.2)
    with pytest.raises(CommitError, match="has not answered for"):
        committer.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])
    thawed.set()
    assert offsets_in(catalog) == []


def test_metadata_stays_small(catalog: Catalog, writer: DataFileWriter) -> None:
    committer = open_committer(catalog)
    for i in range(KEEP_SNAPSHOTS + 25):
        committer.commit(writer.write(rows(i, i + 1)), [OffsetRange(0, i, i + 1, 1)])
    assert len(load_table(catalog, TABLE).snapshots()) <= KEEP_SNAPSHOTS + 10
    assert offsets_in(catalog) == list(range(KEEP_SNAPSHOTS + 25))


def test_snapshot_of_another_process_on_a_branch_is_no_conflict(catalog: Catalog, writer: DataFileWriter) -> None:
    """The head stays, but the next snapshot needs another sequence number."""
    committer = open_committer(catalog)
    committer.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])
    table = load_table(catalog, TABLE)
    head = table.current_snapshot()
    assert head is not None
    table.manage_snapshots().create_branch(head.snapshot_id, "looked-into").commit()
    table = load_table(catalog, TABLE)
    table.append(pa.Table.from_batches([rows(70, 71)]).cast(table.schema().as_arrow()), branch="looked-into")
    committer.commit(writer.write(rows(5, 9)), [OffsetRange(0, 5, 9, 4)])
    assert offsets_in(catalog) == list(range(9))


def test_snapshots_expired_by_another_process_during_a_commit(
    catalog: Catalog, writer: DataFileWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = open_committer(catalog)
    expired: list[int] = []

    def expire(point: Point) -> None:
        if point is Point.MANIFEST_WRITTEN and not expired:
            table = load_table(catalog, TABLE)
            if len(table.snapshots()) >= commits.EXPIRE_AT:
                expired.extend(snapshot.snapshot_id for snapshot in table.snapshots()[:5])
                table._do_commit((RemoveSnapshotsUpdate.model_validate({"snapshot-ids": expired}),), ())

    monkeypatch.setattr(commits, "reach", expire)
    for i in range(commits.EXPIRE_AT + 2):
        committer.commit(writer.write(rows(i, i + 1)), [OffsetRange(0, i, i + 1, 1)])
    assert expired
    assert offsets_in(catalog) == list(range(commits.EXPIRE_AT + 2))


def test_cached_metadata_equals_its_file(catalog: Catalog, writer: DataFileWriter) -> None:
    committer = open_committer(catalog)
    held = {}
    for i in range(KEEP_SNAPSHOTS + 12):  # enough to expire old snapshots
        committer.commit(writer.write(rows(i, i + 1)), [OffsetRange(0, i, i + 1, 1)])
        table = load_table(catalog, TABLE)
        held[table.metadata_location] = table.metadata
    parse = metadata_cache._read
    for location, metadata in held.items():
        assert parse(committer._table.io.new_input(location)) == metadata


def test_manifests_stay_few_and_small(
    catalog: Catalog, writer: DataFileWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append, "MANIFEST_BYTES", 40_000)
    committer = open_committer(catalog)
    for i in range(60):
        committer.commit(writer.write(rows(i, i + 1)), [OffsetRange(0, i, i + 1, 1)])
    table = load_table(catalog, TABLE)
    snapshot = table.current_snapshot()
    assert snapshot is not None
    manifests = snapshot.manifests(table.io)
    assert len(manifests) < 20
    assert max(manifest.manifest_length for manifest in manifests) <= 40_000


def ledger_of(catalog: Catalog, exchange: str = "binance") -> Ledger:
    return read(load_table(catalog, TABLE).properties, exchange, TOPIC)


def commits_of(catalog: Catalog, writer: DataFileWriter, count: int) -> tuple[Committer, list[int]]:
    """Commit five offsets each time. Return the committer and the snapshot after each commit."""
    committer, snapshots = open_committer(catalog), []
    for i in range(count):
        committer.commit(writer.write(rows(5 * i, 5 * i + 5)), [OffsetRange(0, 5 * i, 5 * i + 5, 5)])
        snapshots.append(head_of(catalog))
    return committer, snapshots


def head_of(catalog: Catalog) -> int:
    head = load_table(catalog, TABLE).metadata.current_snapshot_id
    assert head is not None
    return head


def move_head(catalog: Catalog, snapshot: int) -> None:
    """Move main as `rollback_to_snapshot`, `set_current_snapshot` and `replace_branch` of other engines do."""
    update = {"ref-name": "main", "type": "branch", "snapshot-id": snapshot}
    load_table(catalog, TABLE)._do_commit((SetSnapshotRefUpdate.model_validate(update),), ())


BOTH_ENDS = r"topic\[0\]: the ledger ends before offset 15 \(15 rows\), the head's snapshot ends before offset 10 "


def test_moved_head_stops_the_start_and_every_commit(catalog: Catalog, writer: DataFileWriter) -> None:
    committer, snapshots = commits_of(catalog, writer, 3)
    files = writer.write(rows(15, 20))
    move_head(catalog, snapshots[1])
    with pytest.raises(HeadMovedError, match=BOTH_ENDS) as stopped:
        committer.commit(files, [OffsetRange(0, 15, 20, 5)])
    assert "K2FLOW_BINANCE_AFTER_ROLLBACK=reread" in str(stopped.value)
    assert "K2FLOW_BINANCE_AFTER_ROLLBACK=accept" in str(stopped.value)
    with pytest.raises(HeadMovedError, match=BOTH_ENDS):
        committer.commit([], [OffsetRange(0, 15, 20, 0)])
    with pytest.raises(HeadMovedError, match=BOTH_ENDS):
        Committer(catalog, TABLE, "binance", TOPIC)
    assert offsets_in(catalog) == list(range(10))
    move_head(catalog, snapshots[2])  # back again: nothing is lost
    open_committer(catalog).commit(files, [OffsetRange(0, 15, 20, 5)])
    assert offsets_in(catalog) == list(range(20))


@pytest.fixture
def few_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expire snapshots as early as twenty commits show it."""
    monkeypatch.setattr(snapshots_kept, "KEEP_SNAPSHOTS", 10)
    monkeypatch.setattr(commits, "EXPIRE_AT", 12)
    monkeypatch.setattr(head, "CARRY_AFTER", 5)


@pytest.mark.usefixtures("few_snapshots")
def test_moved_head_under_foreign_commits_stops_the_flow(catalog: Catalog, writer: DataFileWriter) -> None:
    """Another exchange writes on the moved head, and the moved snapshots expire."""
    committer, snapshots = commits_of(catalog, writer, 3)
    move_head(catalog, snapshots[1])
    theirs = Committer(catalog, TABLE, "kraken", TOPIC)
    theirs.fence("id")
    for i in range(25):
        theirs.commit(writer.write(rows(100 + i, 101 + i)), [OffsetRange(0, 100 + i, 101 + i, 1)])
    assert load_table(catalog, TABLE).metadata.snapshot_by_id(snapshots[2]) is None
    with pytest.raises(HeadMovedError, match=BOTH_ENDS):
        committer.commit([], [OffsetRange(0, 15, 20, 0)])


@pytest.mark.usefixtures("few_snapshots")
@pytest.mark.parametrize("foreign", ["expiry", "compaction", "delete", "append", "other exchange"])
@pytest.mark.parametrize("evidence", [True, False])
def test_what_others_may_do_is_no_moved_head(
    catalog: Catalog, writer: DataFileWriter, foreign: str, evidence: bool
) -> None:
    """`evidence`: the table is of this version. Offsets without rows came last, so no snapshot has the ledger."""
    committer, snapshots = commits_of(catalog, writer, 3)
    committer.commit([], [OffsetRange(0, 15, 17, 0)])
    if not evidence:
        remove_property(catalog, EVIDENCE_KEY + "binance")
    table = load_table(catalog, TABLE)
    if foreign == "expiry":
        ids = [each.snapshot_id for each in table.snapshots() if each.snapshot_id != head_of(catalog)]
        table._do_commit((RemoveSnapshotsUpdate.model_validate({"snapshot-ids": ids}),), ())
    elif foreign == "compaction":
        files = [task.file.file_path for task in table.scan().plan_files()]
        assert rewrite_files(catalog, TABLE, Operation.REPLACE, files, writer.write(rows(0, 15)), 0)
    elif foreign == "delete":
        table.delete("offset < 3")
    elif foreign == "append":
        table.append(pa.Table.from_batches([rows(70, 71)]).cast(table.schema().as_arrow()))
    else:
        theirs = Committer(catalog, TABLE, "kraken", TOPIC)
        theirs.fence("id")
        for i in range(25):
            theirs.commit(writer.write(rows(100 + i, 101 + i)), [OffsetRange(0, 100 + i, 101 + i, 1)])
        assert load_table(catalog, TABLE).metadata.snapshot_by_id(snapshots[2]) is None
    again = open_committer(catalog)
    again.commit(writer.write(rows(17, 20)), [OffsetRange(0, 17, 20, 3)])
    assert ledger_of(catalog).partitions == {0: CommittedRange(0, 20, 18)}


def remove_property(catalog: Catalog, key: str) -> None:
    with load_table(catalog, TABLE).transaction() as transaction:
        transaction.remove_properties(key)


@pytest.mark.parametrize("evidence", [True, False])
def test_moved_head_is_read_again_or_accepted(catalog: Catalog, writer: DataFileWriter, evidence: bool) -> None:
    _, snapshots = commits_of(catalog, writer, 3)
    move_head(catalog, snapshots[1])
    if not evidence:  # an earlier version has written it
        remove_property(catalog, EVIDENCE_KEY + "binance")
    accepting = Committer(catalog, TABLE, "binance", TOPIC, after_rollback="accept")
    assert accepting.ledger.partitions == {0: CommittedRange(0, 15, 10)}
    assert accepting.ledger.evidence.lost == {0: ((10, 15),)}
    rereading = Committer(catalog, TABLE, "binance", TOPIC, after_rollback="reread")
    rereading.fence("id", rereading.ledger)
    rereading.commit(writer.write(rows(10, 20)), [OffsetRange(0, 10, 20, 10)])
    assert offsets_in(catalog) == list(range(20))
    assert ledger_of(catalog).writer_epoch == 2
    Committer(catalog, TABLE, "binance", TOPIC)


def test_edited_ledger_stops_the_flow(catalog: Catalog, writer: DataFileWriter) -> None:
    """Its property is put back, or removed: the flow would write rows again that the table has."""
    committer = open_committer(catalog)
    committer.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])
    old = load_table(catalog, TABLE).properties[KEY + "binance"]
    committer.commit(writer.write(rows(5, 9)), [OffsetRange(0, 5, 9, 4)])
    with load_table(catalog, TABLE).transaction() as transaction:
        transaction.set_properties({KEY + "binance": old})
    with pytest.raises(
        HeadMovedError, match=r"ledger ends before offset 5 .*, the head's snapshot ends before offset 9"
    ):
        Committer(catalog, TABLE, "binance", TOPIC)
    for choice in ("reread", "accept"):
        held = Committer(catalog, TABLE, "binance", TOPIC, after_rollback=choice)  # type: ignore[arg-type]
        assert held.ledger.partitions == {0: CommittedRange(0, 9, 9)}
    remove_property(catalog, KEY + "binance")
    with pytest.raises(HeadMovedError, match="ledger has no offsets, the head's snapshot ends before offset 9"):
        Committer(catalog, TABLE, "binance", TOPIC)
    for choice in ("reread", "accept"):
        held = Committer(catalog, TABLE, "binance", TOPIC, after_rollback=choice)  # type: ignore[arg-type]
        assert (held.ledger.topic_id, held.ledger.partitions) == ("id", {0: CommittedRange(0, 9, 9)})


def test_restored_metadata_ends_the_running_flow_and_is_read_again(catalog: Catalog, writer: DataFileWriter) -> None:
    committer = open_committer(catalog)
    committer.commit(writer.write(rows(0, 5)), [OffsetRange(0, 0, 5, 5)])
    before = load_table(catalog, TABLE).metadata_location
    committer.commit(writer.write(rows(5, 9)), [OffsetRange(0, 5, 9, 4)])
    catalog.drop_table((NAMESPACE, TABLE))
    catalog.register_table((NAMESPACE, TABLE), before)
    with pytest.raises(CommitError, match="was restored from an earlier metadata file"):
        committer.commit(writer.write(rows(9, 12)), [OffsetRange(0, 9, 12, 3)])
    open_committer(catalog).commit(writer.write(rows(5, 12)), [OffsetRange(0, 5, 12, 7)])
    assert offsets_in(catalog) == list(range(12))


def test_replaced_table_has_no_rows_to_read_again(catalog: Catalog, writer: DataFileWriter) -> None:
    """Another engine has begun a new history with rows of unknown offsets: only accepting can help."""
    commits_of(catalog, writer, 2)
    table = load_table(catalog, TABLE)
    table.manage_snapshots().create_branch(head_of(catalog), "kept").commit()
    table._do_commit((RemoveSnapshotRefUpdate.model_validate({"ref-name": "main"}),), ())
    table = load_table(catalog, TABLE)
    table.append(pa.Table.from_batches([rows(0, 10)]).cast(table.schema().as_arrow()))
    for choice in ("stop", "reread"):
        with pytest.raises(HeadMovedError, match=r"before offset 10 .*, the head's snapshot has no offsets"):
            Committer(catalog, TABLE, "binance", TOPIC, after_rollback=choice)  # type: ignore[arg-type]


def test_rows_of_another_exchange_do_not_hinder_reading_again(catalog: Catalog, writer: DataFileWriter) -> None:
    """Main is set back to before an exchange's first commit: what the table holds is known to be another one's."""
    _, snapshots = commits_of(catalog, writer, 2)
    theirs = Committer(catalog, TABLE, "kraken", TOPIC)
    theirs.fence("id")
    theirs.commit(writer.write(rows(50, 55)), [OffsetRange(0, 50, 55, 5)])
    move_head(catalog, snapshots[-1])
    with pytest.raises(HeadMovedError, match="the head's snapshot has no offsets"):
        Committer(catalog, TABLE, "kraken", TOPIC)
    assert Committer(catalog, TABLE, "kraken", TOPIC, after_rollback="reread").ledger.partitions == {}
    assert Committer(catalog, TABLE, "binance", TOPIC).ledger.partitions == {0: CommittedRange(0, 10, 10)}


def test_picked_snapshot_is_not_read_again(catalog: Catalog, writer: DataFileWriter) -> None:
    """Another engine has picked some of the rows back: to read from the head's copy on would duplicate them."""
    _, snapshots = commits_of(catalog, writer, 3)
    move_head(catalog, snapshots[0])
    table = load_table(catalog, TABLE)
    picked = pa.Table.from_batches([rows(10, 15)]).cast(table.schema().as_arrow())
    table.append(picked, snapshot_properties={"source-snapshot-id": str(snapshots[2])})
    with pytest.raises(HeadMovedError, match="set main to the snapshot that it had"):
        Committer(catalog, TABLE, "binance", TOPIC, after_rollback="reread")
    assert offsets_in(catalog) == [*range(5), *range(10, 15)]
