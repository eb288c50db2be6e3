"""The messages that all peers read, and the rows that each layer must have of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from k2flow.exchange import Exchange
from k2flow.layers import BRONZE, DLQ, GOLD, SILVER
from k2flow.sandbox.producer import ProduceOptions
from k2flow.sandbox.producer.send import Sender
from k2flow.sandbox.producer.stream import Messages, MessageStream
from k2flow.sandbox.producer.trades import Ints
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch, timestamps
from k2flow.trades.registry import FixedSchemas

PARTITIONS = 6
OFFSET_BITS = 40


@dataclass(frozen=True)
class Topic:
    """A topic and the key of each row that its tables must have: a position, or a message id."""

    name: str
    bootstrap: str
    keys: Mapping[str, pa.ChunkedArray]

    @property
    def messages(self) -> int:
        return len(self.keys[BRONZE.name])


@dataclass
class _Filling:
    """One topic while messages are sent to it."""

    sender: Sender
    reached: Ints
    positions: list[Ints]
    dead: list[Ints]

    def send(self, messages: Messages, is_dead: np.ndarray) -> None:
        at = self._positions(messages.route % PARTITIONS)
        self.sender.send(messages)
        self.positions.append(at)
        self.dead.append(at[is_dead])

    def _positions(self, partition: Ints) -> Ints:
        """Return the position of each message: one producer sends to each partition in order."""
        at = np.empty(len(partition), np.int64)
        for number in range(PARTITIONS):
            of_partition = np.flatnonzero(partition == number)
            at[of_partition] = position(number, self.reached[number] + np.arange(len(of_partition)))
            self.reached[number] += len(of_partition)
        return at


def position(partition: Ints | int, offset: Ints) -> Ints:
    """Return partition and offset as one number each."""
    return (np.int64(partition) << OFFSET_BITS) + offset


def produce_topics(
    exchange: Exchange, bootstrap: str, topics: tuple[str, str, str], options: ProduceOptions
) -> list[Topic]:
    """Fill three topics: with all messages, with those whose payload Avro can decode, and with the valid trades.

    Raise RuntimeError if the decoder and the producer do not agree on the number of valid trades.
    """
    stream = MessageStream(exchange.code, options, options.start_us())
    decoder = TradeDecoder(exchange, FixedSchemas((options.schema_id,)))
    every, decodable, trades_only = (
        _Filling(Sender({"bootstrap.servers": bootstrap}, name), np.zeros(PARTITIONS, np.int64), [], [])
        for name in topics
    )
    valid = []
    for messages in stream.chunks():
        batch = _batch(messages)
        decoded = decoder.decode(batch)
        ids = decoder.identify(batch).column("message_id")
        is_dead = np.zeros(len(ids), bool)
        is_dead[decoded.dead_letters.offset] = True
        is_readable = ids.is_valid().to_numpy(zero_copy_only=False)
        every.send(messages, is_dead)
        decodable.send(_only(messages, is_readable), is_dead[is_readable])
        trades_only.send(_only(messages, ~is_dead), is_dead[~is_dead])
        valid.append(decoded.trades.rows.column("message_id"))
    counts, trades = stream.counts, pa.chunked_array(valid)
    if len(trades) != counts.originals + counts.duplicates_exact + counts.duplicates_shifted:
        raise RuntimeError(f"the decoder found {len(trades)} valid trades, the producer sent {counts}")
    for filling in (every, decodable, trades_only):
        filling.sender.finish()
    return [
        Topic(
            name,
            bootstrap,
            {
                BRONZE.name: pa.chunked_array(filling.positions),
                SILVER.name: trades,
                DLQ.name: pa.chunked_array(filling.dead),
                GOLD.name: pa.chunked_array([trades.unique()]),
            },
        )
        for name, filling in zip(topics, (every, decodable, trades_only), strict=True)
    ]


def _batch(messages: Messages) -> MessageBatch:
    """Return the messages as a consumer would, with their number instead of an offset."""
    n = len(messages.values)
    rows = pa.RecordBatch.from_arrays(
        [
            pa.array(messages.keys, pa.binary()),
            pa.array(messages.values, pa.binary()),
            timestamps(messages.time_us // 1000),
        ],
        schema=MESSAGE_SCHEMA,
    )
    return MessageBatch(rows, np.zeros(n, np.int32), np.arange(n), [(0, 0, n)])


def _only(messages: Messages, chosen: np.ndarray) -> Messages:
    rows = np.flatnonzero(chosen).tolist()
    return Messages(
        [messages.values[i] for i in rows],
        [messages.keys[i] for i in rows],
        messages.time_us[chosen],
        messages.route[chosen],
    )
