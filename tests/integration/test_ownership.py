"""Maintenance deletes only what is provably the table's own, and no table is created over a lost one."""

import gzip
import itertools
import json
import shutil
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.table import Table
from typer.testing import CliRunner

from k2flow.cli.commands import app
from k2flow.config.settings import load_settings
from k2flow.errors import LostTableError, MaintenanceError
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import NAMESPACE, default_properties, load_table, open_catalog
from k2flow.iceberg.commit import STAGED_BRANCH, Committer
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.metadata_files import canonical_folder, overlap
from k2flow.iceberg.rewrite import set_property
from k2flow.iceberg.tables import create, definitions, gold_definition
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.actions import Timing
from k2flow.maintain.run import MaintenanceRun
from k2flow.maintain.storage import TableStorage

BINANCE = find_exchange("binance")
NOW = Timing(orphan_seconds=-1, reader_seconds=-1)
GOLD = gold_definition()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def append(catalog: Catalog, rows: int = 1, exchange: str = "binance") -> None:
    """Append rows to Gold, a file each, as a flow does."""
    committer = Committer(catalog, GOLD_TABLE, exchange, BINANCE.settings.topic)
    if committer.ledger.writer is None:
        committer.fence("id")
    writer = DataFileWriter(load_table(catalog, GOLD_TABLE), GOLD)
    for _ in range(rows):
        at = datetime(2026, 3, 14, 12, tzinfo=UTC)
        row = {"message_id": uuid.uuid4().hex, "timestamp": at, "exchange_date": at.date(), "exchange_hour": 12}
        begin = committer.ledger.next_offset(0) or 0
        files = writer.write(pa.RecordBatch.from_pylist([row], GOLD.arrow_schema))
        committer.commit(files, [OffsetRange(0, begin, begin + 1, 1)])


def another_catalog(home: Path, name: str = "other") -> Catalog:
    properties = {**default_properties(home), "uri": f"sqlite:///{home / name}.db"}
    catalog = load_catalog("k2flow", **properties)
    catalog.create_namespace_if_not_exists(NAMESPACE)
    return catalog


def table_at(catalog: Catalog, location: str, **properties: str) -> None:
    """Create Gold at a location, as a former version of k2flow or another program does."""
    catalog.create_namespace_if_not_exists(NAMESPACE)
    catalog.create_table(
        (NAMESPACE, GOLD_TABLE),
        GOLD.schema,
        location=location,
        partition_spec=GOLD.spec,
        sort_order=GOLD.sort_order,
        properties={"format-version": "2", **GOLD.properties, **properties},
    )


def rows_of(table: Table) -> int:
    """Read all rows of all snapshots; return those of the newest."""
    for snapshot in table.metadata.snapshots:
        table.scan(snapshot_id=snapshot.snapshot_id).to_arrow()
    return len(table.scan().to_arrow())


def maintain(catalog: Catalog) -> None:
    """Maintain Gold as old as everything in it is an orphan at once."""
    list(MaintenanceRun(catalog, GOLD, NOW).run())


def shared_folder(catalog: Catalog, home: Path) -> Catalog:
    """Give two catalogs a table with rows each, both in one folder. Return the other catalog."""
    other, location = another_catalog(home), f"file://{home}/warehouse/shared"
    table_at(catalog, location)
    table_at(other, location)
    append(catalog)
    append(other)
    return other


def orphan(table: Table, folder: str = "data") -> Path:
    """Leave a file of the table that no snapshot names."""
    path = Path(canonical_folder(table.location()).removeprefix("file:")) / folder / f"{uuid.uuid4()}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"PAR1")
    return path


def test_new_tables_have_a_location_of_their_own(catalog: Catalog) -> None:
    create(catalog, definitions(BINANCE).values())
    found = {name: load_table(catalog, name).location() for name in definitions(BINANCE)}
    for name, location in found.items():
        assert uuid.UUID(location.rsplit(f"{name}-", 1)[1])
    assert len(set(found.values())) == 4
    folders = list(map(canonical_folder, found.values()))
    assert not any(overlap(one, other) for one, other in itertools.combinations(folders, 2))


