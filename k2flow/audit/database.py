"""The database of one audit: its tables, the hash columns of trades, and the messages that the ledgers hold."""

from collections.abc import Iterable

from k2flow.audit.coverage import compares_rows
from k2flow.exchange import Exchange
from k2flow.inspection.partitions import TopicPartition
from k2flow.inspection.row_hashes import RowHashStore, content, hash_of
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
        """The SQL that creates the database's tables.

        `number` is a TopicPartition's, `file` a planned file's, `day` and
        `hour` are since 1970.
        """
        columns = ", ".join(f"row_{number} UBIGINT" for number in self._numbers.values())
        return f"""
        CREATE TABLE runs (number INTEGER, first BIGINT, next BIGINT);  -- of Bronze's offsets, without a gap each
        CREATE TABLE newest (
            number INTEGER, "offset" BIGINT, content UBIGINT, bare UBIGINT);  -- rows of Bronze, without its header too
        CREATE TABLE valid (  -- decoded messages
            number INTEGER, "offset" BIGINT, day INTEGER, hour INTEGER, id UBIGINT, {columns});
        CREATE TABLE bad (
            number INTEGER, "offset" BIGINT, day INTEGER, reason VARCHAR, content UBIGINT, detail UBIGINT);
        CREATE TABLE unresolved (number INTEGER, "offset" BIGINT, day INTEGER, schema_id INTEGER);  -- no known schema
        CREATE TABLE dlq (number INTEGER, "offset" BIGINT, reason VARCHAR, content UBIGINT, detail UBIGINT);
        CREATE TABLE trades (  -- Silver, and layers like it
            file INTEGER, layer VARCHAR, exchange TINYINT, id UBIGINT, {columns});
        CREATE TABLE gold (file INTEGER, exchange TINYINT, hour INTEGER, id UBIGINT, row UBIGINT);
        CREATE TABLE summed (  -- rows of Bronze and dead letters, see k2flow.audit.sums
            file INTEGER, number INTEGER, proven BOOLEAN,
            rows BIGINT, hashes HUGEINT, mixed HUGEINT, last BIGINT);
        CREATE TABLE extents (
            number INTEGER, exchange TINYINT, layer VARCHAR, first BIGINT, next BIGINT, held BOOLEAN);
        """


def store_extents(store: RowHashStore, partitions: Iterable[TopicPartition]) -> None:
    """Fill table `extents` of the database: all offsets of each partition, as ranges that a layer holds or does not."""
    rows = [
        (partition.number, partition.pinned.number, layer.name, *piece)
        for partition in partitions
        for layer in partition.pinned.exchange.layers
        for piece in partition.pieces(layer)
    ]
    if rows:  # in the statement: DuckDB looks for pandas once more for each parameter
        store.run(f"INSERT INTO extents VALUES {', '.join(map(str, rows))}")


def within(layer: Layer) -> str:
    """Return the SQL that joins messages `v` to those that the ledger of `layer` holds."""
    return f"{_of_piece(layer)} AND e_{layer.name}.held"


def outside(layer: Layer) -> str:
    """Return the SQL that joins messages `v` to the offsets that the ledger of `layer` does not hold."""
    return f"{_of_piece(layer)} AND NOT e_{layer.name}.held"


def _of_piece(layer: Layer) -> str:
    """Return the SQL of the join to the pieces of a layer.

    The offsets are compared in a CASE: DuckDB takes plain comparisons in a join for very selective. It would expect a
    few hundred of millions of messages, and hold all of them in memory to join them with another table.
    """
    extents = f"e_{layer.name}"
    within_piece = f'v."offset" >= {extents}.first AND v."offset" < {extents}.next'
    return (
        f"JOIN extents {extents} ON {extents}.number = v.number AND {extents}.layer = '{layer.name}' "
        f"AND CASE WHEN {within_piece} THEN true ELSE false END"
    )
