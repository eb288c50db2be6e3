"""The hashes that an audit compares: the hash columns of trades, and the database's tables."""

from collections.abc import Iterable

from k2flow.audit.coverage import compares_rows
from k2flow.exchange import Exchange
from k2flow.inspection.content import content
from k2flow.inspection.row_hashes import hash_of
from k2flow.layers import GOLD, Layer


class TradeHashes:
    """The row hashes of trades: one column per distinct set of columns that the layers compare.

    Silver and Gold compare the same columns, so there is one unless an exchange has a layer with fewer.
    """

    def __init__(self, exchanges: Iterable[Exchange]) -> None:
        layers = dict.fromkeys(layer for exchange in exchanges for layer in exchange.layers if compares_rows(layer))
        sets = dict.fromkeys(frozenset(content(layer)) for layer in (GOLD, *layers))
        self._numbers = {columns: number for number, columns in enumerate(sets)}

    def column(self, layer: Layer) -> str:
        """Return the name of the hash column of a layer."""
        return f"row_{self._numbers[frozenset(content(layer))]}"

    def expressions(self, layer: Layer) -> str:
        """Return the SQL of all hash columns, for rows of `layer`: null for a set with columns that it lacks."""
        return ", ".join(
            hash_of(columns, layer.arrow_schema) if columns <= set(layer.columns) else "NULL::UBIGINT"
            for columns in self._numbers
        )

    @property
    def schema(self) -> str:
        """The SQL that creates the database's tables. `number` is a TopicPartition's, `day` and `hour` since 1970."""
        columns = ", ".join(f"row_{number} UBIGINT" for number in self._numbers.values())
        return f"""
        CREATE TABLE runs (number INTEGER, first BIGINT, next BIGINT);  -- of Bronze's offsets, without a gap each
        CREATE TABLE newest (number INTEGER, "offset" BIGINT, content UBIGINT);  -- rows of Bronze
        CREATE TABLE valid (number INTEGER, "offset" BIGINT, day INTEGER, id UBIGINT, {columns});  -- decoded messages
        CREATE TABLE bad (
            number INTEGER, "offset" BIGINT, day INTEGER, reason VARCHAR, content UBIGINT, detail UBIGINT);
        CREATE TABLE dlq (number INTEGER, "offset" BIGINT, reason VARCHAR, content UBIGINT, detail UBIGINT);
        CREATE TABLE trades (layer VARCHAR, exchange TINYINT, id UBIGINT, {columns});  -- Silver, and layers like it
        CREATE TABLE gold (exchange TINYINT, hour INTEGER, id UBIGINT, row UBIGINT);
        CREATE TABLE extents (number INTEGER, exchange TINYINT, layer VARCHAR, first BIGINT, next BIGINT);
        """
