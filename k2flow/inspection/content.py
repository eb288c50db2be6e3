"""The columns of a layer that a message decides, and the SQL of their hashes."""

from k2flow.exchange import Exchange
from k2flow.inspection.row_hashes import hash_of
from k2flow.layers import SILVER, Layer, Stream

POSITION = ("topic", "partition", "offset")
"""The columns that name a message."""
WORDING = ("detail",)
"""Text for people, which may change with k2flow."""


def content(layer: Layer) -> tuple[str, ...]:
    """Return the columns that one hash per row compares with the message that gave the row.

    Rows of messages and dead letters are found by their position. Their write time is the flow's clock, which the
    message does not have.
    """
    if layer.stream is Stream.TRADES:
        return layer.row_hash
    other = {*POSITION, *WORDING, layer.event_time, layer.date_column}
    return tuple(name for name in layer.row_hash if name not in other)


def content_hash(layer: Layer) -> str:
    """Return the SQL that hashes `content` of a row."""
    return hash_of(content(layer), layer.arrow_schema)


def id_hash(exchange: Exchange) -> str:
    """Return the SQL that hashes the deduplication key of a trade of this exchange."""
    return hash_of(exchange.dedup_key, SILVER.arrow_schema)
