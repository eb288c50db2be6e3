"""Which messages the tables' ledgers hold, as SQL."""

from collections.abc import Iterable

from k2flow.inspection.partitions import TopicPartition
from k2flow.inspection.row_hashes import RowHashStore
from k2flow.layers import Layer


def store_extents(store: RowHashStore, partitions: Iterable[TopicPartition]) -> None:
    """Fill table `extents` of the database."""
    for partition in partitions:
        for layer in partition.pinned.exchange.layers:
            extent = partition.extent(layer)
            values = [partition.number, partition.pinned.number, layer.name, extent.first, extent.next]
            store.run("INSERT INTO extents VALUES (?, ?, ?, ?, ?)", values)


def within(layer: Layer, rows: str = "v") -> str:
    """Return the SQL that joins messages `rows` to those that the ledger of `layer` holds."""
    return f"{_of_partition(layer, rows)} AND {_is_within(layer, rows)}"


def outside(layer: Layer, rows: str = "v") -> str:
    """Return the SQL that joins messages `rows` to the partitions in which the ledger of `layer` does not hold them."""
    return f"{_of_partition(layer, rows)} AND NOT ({_is_within(layer, rows)})"


def _of_partition(layer: Layer, rows: str) -> str:
    name = f"e_{layer.name}"
    return f"JOIN extents {name} ON {name}.number = {rows}.number AND {name}.layer = '{layer.name}'"


def _is_within(layer: Layer, rows: str) -> str:
    return f'{rows}."offset" >= e_{layer.name}.first AND {rows}."offset" < e_{layer.name}.next'
