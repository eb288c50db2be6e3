"""Cached readers of manifests return what PyIceberg's own return."""

import numpy as np
import pyiceberg.avro.file
import pytest
from pyiceberg.avro.file import AvroFileHeader
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import ManifestEntry

from k2flow.compat.pyiceberg import manifest_readers
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.manifests import data_manifests
from k2flow.layers import GOLD_TABLE
from tests.gold import Gold


def entries(catalog: Catalog, name: str) -> list[ManifestEntry]:
    table = load_table(catalog, name)
    return [entry for manifest in data_manifests(table) for entry in manifest.fetch_manifest_entry(table.io)]


def test_entries_are_the_same(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reading uses the reader of the first."""
    gold = Gold(catalog)
    for hour in range(3):
        gold.add("binance", np.arange(hour, hour + 3))
    monkeypatch.setattr(AvroFileHeader, "get_schema", manifest_readers._get_schema)
    monkeypatch.setattr(pyiceberg.avro.file, "resolve_reader", manifest_readers._resolve)
    own = entries(catalog, GOLD_TABLE)
    manifest_readers.install_manifest_readers()
    manifest_readers._reader.cache_clear()
    for _ in range(2):
        found = entries(catalog, GOLD_TABLE)
        assert found == own
        assert [dict(each.data_file.lower_bounds) for each in found] == [dict(e.data_file.lower_bounds) for e in own]
    assert len(own) == 9
    assert manifest_readers._reader.cache_info().hits
