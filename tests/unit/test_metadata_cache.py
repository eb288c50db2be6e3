"""Metadata that is parsed with the entries of the version before is what PyIceberg parses."""

import gzip
import json
from typing import Any

import numpy as np
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import ValidationError
from pyiceberg.table.metadata import TableMetadata, TableMetadataUtil
from pyiceberg.types import LongType

from k2flow.compat.pyiceberg import metadata_cache
from k2flow.iceberg.catalog import load_table
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.storage import path_of
from tests.gold import Gold


def versions(catalog: Catalog) -> list[bytes]:
    """Return the JSON of a table's versions, by other processes: commits, an evolution, an expiration, a rollback."""
    gold, found = Gold(catalog), []

    def note() -> None:
        with gzip.open(path_of(load_table(catalog, GOLD_TABLE).metadata_location)) as file:
            found.append(file.read())

    for hour in range(4):
        gold.add("binance", np.arange(hour, hour + 1))
        note()
    table = load_table(catalog, GOLD_TABLE)
    with table.update_schema() as schema:
        schema.add_column("another", LongType())
    note()
    table = load_table(catalog, GOLD_TABLE)
    first, second = (snapshot.snapshot_id for snapshot in table.metadata.snapshots[:2])
    table.maintenance.expire_snapshots().by_id(first).commit()
    note()
    load_table(catalog, GOLD_TABLE).manage_snapshots().set_current_snapshot(second).commit()
    note()
    return found


def changed(content: bytes, **values: Any) -> bytes:
    return json.dumps({**json.loads(content), **values}).encode()


def parsed_by_pyiceberg(content: bytes) -> TableMetadata:
    return TableMetadataUtil.parse_raw(content.decode())


def test_versions_in_any_order_are_parsed_as_pyiceberg_does(catalog: Catalog) -> None:
    own = versions(catalog)
    parsed = json.loads(own[3])
    edited = [{**each, "summary": {"operation": "append", "k": "edited"}} for each in parsed["snapshots"]]
    own.append(changed(own[3], snapshots=edited))
    own.append(changed(own[3], snapshots=parsed["snapshots"] * 2))
    own.append(changed(own[3], **{"snapshot-log": [], "metadata-log": [], "refs": {}}))
    for content in (*own, *reversed(own), own[0], own[-1]):
        found, expected = metadata_cache._parse(content), parsed_by_pyiceberg(content)
        assert found == expected
        assert found.model_dump_json() == expected.model_dump_json()


def test_equal_entries_are_shared(catalog: Catalog) -> None:
    contents = versions(catalog)
    before, after = (metadata_cache._parse(content) for content in contents[2:4])
    assert before.schema() is after.schema()
    assert before.spec() is after.spec()
    assert [a is b for a, b in zip(before.snapshots, after.snapshots, strict=False)] == [True] * len(before.snapshots)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{", b'{"format-version": 2, "table-uuid": "x"}', b"\xff"])
def test_damaged_metadata_is_refused(content: bytes) -> None:
    with pytest.raises((ValidationError, ValueError)):
        metadata_cache._parse(content)


@pytest.mark.parametrize("damage", [{"snapshots": None}, {"snapshots": ["x"]}, {"schemas": [{"schema-id": 0}]}])
def test_damage_to_a_known_table_is_refused(catalog: Catalog, damage: dict[str, Any]) -> None:
    content = versions(catalog)[-1]
    metadata_cache._parse(content)
    with pytest.raises(ValidationError):
        metadata_cache._parse(changed(content, **damage))
