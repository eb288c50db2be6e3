"""Tables in a real catalog: they are as documented, creation is idempotent, differences are shown."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog

from k2flow.config.settings import load_settings
from k2flow.errors import CatalogError, CatalogSettingsError, TableDiffersError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.rewrite import set_property
from k2flow.iceberg.tables import COMMON_PROPERTIES, create, definitions
from k2flow.layers import GOLD_TABLE
from k2flow.query.connection import connect_to
from tests.conftest import forget_settings

MIB = 1 << 20
BRONZE = [
    "message_key string",
    "avro_payload binary",
    "topic string",
    "partition int",
    "offset long",
    "kafka_timestamp timestamptz",
    "ingestion_timestamp timestamptz",
    "ingestion_date date",
]
SILVER = [
    "message_id string",
    "trade_id string",
    "symbol string",
    "exchange string",
    "asset_class string",
    "timestamp timestamptz",
    "price decimal(18, 8)",
    "quantity decimal(18, 8)",
    "currency string",
    "side string",
    "trade_conditions list<string>",
    "source_sequence long",
    "ingestion_timestamp timestamptz",
    "platform_sequence long",
    "vendor_data map<string, string>",
    "exchange_date date",
]
DLQ = [
    "topic string",
    "partition int",
    "offset long",
    "kafka_timestamp timestamptz",
    "payload binary",
    "schema_id int",
    "reason string",
    "detail string",
    "failed_at timestamptz",
    "failed_date date",
]
EXPECTED = {
    "bronze_binance_trades": (BRONZE, ["day(ingestion_date)"], 7, 128),
    "bronze_kraken_trades": (BRONZE, ["day(ingestion_date)"], 14, 64),
    "silver_binance_trades": (SILVER, ["day(exchange_date)"], 30, 128),
    "silver_kraken_trades": (SILVER, ["day(exchange_date)"], 30, 128),
    "gold_crypto_trades": (
        [*SILVER, "exchange_hour int"],
        ["identity(exchange_date)", "identity(exchange_hour)"],
        None,
        256,
    ),
    "dlq_binance_trades": (DLQ, ["day(failed_date)"], 30, 32),
    "dlq_kraken_trades": (DLQ, ["day(failed_date)"], 30, 32),
}


def create_all(catalog: Catalog) -> dict[str, str]:
    created: dict[str, str] = {}
    for exchange in all_exchanges():
        created |= {k: v or created.get(k, "") for k, v in create(catalog, definitions(exchange).values()).items()}
    return created


def test_tables_are_as_documented(catalog: Catalog) -> None:
    assert create_all(catalog) == dict.fromkeys(EXPECTED, "created")
    for name, (columns, partitioning, retention, size) in EXPECTED.items():
        table = load_table(catalog, name)
        assert [f"{f.name} {f.field_type}" for f in table.schema().fields] == columns
        schema, spec = table.schema(), table.spec()
        assert [f"{f.transform}({schema.find_column_name(f.source_id)})" for f in spec.fields] == partitioning
        assert table.metadata.format_version == 2
        assert table.properties.items() >= COMMON_PROPERTIES.items()
        assert table.properties["write.target-file-size-bytes"] == str(size * MIB)
        assert table.properties.get("k2flow.retention-days") == (None if retention is None else str(retention))
    gold = load_table(catalog, GOLD_TABLE)
    assert gold.properties["write.distribution-mode"] == "hash"
    order = [(gold.schema().find_column_name(f.source_id), f.direction.name) for f in gold.sort_order().fields]
    assert order == [("timestamp", "ASC")]


def test_creation_is_idempotent(catalog: Catalog) -> None:
    create_all(catalog)
    uuids = {name: load_table(catalog, name).metadata.table_uuid for name in EXPECTED}
    assert create_all(catalog) == dict.fromkeys(EXPECTED, "")
    assert uuids == {name: load_table(catalog, name).metadata.table_uuid for name in EXPECTED}


def test_several_processes_create_tables_at_once() -> None:
    settings = load_settings(exchange_names())
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: create_all(open_catalog(settings)), range(4)))
    assert all(set(created) == set(EXPECTED) for created in results)


def test_error_shows_how_a_table_differs(catalog: Catalog) -> None:
    create_all(catalog)
    table = load_table(catalog, GOLD_TABLE)
    with table.transaction() as transaction:
        transaction.set_properties({"write.distribution-mode": "none", "k2flow.retention-days": "3"})
    with pytest.raises(TableDiffersError) as error:
        create_all(catalog)
    text = str(error.value)
    assert "property write.distribution-mode is none, not hash" in text
    assert "property k2flow.retention-days is 3, not absent" in text


def test_changed_setting_is_a_difference(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    create_all(catalog)
    monkeypatch.setenv("K2FLOW_KRAKEN_DLQ_RETENTION_DAYS", "31")
    forget_settings()
    with pytest.raises(TableDiffersError, match=r"dlq_kraken_trades.*retention-days is 30, not 31"):
        create(catalog, definitions(find_exchange("kraken")).values())


def test_arrow_schema_has_no_large_types() -> None:
    for definition in definitions(find_exchange("binance")).values():
        for field in definition.arrow_schema:
            assert "large" not in str(field.type)
            assert field.type != pa.dictionary(pa.int32(), pa.string())


def test_error_of_a_missing_table_says_what_to_do(catalog: Catalog) -> None:
    with pytest.raises(CatalogError, match="k2flow tables create"):
        load_table(catalog, GOLD_TABLE)


def test_error_of_an_unreachable_catalog_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYICEBERG_CATALOG__K2FLOW__TYPE", "sql")
    monkeypatch.setenv("PYICEBERG_CATALOG__K2FLOW__URI", "sqlite:////nonexistent/folder/catalog.db")
    from pyiceberg import catalog as pyiceberg_catalog
    from pyiceberg.utils.config import Config

    monkeypatch.setattr(pyiceberg_catalog, "_ENV_CONFIG", Config())
    with pytest.raises(CatalogError) as error:
        open_catalog(load_settings(exchange_names()))
    assert "\n" not in str(error.value)


def test_metadata_files_are_compressed_as_the_property_says(catalog: Catalog) -> None:
    (definition,) = [each for name, each in definitions(find_exchange("kraken")).items() if name == GOLD_TABLE]
    create(catalog, [definition])
    for value in ("none", "GZIP", None):
        set_property(catalog, GOLD_TABLE, "write.metadata.compression-codec", value)
    set_property(catalog, GOLD_TABLE, "write.metadata.compression-codec", "gzip")
    table = load_table(catalog, GOLD_TABLE)
    files = [*(entry.metadata_file for entry in table.metadata.metadata_log), table.metadata_location]
    assert [file.endswith(".gz.metadata.json") for file in files] == [True, False, True, False, True]
    for file in files:
        content = Path(file.removeprefix("file://")).read_bytes()
        text = gzip.decompress(content) if file.endswith(".gz.metadata.json") else content
        assert json.loads(text)["table-uuid"] == str(table.metadata.table_uuid)
    with connect_to(catalog) as db:
        assert db.sql(f"SELECT count(*) FROM {GOLD_TABLE}").fetchall() == [(0,)]


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b"])
def test_folder_that_a_uri_would_change_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The files of its tables would be written to a folder of another name."""
    monkeypatch.setenv("K2FLOW_HOME", str(tmp_path / name))
    with pytest.raises(CatalogSettingsError, match="means another one in a URI"):
        open_catalog(load_settings())
    monkeypatch.setenv("K2FLOW_HOME", str(tmp_path))
    monkeypatch.setenv("PYICEBERG_CATALOG__K2FLOW__TYPE", "sql")
    monkeypatch.setenv("PYICEBERG_CATALOG__K2FLOW__URI", f"sqlite:///{tmp_path}/catalog.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__K2FLOW__WAREHOUSE", f"file://{tmp_path}/{name}")
    with pytest.raises(CatalogSettingsError, match="means another one in a URI"):
        open_catalog(load_settings())
    assert [*tmp_path.iterdir()] == []
