"""Cached writers of manifests write what PyIceberg's own write."""

from pathlib import Path

import numpy as np
import pyiceberg.avro.file
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.io import load_file_io
from pyiceberg.manifest import ManifestWriter, write_manifest, write_manifest_list
from pyiceberg.table import Table
from pyiceberg.utils.schema_conversion import AvroSchemaConversion

from k2flow.compat.pyiceberg import manifest_writers
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.manifests import data_manifests
from k2flow.iceberg.tables import create, definitions
from k2flow.layers import GOLD_TABLE
from tests.gold import Gold


def written(gold: Table, other: Table, folder: Path) -> list[bytes]:
    """Return manifests of two tables, and a list of manifests, as PyIceberg writes them."""
    io, listed, found = load_file_io(), data_manifests(gold), []
    entries = [entry for manifest in listed for entry in manifest.fetch_manifest_entry(io)]
    for table in (gold, other, gold):
        path = f"{folder}/{len(found)}.avro"
        with write_manifest(2, table.spec(), table.schema(), io.new_output(path), 1, "gzip") as writer:
            for entry in entries if table is gold else entries[:0]:
                writer.add_entry(entry)
            writer._added_files += 1  # an empty manifest raises an error
        found.append(Path(path).read_bytes())
    path = f"{folder}/list.avro"
    with write_manifest_list(2, io.new_output(path), 1, None, 1, "gzip") as manifest_list:
        manifest_list.add_manifests(listed)
    return [*found, Path(path).read_bytes()]


def test_manifests_are_the_same(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second writing uses the schemas and writers of the first."""
    gold = Gold(catalog)
    gold.add("binance", np.arange(3))
    exchange = find_exchange("binance")
    create(catalog, definitions(exchange).values())
    tables = load_table(catalog, GOLD_TABLE), load_table(catalog, exchange.bronze)
    monkeypatch.setattr(pyiceberg.avro.file.os, "urandom", bytes)
    with monkeypatch.context() as own:
        own.setattr(ManifestWriter, "_with_partition", manifest_writers._with_partition)
        own.setattr(AvroSchemaConversion, "iceberg_to_avro", manifest_writers._to_avro)
        own.setattr(pyiceberg.avro.file, "resolve_writer", manifest_writers._resolve)
        own.setattr(pyiceberg.avro.file, "construct_writer", manifest_writers._construct)
        expected = written(*tables, tmp_path)
    caches = [getattr(manifest_writers, f"_{name}") for name in ("schema", "avro", "resolved", "constructed")]
    for cache in caches:
        cache.cache_clear()
    for _ in range(2):
        assert written(*tables, tmp_path) == expected
    assert all(cache.cache_info().hits for cache in caches)
    assert len(set(expected)) == 3
