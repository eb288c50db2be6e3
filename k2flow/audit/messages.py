"""Messages, decoded again by the flow's own decoder, as hashes in the database."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.audit.context import AuditContext
from k2flow.exchange import Exchange
from k2flow.inspection.content import content_hash, id_hash
from k2flow.inspection.row_hashes import hashable
from k2flow.layers import DLQ, SILVER
from k2flow.trades.decode import DecodedBatch, TradeDecoder
from k2flow.trades.messages import MessageBatch

Ints = npt.NDArray[np.int64]


class MessageHasher:
    """Decodes messages of one exchange and stores their hashes as `valid` or `bad`.

    Today's rules decide whether a message is valid and, with a registry, today's schemas. Today's setting decides which
    fields that TradeV2 does not know are kept. After a change of these, earlier rows differ.
    """

    def __init__(self, context: AuditContext, exchange: Exchange, decoder: TradeDecoder) -> None:
        self._context = context
        self._exchange = exchange
        self._decoder = decoder

    def decode(self, number: Ints, offset: Ints, rows: pa.RecordBatch) -> DecodedBatch:
        """Decode n messages (MESSAGE_SCHEMA). In the result, `partition` is the number of the TopicPartition."""
        return self._decoder.decode(MessageBatch(rows, number.astype(np.int32), offset, []))

    def store(self, decoded: DecodedBatch, day: int) -> None:
        """Store the results of messages that were ingested on `day` (since 1970)."""
        store, trades, bad = self._context.store, decoded.trades, decoded.dead_letters.rows
        if trades.rows.num_rows:
            batch = hashable(trades.rows)
            batch = batch.append_column("number", pa.array(trades.partition))
            batch = batch.append_column("kafka_offset", pa.array(trades.offset))
            traded = f"{SILVER.date_column} - DATE '1970-01-01'"
            hashes = self._context.hashes.expressions(SILVER)
            store.insert("valid", batch, f"number, kafka_offset, {traded}, {id_hash(self._exchange)}, {hashes}")
        if bad.num_rows:
            columns = f'partition, "offset", {day}, reason, {content_hash(DLQ)}, hash(detail)'
            store.insert("bad", hashable(bad), columns)
