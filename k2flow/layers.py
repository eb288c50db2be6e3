"""Layers: the definition of each table of an exchange.

A flow reads messages and derives two more streams of rows from them: trades and dead letters. A layer names its stream
and its fields. A field takes the stream's column of the same name, or derives one from the stream's columns. Creation,
writing, commits, compaction, queries and the audit follow from the layer.

To add a table, add a `Layer` to `Exchange.layers`. To add a column, add a `Field`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyiceberg.types as ice
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.schema import Schema, assign_fresh_schema_ids
from pyiceberg.transforms import DayTransform, IdentityTransform, Transform
from pyiceberg.types import IcebergType, NestedField

from k2flow.config.settings import ExchangeSettings

GOLD_FILE_SIZE_MB = 256
CANDLES_FILE_SIZE_MB = 128
HOUR_US = 3_600_000_000
MIN_TIME_US = -62_135_596_800_000_000
"""0001-01-01T00:00:00Z in microseconds since 1970: the earliest time PyIceberg can append."""
MAX_TIME_US = 253_402_300_799_999_999  # 9999-12-31T23:59:59.999999Z, the latest
FIRST_TRADE_US = 1_230_940_800_000_000
"""2009-01-03T00:00:00Z, the day of Bitcoin's first block: no trade and no message about one is older."""


class Stream(Enum):
    """The rows a layer is made of."""

    MESSAGES = "messages"
    TRADES = "trades"
    DEAD_LETTERS = "dead letters"
    CANDLES = "candles"


class Field(NamedTuple):
    """One column of a table."""

    name: str
    type: IcebergType
    repeats: bool = False  # whether values repeat within a file, so that Parquet writes a dictionary
    derive: Callable[[pa.RecordBatch], pa.Array] | None = None
    """Returns the column for a batch of the layer's stream; None if the stream has a column of this name."""


class PartitionBy(NamedTuple):
    """One partition field: its source column, its transform, its name."""

    column: str
    transform: Transform[Any, Any]
    name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One table of an exchange, or of all exchanges."""

    name: str  # in metrics, status and audit: `bronze`, `silver`, `dlq`, `gold`
    table_pattern: str  # its table's name, with `{exchange}` where each exchange has a table of its own
    stream: Stream  # the rows it takes
    fields: tuple[Field, ...]  # its columns, in order
    partitioned_by: tuple[PartitionBy, ...]  # its partition fields; the first one dates the row
    event_time: str  # the time column that the first partition field's date comes from
    time_column: str  # the time column that orders rows when files are merged
    sorted_by: tuple[str, ...] = ()  # the columns that every file is sorted by, ascending
    deduplicated: bool = False  # whether each deduplication key of an exchange has one row only
    pruned_by: tuple[str, ...] | None = None  # the columns whose statistics manifests hold; None: all
    file_size_mb: Callable[[ExchangeSettings], int]  # target size of a data file in MiB
    retention_days: Callable[[ExchangeSettings], int | None]  # days that the table keeps; None means unlimited
    properties: tuple[tuple[str, str], ...] = ()  # table properties in addition to the common ones
    former_names: tuple[tuple[str, str], ...] = ()  # former column names, by today's name

    def table(self, exchange: str) -> str:
        """Return the name of the table that holds this layer of the exchange with this name."""
        return self.table_pattern.format(exchange=exchange)

    @property
    def shared(self) -> bool:
        """Whether all exchanges write to one table."""
        return "{exchange}" not in self.table_pattern

    @property
    def date_column(self) -> str:
        """The column with the date (UTC) of `event_time`, which the table is partitioned by."""
        return self.partitioned_by[0].column

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names of its fields, in order."""
        return tuple(field.name for field in self.fields)

    @cached_property
    def row_hash(self) -> tuple[str, ...]:
        """The columns that the audit compares with the stream's, by a hash of each row."""
        return tuple(field.name for field in self.fields if field.derive is None)

    @cached_property
    def derived(self) -> tuple[Field, ...]:
        """The fields that the audit derives again from the row's other columns and compares."""
        return tuple(field for field in self.fields if field.derive is not None)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """The one Arrow schema of its rows, see `arrow_schema`."""
        return arrow_schema(self.fields)

    def rows(self, stream: pa.RecordBatch) -> pa.RecordBatch:
        """Return n rows of this layer from n rows of its stream."""
        columns = [field.derive(stream) if field.derive else stream.column(field.name) for field in self.fields]
        return pa.RecordBatch.from_arrays(columns, schema=self.arrow_schema)


