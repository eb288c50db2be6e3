"""Time from Kafka to Gold, observed from outside the flow: the topic, and Gold's ledger."""

import time
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import Consumer, TopicPartition

from k2flow.config.settings import load_settings
from k2flow.errors import CatalogError
from k2flow.exchange import Exchange, exchange_names
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.ledger import read
from k2flow.layers import GOLD_TABLE

SAMPLE_SECONDS = 0.05
SETTLE_SECONDS = 20.0
ANSWER_SECONDS = 60.0
"""How long the broker may take to answer on a busy machine."""


class GoldWatch:
    """`ages`: seconds from the oldest message of each commit to the commit; `behind`: messages never seen in Gold.

    Ages are as exact as the samples are dense (50 ms), and err on the long side.
    """

    def __init__(self, exchange: Exchange, home: Path, bootstrap: str) -> None:
        self._exchange = exchange
        self._topic = exchange.settings.topic
        self._catalog = open_catalog(load_settings(exchange_names()).model_copy(update={"home": home}))
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "freshness"})
        self._ends: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self.ages: list[float] = []
        self.commits = 0
        self.behind = 0

    def watch(self, producing: Callable[[], bool]) -> None:
        """Sample until `producing` returns False and Gold holds all messages, or no longer changes."""
        seen, deadline = 0, float("inf")
        while time.monotonic() < deadline:
            if deadline == float("inf") and not producing():
                deadline = time.monotonic() + SETTLE_SECONDS
            end = self._end()
            self._ends.append((time.monotonic(), end))
            held = self._held()
            if held > seen:
                self.commits += 1
                self.ages.append(time.monotonic() - self._time_of(seen))
                seen = held
            if deadline < float("inf") and held >= end:
                break
            time.sleep(SAMPLE_SECONDS)
        self.behind = self._ends[-1][1] - seen
        self._consumer.close()

    def _time_of(self, offset: int) -> float:
        """Return the last sampled time at which the topic held at most `offset` messages."""
        return max((t for t, end in self._ends if end <= offset), default=self._ends[0][0])

    def _end(self) -> int:
        partitions = range(self._exchange.settings.partitions)
        return sum(
            self._consumer.get_watermark_offsets(TopicPartition(self._topic, p), timeout=ANSWER_SECONDS)[1]
            for p in partitions
        )

    def _held(self) -> int:
        try:
            properties = load_table(self._catalog, GOLD_TABLE).properties
        except CatalogError:
            return 0
        return sum(e.next for e in read(properties, self._exchange.name, self._topic).partitions.values())
