"""Sends trades to a Kafka topic: those of a simulated market (`produce`), or recorded ones (the module `replay`)."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from k2flow.exchange import DEDUP_KEY
from k2flow.sandbox.producer.manifest import Manifest, PartitionRange
from k2flow.sandbox.producer.send import Sender
from k2flow.sandbox.producer.stream import MessageStream, ProduceOptions

__all__ = ["Manifest", "PartitionRange", "ProduceOptions", "produce"]


def produce(
    exchange_code: str,
    topic: str,
    kafka_config: Mapping[str, str],
    options: ProduceOptions,
    progress: Callable[[int], None] | None = None,
    dedup_key: tuple[str, ...] = DEDUP_KEY,
) -> Manifest:
    """Send simulated trades of one exchange to its topic; return when all are acknowledged.

    Each message is in the topic exactly once, or an error is raised: KafkaError if no broker answers or the topic does
    not exist, ProduceError if messages were not delivered. `exchange_code` is the value of TradeV2's `exchange`, such
    as `BINANCE`. `kafka_config` has properties for librdkafka. `progress` takes the number sent since its last call.
    `dedup_key` is the exchange's: the manifest's rows of Gold follow it.
    """
    sender = Sender(kafka_config, topic)
    started, clock = datetime.now(UTC), time.monotonic()
    start_us = options.start_us()
    stream = MessageStream(exchange_code, options, start_us)
    epoch = clock - start_us / 1e6 if options.rate else None
    for messages in stream.chunks():
        sender.send(messages, epoch, progress)
    partitions = sender.finish()
    counts = stream.counts
    return Manifest(
        exchange=exchange_code,
        topic=topic,
        schema_id=options.schema_id,
        seed=options.seed,
        started=started.isoformat(),
        ended=datetime.now(UTC).isoformat(),
        seconds=round(time.monotonic() - clock, 3),
        originals=counts.originals,
        duplicates_exact=counts.duplicates_exact,
        duplicates_shifted=counts.duplicates_shifted,
        bad=dict(counts.bad),
        partitions=partitions,
        handlers=options.handlers,
        trades=counts.trades,
        dedup_key=dedup_key,
    )