@lru_cache(maxsize=64)  # a reader of each commit's new files asks
def arrow_schema(fields: tuple[Field, ...]) -> pa.Schema:
    """Return the Arrow schema of rows: string, binary, timestamp[us, UTC], decimal128; no field ids."""
    arrow = schema_to_pyarrow(iceberg_schema(fields), include_field_ids=False)
    return pa.schema([pa.field(f.name, _small(f.type)) for f in arrow])


def iceberg_schema(fields: tuple[Field, ...]) -> Schema:
    """Return every column as optional, with the ids 1, 2, ... in order; ids inside lists and maps come after them."""
    columns = [NestedField(i, field.name, field.type, required=False) for i, field in enumerate(fields, 1)]
    return assign_fresh_schema_ids(Schema(*columns))


def _small(kind: pa.DataType) -> pa.DataType:
    """Return `kind` with 32-bit offsets: PyIceberg maps to large types, which would leak into what readers see."""
    if pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(pa.field("element", _small(kind.value_type)))
    if pa.types.is_map(kind):
        return pa.map_(_small(kind.key_type), _small(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _small(field.type)) for field in kind])
    return kind


def _hour_of_day(trades: pa.RecordBatch) -> pa.Array:
    hours = trades.column("timestamp").cast(pa.int64()).to_numpy() // HOUR_US
    return pa.array((hours % 24).astype(np.int32))


def _by_day(column: str) -> tuple[PartitionBy, ...]:
    return (PartitionBy(column, DayTransform(), f"{column}_day"),)


_STRING, _LONG, _INT = ice.StringType(), ice.LongType(), ice.IntegerType()
_TIME, _DATE, _AMOUNT = ice.TimestamptzType(), ice.DateType(), ice.DecimalType(18, 8)
_STRINGS = ice.ListType(element_id=-1, element=_STRING, element_required=False)
_STRING_MAP = ice.MapType(key_id=-1, key_type=_STRING, value_id=-1, value_type=_STRING, value_required=False)

