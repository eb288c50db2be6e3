"""Messages as rows of Bronze, with unchanged payloads."""

from datetime import UTC, datetime

import pyarrow as pa

from k2flow.layers import BRONZE
from k2flow.trades.messages import MessageBatch


def bronze_rows(messages: MessageBatch, topic: str) -> pa.RecordBatch:
    """Return n messages (MESSAGE_SCHEMA) as n rows of Bronze."""
    n, now = messages.rows.num_rows, datetime.now(UTC)
    columns = [
        key_text(messages.rows.column("key")),
        messages.rows.column("value"),
        pa.repeat(topic, n),
        pa.array(messages.partition),
        pa.array(messages.offset),
        messages.rows.column("timestamp"),
        pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), n),
        pa.repeat(pa.scalar(now.date(), pa.date32()), n),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=BRONZE.arrow_schema)


def key_text(keys: pa.BinaryArray) -> pa.StringArray:
    r"""Return keys as text, bytes that are not UTF-8 as \xNN. Null and empty stay apart."""
    try:
        return keys.cast(pa.string())
    except pa.ArrowInvalid:  # rare enough to go through the batch key by key
        texts = [None if key is None else key.decode("utf-8", "backslashreplace") for key in keys.to_pylist()]
        return pa.array(texts, pa.string())