class TestLostCatalog:
    """The catalog's database is deleted; the warehouse stays."""

    def test_no_table_is_created(self, catalog: Catalog, home: Path) -> None:
        create(catalog, [GOLD])
        append(catalog, 3)
        metadata = load_table(catalog, GOLD_TABLE).metadata_location
        (home / "catalog.db").unlink()
        after = open_catalog(load_settings(exchange_names()))
        with pytest.raises(LostTableError, match="ACCEPT_LOST_TABLES=1") as caught:
            create(after, [GOLD])
        assert metadata in str(caught.value)
        assert after.list_tables(NAMESPACE) == []
        result = CliRunner().invoke(app, ["tables", "create", "binance"])
        assert result.exit_code == 1
        after.register_table((NAMESPACE, GOLD_TABLE), metadata)
        create(after, definitions(BINANCE).values())
        assert rows_of(load_table(after, GOLD_TABLE)) == 3

    def test_documented_recovery_registers_each_table(self, catalog: Catalog, home: Path) -> None:
        """Of Gold the newest state, although a loss was accepted before, and a former version's folder is older."""
        for location, rows in (f"file://{home}/warehouse/{NAMESPACE}/{GOLD_TABLE}", 1), (None, 2), (None, 3):
            if location:
                table_at(catalog, location)
            else:
                create(catalog, definitions(BINANCE).values(), accept_lost=True)
            append(catalog, rows)
            (home / "catalog.db").unlink()
            catalog = open_catalog(load_settings(exchange_names()))
        text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
        (code,) = [block for block in text.split("```python\n")[1:] if "register_table" in block.split("```")[0]]
        for _ in range(2):
            exec(code.split("```")[0], {})
        assert rows_of(load_table(catalog, GOLD_TABLE)) == 3
        create(catalog, definitions(BINANCE).values())

    def test_accepted_loss_leaves_the_old_files(
        self, catalog: Catalog, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create(catalog, [GOLD])
        append(catalog, 3)
        old = load_table(catalog, GOLD_TABLE).metadata_location
        (home / "catalog.db").unlink()
        monkeypatch.setenv("K2FLOW_ACCEPT_LOST_TABLES", "1")
        assert CliRunner().invoke(app, ["tables", "create", "binance"]).exit_code == 0
        after = open_catalog(load_settings(exchange_names()))
        append(after, 4)
        maintain(after)
        restored = another_catalog(home)
        assert rows_of(restored.register_table((NAMESPACE, GOLD_TABLE), old)) == 3
        assert rows_of(load_table(after, GOLD_TABLE)) == 4

    def test_tables_of_former_versions_share_their_folder(self, catalog: Catalog, home: Path) -> None:
        """A former version made new tables in the old folders: both tables live in one."""
        location = f"file://{home}/warehouse/{NAMESPACE}/{GOLD_TABLE}"
        table_at(catalog, location)
        append(catalog, 4)
        old = load_table(catalog, GOLD_TABLE).metadata_location
        (home / "catalog.db").unlink()
        after = open_catalog(load_settings(exchange_names()))
        table_at(after, location)
        append(after, 2)
        own = orphan(load_table(after, GOLD_TABLE))
        maintain(after)
        assert not own.exists()  # what no metadata reaches is still deleted
        assert rows_of(another_catalog(home).register_table((NAMESPACE, GOLD_TABLE), old)) == 4
        assert rows_of(load_table(after, GOLD_TABLE)) == 2

    def test_empty_table_loses_nothing(self, catalog: Catalog, home: Path) -> None:
        create(catalog, [GOLD])
        (home / "catalog.db").unlink()
        assert create(open_catalog(load_settings(exchange_names())), [GOLD]) == {GOLD_TABLE: "created"}

    def test_renamed_table_is_not_lost(self, catalog: Catalog) -> None:
        create(catalog, [GOLD])
        append(catalog)
        catalog.rename_table((NAMESPACE, GOLD_TABLE), (NAMESPACE, "old_gold"))
        assert create(catalog, [GOLD]) == {GOLD_TABLE: "created"}

    def test_damaged_metadata_counts_as_a_table(self, catalog: Catalog, home: Path) -> None:
        create(catalog, [GOLD])
        append(catalog)
        path = Path(load_table(catalog, GOLD_TABLE).metadata_location.removeprefix("file://"))
        path.write_bytes(path.read_bytes()[:100])
        (home / "catalog.db").unlink()
        with pytest.raises(LostTableError):
            create(open_catalog(load_settings(exchange_names())), [GOLD])

    def test_table_above_the_warehouse_is_noticed(self, catalog: Catalog, home: Path) -> None:
        table_at(other := another_catalog(home), f"file://{home}/warehouse")
        append(other)
        with pytest.raises(LostTableError):
            create(catalog, [GOLD])


class TestOverlap:
    """Another table of the catalog has a folder in, or above, one of the table's."""

    @pytest.mark.parametrize(
        "variant",
        [
            "{}",
            "{}/",
            "{}/data",
            "{}/data/nested",
            "{}/metadata",
            "{}/../",
            "{slash}",
            "{single}",
            "{link}",
            "{escaped}",
        ],
    )
    def test_overlapping_location_is_refused(self, catalog: Catalog, home: Path, variant: str) -> None:
        create(catalog, [GOLD])
        append(catalog, 4)
        table = load_table(catalog, GOLD_TABLE)
        path = table.location().removeprefix("file://")
        (home / "link").symlink_to(path)
        spelled = {
            "slash": f"file://{path.replace('/market_data/', '//market_data/')}",
            "single": f"file:{path}",
            "link": f"file://{home}/link",
            "escaped": f"file://{path.replace('gold', '%67old')}",
        }
        location = variant.format(f"file://{path}", **spelled)
        catalog.create_namespace("theirs")
        made = catalog.create_table(("theirs", "t"), GOLD.schema, location=f"file://{home}/elsewhere")
        _move(catalog, home, made, location)
        lost = orphan(table)
        with pytest.raises(
            MaintenanceError, match=r"table theirs\.t in .* has the same folder or one inside the other"
        ):
            maintain(catalog)
        assert lost.exists()

    @pytest.mark.parametrize("key", ["write.data.path", "write.metadata.path"])
    def test_overlapping_path_property_is_refused(self, catalog: Catalog, home: Path, key: str) -> None:
        create(catalog, [GOLD])
        append(catalog, 2)
        table = load_table(catalog, GOLD_TABLE)
        path = {key: f"{table.location()}/data/theirs"}
        catalog.create_table((NAMESPACE, "theirs"), GOLD.schema, location=f"file://{home}/elsewhere", properties=path)
        lost = orphan(table)
        with pytest.raises(MaintenanceError, match=r"theirs in .*elsewhere"):
            maintain(catalog)
        assert lost.exists()

    def test_the_other_tables_are_still_maintained(self, catalog: Catalog, home: Path) -> None:
        create(catalog, definitions(BINANCE).values())
        append(catalog, 2)
        gold, silver = load_table(catalog, GOLD_TABLE), load_table(catalog, BINANCE.silver)
        catalog.create_table((NAMESPACE, "theirs"), GOLD.schema, location=f"{gold.location()}/data")
        kept, deleted = orphan(gold), orphan(silver)
        result = CliRunner().invoke(app, ["maintain", "--orphan-older-than", "0s"])
        assert result.exit_code == 1
        assert (kept.exists(), deleted.exists()) == (True, False)

    def test_sibling_with_a_longer_name_does_not_overlap(self, catalog: Catalog) -> None:
        create(catalog, [GOLD])
        append(catalog)
        table = load_table(catalog, GOLD_TABLE)
        catalog.create_table((NAMESPACE, "theirs"), GOLD.schema, location=f"{table.location()}-2")
        lost = orphan(table)
        maintain(catalog)
        assert not lost.exists()


class TestTwoCatalogs:
    """Two catalogs on one warehouse."""

    def test_each_has_its_own_tables(self, catalog: Catalog, home: Path) -> None:
        other = another_catalog(home)
        for each in (catalog, other):
            create(each, [GOLD], accept_lost=True)
            append(each, 4)
        for each in (catalog, other):
            maintain(each)
        for each in (catalog, other):
            assert rows_of(load_table(each, GOLD_TABLE)) == 4

    @pytest.mark.parametrize("nested", ["", "/data", "/data/deep", "/metadata"])
    def test_table_of_the_other_in_the_same_folder_is_spared(self, catalog: Catalog, home: Path, nested: str) -> None:
        location = f"file://{home}/warehouse/shared"
        other = another_catalog(home)
        table_at(catalog, location)
        table_at(other, location + nested)
        for each in (catalog, other, catalog, other):
            append(each, 2)
        for each in (catalog, other):
            maintain(each)
            append(each, 2)
            maintain(each)
        for each in (catalog, other):
            assert rows_of(load_table(each, GOLD_TABLE)) == 6

    def test_same_table_in_both_is_refused(self, catalog: Catalog, home: Path) -> None:
        create(catalog, [GOLD])
        append(catalog, 2)
        other = another_catalog(home)
        other.register_table((NAMESPACE, GOLD_TABLE), load_table(catalog, GOLD_TABLE).metadata_location)
        append(catalog, 3)
        append(other, 3, "kraken")
        lost = orphan(load_table(catalog, GOLD_TABLE))
        for each in (catalog, other):
            with pytest.raises(MaintenanceError, match=r"\d metadata files .* another catalog commits to the table"):
                maintain(each)
            assert rows_of(load_table(each, GOLD_TABLE)) == 5
        assert lost.exists()

    def test_catalog_of_an_older_copy_is_refused(self, catalog: Catalog, home: Path) -> None:
        create(catalog, [GOLD])
        append(catalog, 2)
        shutil.copy(home / "catalog.db", home / "copy.db")
        append(catalog, 3)
        newest = load_table(catalog, GOLD_TABLE).metadata_location
        shutil.copy(home / "copy.db", home / "catalog.db")
        before = open_catalog(load_settings(exchange_names()))
        orphan(load_table(before, GOLD_TABLE))
        with pytest.raises(MaintenanceError, match="the catalog is an older copy"):
            maintain(before)
        assert rows_of(another_catalog(home).register_table((NAMESPACE, GOLD_TABLE), newest)) == 5

    def test_staged_rows_of_the_other_are_spared(self, catalog: Catalog, home: Path) -> None:
        other = shared_folder(catalog, home)
        table = load_table(other, GOLD_TABLE)
        table.manage_snapshots().create_branch(table.current_snapshot().snapshot_id, f"{STAGED_BRANCH}x-1").commit()
        lost = orphan(load_table(catalog, GOLD_TABLE))
        with pytest.raises(MaintenanceError, match="are being replaced"):
            maintain(catalog)
        assert lost.exists()


class TestOwnHistory:
    """What only the table's own former metadata reach has expired."""

    @pytest.mark.parametrize(("kept", "commits"), [(10, 35), (1, 5)])
    def test_history_is_deleted_however_long_it_is(self, catalog: Catalog, kept: int, commits: int) -> None:
        create(catalog, [GOLD])
        set_property(catalog, GOLD_TABLE, "write.metadata.previous-versions-max", str(kept))
        append(catalog, 3)
        for i in range(commits):
            set_property(catalog, GOLD_TABLE, "any", str(i))
        maintain(catalog)
        left = TableStorage(load_table(catalog, GOLD_TABLE)).listing().metadata
        assert len(left) <= kept + 1
        assert rows_of(load_table(catalog, GOLD_TABLE)) == 3

    def test_attempt_that_lost_is_deleted_and_one_that_may_land_is_spared(self, catalog: Catalog) -> None:
        create(catalog, [GOLD])
        append(catalog, 3)
        path = Path(load_table(catalog, GOLD_TABLE).metadata_location.removeprefix("file://"))
        attempts = []
        for _ in range(2):
            metadata = json.loads(gzip.decompress(path.read_bytes()))
            metadata["metadata-log"].append({"metadata-file": f"file://{path}", "timestamp-ms": 1})
            attempts.append(path.with_name(f"00009-{uuid.uuid4()}.gz.metadata.json"))
            attempts[-1].write_bytes(gzip.compress(json.dumps(metadata).encode()))
            append(catalog)
            path = Path(load_table(catalog, GOLD_TABLE).metadata_location.removeprefix("file://"))
        metadata = json.loads(gzip.decompress(path.read_bytes()))
        metadata["metadata-log"].append({"metadata-file": f"file://{path}", "timestamp-ms": 1})
        landing = path.with_name(f"00009-{uuid.uuid4()}.gz.metadata.json")
        landing.write_bytes(gzip.compress(json.dumps(metadata).encode()))
        list(MaintenanceRun(catalog, GOLD, NOW)._delete_orphans())
        assert [each.exists() for each in (*attempts, landing)] == [False, False, True]

    @pytest.mark.parametrize("part", [0.5, 0.99])
    def test_part_of_an_own_file_is_no_other_table(self, catalog: Catalog, part: float) -> None:
        create(catalog, [GOLD])
        append(catalog, 3)
        path = Path(load_table(catalog, GOLD_TABLE).metadata_location.removeprefix("file://"))
        content = path.read_bytes()
        broken = path.with_name(f"00009-{uuid.uuid4()}.gz.metadata.json")
        broken.write_bytes(content[: int(len(content) * part)])
        maintain(catalog)
        assert not broken.exists()


def test_metadata_that_another_process_is_writing_is_no_lost_table(catalog: Catalog, home: Path) -> None:
    """Two flows start at once on a new warehouse: one sees the other's file before it is whole."""
    other = another_catalog(home)
    create(other, [GOLD])
    path = Path(load_table(other, GOLD_TABLE).metadata_location.removeprefix("file://"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    written = threading.Timer(0.5, path.write_bytes, [whole])
    written.start()
    try:
        assert create(catalog, [GOLD]) == {GOLD_TABLE: "created"}
    finally:
        written.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\x1f\x8b\x08", b"\xff" * 100])
def test_unreadable_metadata_is_refused(catalog: Catalog, content: bytes) -> None:
    create(catalog, [GOLD])
    append(catalog, 3)
    path = Path(load_table(catalog, GOLD_TABLE).metadata_location.removeprefix("file://"))
    strange = path.with_name("00001-x.metadata.json")
    strange.write_bytes(content)
    lost = orphan(load_table(catalog, GOLD_TABLE))
    with pytest.raises(MaintenanceError, match=f"{strange} cannot be read"):
        maintain(catalog)
    assert lost.exists()


def test_unreadable_manifest_of_another_table_is_refused(catalog: Catalog, home: Path) -> None:
    other = shared_folder(catalog, home)
    theirs = load_table(other, GOLD_TABLE)
    (manifest,) = theirs.current_snapshot().manifests(theirs.io)
    path = Path(manifest.manifest_path.removeprefix("file://"))
    path.write_bytes(path.read_bytes()[:50])
    lost = orphan(load_table(catalog, GOLD_TABLE))
    with pytest.raises(MaintenanceError, match="orphan files are not deleted"):
        maintain(catalog)
    assert lost.exists()


def test_statistics_of_another_table_are_spared(catalog: Catalog, home: Path) -> None:
    location = f"file://{home}/warehouse/shared"
    table_at(catalog, location)
    append(catalog)
    folder = Path(f"{home}/warehouse/shared/metadata")
    names = ["a.stats", "b.stats", "c.stats"]
    for name in names:
        (folder / name).write_bytes(b"x")
    metadata = {
        "format-version": 2,
        "table-uuid": str(uuid.uuid4()),
        "location": location,
        "statistics": [{"statistics-path": f"file:{folder}/a.stats"}],
        "partition-statistics": [{"statistics-path": f"{folder}/b.stats"}],
    }
    (folder / "v1.gz.metadata.json").write_bytes(gzip.compress(json.dumps(metadata).encode()))
    maintain(catalog)
    assert [(folder / name).exists() for name in names] == [True, True, False]


class TestLayouts:
    """Object-store layouts and folders outside the location."""

    def test_hashed_prefixes_are_the_tables_own(self, catalog: Catalog) -> None:
        create(catalog, [GOLD])
        set_property(catalog, GOLD_TABLE, "write.object-storage.enabled", "true")
        append(catalog, 4)
        table = load_table(catalog, GOLD_TABLE)
        lost = orphan(table, "data/0101/1100/0001/10110010")
        maintain(catalog)
        assert not lost.exists()
        assert rows_of(load_table(catalog, GOLD_TABLE)) == 4

    @pytest.mark.parametrize("enabled", ["true", "false"])
    def test_shared_data_folder_is_left_alone(self, catalog: Catalog, home: Path, enabled: str) -> None:
        other = another_catalog(home)
        for each, name in ((catalog, "one"), (other, "two")):
            shared = {"write.data.path": f"file://{home}/shared", "write.object-storage.enabled": enabled}
            table_at(each, f"file://{home}/{name}", **shared)
            append(each, 2)
        lost = home / "shared" / "lost.parquet"
        lost.write_bytes(b"PAR1")
        for each in (catalog, other):
            maintain(each)
        for each in (catalog, other):
            assert rows_of(load_table(each, GOLD_TABLE)) == 2
        assert lost.exists()

    def test_symbolic_link_out_of_the_folder_is_not_followed(self, catalog: Catalog, home: Path) -> None:
        create(catalog, [GOLD])
        append(catalog)
        (home / "outside").mkdir()
        (home / "outside" / "theirs.parquet").write_bytes(b"PAR1")
        folder = Path(load_table(catalog, GOLD_TABLE).location().removeprefix("file://")) / "data"
        (folder / "link").symlink_to(home / "outside")
        maintain(catalog)
        assert (home / "outside" / "theirs.parquet").exists()


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("s3://b/w/t", "s3a://b/w/t/", True),
        ("s3://b/w/t", "s3n://b/w/t/data", True),
        ("s3://b/w/t", "s3://b/w/t2", False),
        ("s3://b/w/t", "s3://b2/w/t", False),
        ("s3://b/w%20x/t", "s3://b/w x/t", True),
        ("s3://b//w/t", "s3://b/w/t", True),
        ("s3://b", "s3://b/w/t", True),
        ("file:/w/t", "file:///w/t/", True),
        ("/w/t", "file:///w/t", True),
        ("file://localhost/w/t", "file:///w/t", True),
        ("/w/x/../t", "file:///w/t", True),
        ("hdfs://n:8020/w/t", "hdfs://n/w/t", True),
        ("gs://b/w", "gcs://b/w/t", True),
        ("abfs://c@a/w", "abfss://c@a/w/t", True),
    ],
)
def test_spellings_of_a_location(one: str, other: str, expected: bool) -> None:
    assert overlap(canonical_folder(one), canonical_folder(other)) is expected


def _move(catalog: Catalog, home: Path, table: Table, location: str) -> None:
    """Give a table another location in its metadata, as another engine's catalog has it; its files do not move."""
    path = Path(table.metadata_location.removeprefix("file://"))
    compressed = path.name.endswith(".gz.metadata.json")  # once any test of this process has opened a catalog
    content = path.read_bytes()
    metadata = json.loads(gzip.decompress(content) if compressed else content)
    metadata["location"] = location
    text = json.dumps(metadata).encode()
    path.write_bytes(gzip.compress(text) if compressed else text)
