"""Which check covers each column of a layer. The checks take their columns from here.

A new field is covered without any change here: by the layer's content hash, or by `derived_column` if the layer derives
it. `unchecked` is empty for the layers of every exchange.
"""

from k2flow.inspection.row_hashes import POSITION, WORDING, content
from k2flow.layers import BRONZE, CANDLES, DLQ, GOLD, Layer, Stream


def columns_by_check(layer: Layer) -> dict[str, tuple[str, ...]]:
    """Return the columns that each check covers.

    Of a write time (`ingestion_timestamp`, `failed_at`), `file_partition` covers the day.
    """
    partitioned = tuple(by.column for by in layer.partitioned_by)
    found = {
        "file_partition": (layer.event_time, *partitioned),
        "derived_column": tuple(field.name for field in layer.derived),
    }
    if layer.sorted_by:
        found["file_order"] = layer.sorted_by
    if layer is BRONZE:
        found |= {"bronze_outside_ledger": POSITION, "bronze_changed": content(layer)}
    elif layer is DLQ:
        found |= {"dlq_outside_ledger": POSITION, "dlq_changed": content(layer), "dlq_reworded": WORDING}
    elif layer is CANDLES:
        found["candles_differ"] = layer.columns
    elif layer is GOLD or compares_rows(layer):
        found[f"{layer.name}_unexpected"] = content(layer)
    return found


def compares_rows(layer: Layer) -> bool:
    """Return whether the layer's rows are compared, as a multiset, with the trades decoded from Bronze."""
    return layer.stream is Stream.TRADES and not layer.deduplicated and not layer.shared


def unchecked(layer: Layer) -> list[str]:
    """Return the columns that no check covers."""
    covered = {name for columns in columns_by_check(layer).values() for name in columns}
    return [name for name in layer.columns if name not in covered]