BRONZE = Layer(
    name="bronze",
    table_pattern="bronze_{exchange}_trades",
    stream=Stream.MESSAGES,
    fields=(
        Field("message_key", _STRING, repeats=True),
        Field("avro_payload", ice.BinaryType()),
        Field("topic", _STRING, repeats=True),
        Field("partition", _INT, repeats=True),
        Field("offset", _LONG),
        Field("kafka_timestamp", _TIME),
        Field("ingestion_timestamp", _TIME),
        Field("ingestion_date", _DATE, repeats=True),
    ),
    partitioned_by=_by_day("ingestion_date"),
    event_time="ingestion_timestamp",
    time_column="kafka_timestamp",
    file_size_mb=lambda settings: settings.bronze_file_size_mb,
    retention_days=lambda settings: settings.bronze_retention_days,
)
SILVER = Layer(
    name="silver",
    table_pattern="silver_{exchange}_trades",
    stream=Stream.TRADES,
    fields=(
        Field("message_id", _STRING),
        Field("trade_id", _STRING),
        Field("symbol", _STRING, repeats=True),
        Field("exchange", _STRING, repeats=True),
        Field("asset_class", _STRING, repeats=True),
        Field("timestamp", _TIME),
        Field("price", _AMOUNT),
        Field("quantity", _AMOUNT),
        Field("currency", _STRING, repeats=True),
        Field("side", _STRING, repeats=True),
        Field("trade_conditions", _STRINGS, repeats=True),
        Field("source_sequence", _LONG),
        Field("ingestion_timestamp", _TIME),
        Field("platform_sequence", _LONG),
        Field("vendor_data", _STRING_MAP, repeats=True),
        Field("exchange_date", _DATE, repeats=True),
    ),
    partitioned_by=_by_day("exchange_date"),
    event_time="timestamp",
    time_column="timestamp",
    file_size_mb=lambda settings: settings.silver_file_size_mb,
    retention_days=lambda settings: settings.silver_retention_days,
)
DLQ = Layer(
    name="dlq",
    table_pattern="dlq_{exchange}_trades",
    stream=Stream.DEAD_LETTERS,
    fields=(
        Field("topic", _STRING, repeats=True),
        Field("partition", _INT, repeats=True),
        Field("offset", _LONG),
        Field("kafka_timestamp", _TIME),
        Field("payload", ice.BinaryType()),
        Field("schema_id", _INT, repeats=True),
        Field("reason", _STRING, repeats=True),
        Field("detail", _STRING),
        Field("failed_at", _TIME, repeats=True),
        Field("failed_date", _DATE, repeats=True),
    ),
    partitioned_by=_by_day("failed_date"),
    event_time="failed_at",
    time_column="kafka_timestamp",
    file_size_mb=lambda settings: settings.dlq_file_size_mb,
    retention_days=lambda settings: settings.dlq_retention_days,
)
GOLD = Layer(
    name="gold",
    table_pattern="gold_crypto_trades",
    stream=Stream.TRADES,
    fields=(*SILVER.fields, Field("exchange_hour", _INT, repeats=True, derive=_hour_of_day)),
    partitioned_by=(
        PartitionBy("exchange_date", IdentityTransform(), "exchange_date"),
        PartitionBy("exchange_hour", IdentityTransform(), "exchange_hour"),
    ),
    event_time="timestamp",
    time_column="timestamp",
    sorted_by=("timestamp",),
    deduplicated=True,
    pruned_by=("exchange", "symbol", "timestamp", "ingestion_timestamp", "exchange_date", "exchange_hour"),
    file_size_mb=lambda _: GOLD_FILE_SIZE_MB,
    retention_days=lambda _: None,
    properties=(("write.distribution-mode", "hash"),),
)
GOLD_TABLE = GOLD.table_pattern
CANDLES = Layer(
    name="candles",
    table_pattern="gold_crypto_candles_1m",
    stream=Stream.CANDLES,
    fields=(
        Field("exchange", _STRING, repeats=True),
        Field("symbol", _STRING, repeats=True),
        Field("open_time", _TIME, repeats=True),
        *(Field(name, _AMOUNT) for name in ("open", "high", "low", "close")),
        Field("volume", ice.DecimalType(38, 8)),
        Field("quote_volume", ice.DecimalType(38, 16)),
        Field("buy_volume", ice.DecimalType(38, 8)),
        Field("trades", _LONG),
        *(Field(name, _STRING) for name in ("first_trade_id", "last_trade_id")),
        *(Field(name, _TIME) for name in ("first_trade_time", "last_trade_time")),
        Field("exchange_date", _DATE, repeats=True),
        Field("exchange_hour", _INT, repeats=True),
    ),
    partitioned_by=GOLD.partitioned_by,
    event_time="open_time",
    time_column="open_time",
    sorted_by=("symbol", "open_time"),
    pruned_by=("exchange", "symbol", "open_time"),  # each commit writes the entries of several hours again
    file_size_mb=lambda _: CANDLES_FILE_SIZE_MB,
    retention_days=lambda _: None,
)
CANDLES_TABLE = CANDLES.table_pattern
LAYERS = (BRONZE, SILVER, DLQ, GOLD)  # the layers of every exchange, in the order of the data
COLUMNS_OF_STREAM = {Stream.MESSAGES: BRONZE.fields, Stream.TRADES: SILVER.fields, Stream.DEAD_LETTERS: DLQ.fields}
"""The columns that a layer of each stream can take."""
