"""Sends messages to Kafka, and proves that they arrived."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

from confluent_kafka import KafkaError as BrokerError
from confluent_kafka import KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from k2flow.errors import KafkaError, ProduceError
from k2flow.observability.logs import ClientLog
from k2flow.sandbox.producer.manifest import PartitionRange
from k2flow.sandbox.producer.stream import Messages

log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 10.0
_MIN_WAIT_SECONDS = 0.002  # so that a fast stream does not spin
_PROGRESS_STEP = 100
_DEFAULTS = {
    "linger.ms": "20",
    "batch.size": "500000",
    "compression.type": "lz4",
    "queue.buffering.max.messages": "200000",
    "queue.buffering.max.kbytes": "262144",
    "message.timeout.ms": "60000",
}
_FIXED: dict[str, object] = {
    "acks": "all",
    "enable.idempotence": "true",
    "delivery.report.only.error": True,  # one report per message costs more than the message
}


class Sender:
    """Sends to one topic: all in-sync replicas acknowledge each message exactly once, or `finish` raises.

    `config` has properties for librdkafka. Raises KafkaError if a property is wrong, no broker answers, or the topic
    does not exist.
    """

    def __init__(self, config: Mapping[str, str], topic: str) -> None:
        self._topic = topic
        self._failures: Counter[str] = Counter()
        self._last_error = ""
        settings: dict[str, object] = {**_DEFAULTS, **config, **_FIXED}
        self._flush_seconds = float(str(settings["message.timeout.ms"])) / 1000 + _TIMEOUT_SECONDS
        settings |= {"on_delivery": self._on_delivery, "error_cb": self._on_error}
        try:
            self._admin = AdminClient(dict(config), logger=ClientLog(log))
            self._producer = Producer(settings, logger=ClientLog(log))
        except KafkaException as error:
            raise KafkaError(f"a K2FLOW_KAFKA_* setting is wrong: {_reason(error)}") from error
        self._first = self._ends(self._partitions(config))
        self._sent = dict.fromkeys(self._first, 0)

    def send(
        self, messages: Messages, epoch: float | None = None, progress: Callable[[int], None] | None = None
    ) -> None:
        """Hand over the messages, in order, and wait while the queue is full.

        `epoch` is `time.monotonic()` at Kafka time 0, to send each message at its Kafka time; None: send at once.
        `progress` takes the number handed over since its last call. Raises ProduceError if a delivery has failed.
        """
        produce, poll, topic = self._producer.produce, self._producer.poll, self._topic
        partitions = list(self._sent)
        targets = [partitions[i] for i in (messages.route % len(partitions)).tolist()]
        times = messages.time_us.tolist()
        reported, now = 0, time.monotonic()
        for i, (value, key, partition, time_us) in enumerate(
            zip(messages.values, messages.keys, targets, times, strict=True)
        ):
            if epoch is not None and epoch + time_us / 1e6 > now:
                if progress is not None and i - reported >= _PROGRESS_STEP:
                    progress(i - reported)
                    reported = i
                now = self._wait_until(epoch + time_us / 1e6)
            while True:
                try:
                    produce(topic, value, key, partition, timestamp=time_us // 1000)
                    break
                except BufferError:
                    poll(0.05)
                    self._raise_failures()
        for partition, count in Counter(targets).items():
            self._sent[partition] += count
        poll(0)
        self._raise_failures()
        if progress is not None:
            progress(len(targets) - reported)

    def finish(self) -> dict[int, PartitionRange]:
        """Wait until every message is acknowledged; return the messages of each partition.

        Raises ProduceError if a message was not acknowledged in time, or is not in the topic.
        """
        left = self._producer.flush(self._flush_seconds)
        if left:
            self._failures["no acknowledgement in time"] += left
        self._raise_failures()
        after = self._ends(list(self._sent))
        ranges = {
            partition: PartitionRange(sent, self._first[partition], after[partition])
            for partition, sent in self._sent.items()
        }
        lost = sum(max(0, found.sent - (found.next - found.first)) for found in ranges.values())
        if lost:
            raise ProduceError(
                f"{lost} messages that were acknowledged are not in topic {self._topic}: check whether it was recreated"
            )
        return ranges

    def _wait_until(self, due: float) -> float:
        """Wait until `due`, a few ms at least; return the time."""
        while (now := time.monotonic()) < due:
            self._producer.poll(max(due - now, _MIN_WAIT_SECONDS))
            self._raise_failures()
        return now

    def _raise_failures(self) -> None:
        if self._failures:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in self._failures.most_common())
            pending = len(self._producer)
            self._producer.purge()
            waiting = f", {pending} more were not acknowledged yet" if pending else ""
            last_error = f"; last error: {self._last_error}" if self._last_error else ""
            raise ProduceError(
                f"{self._failures.total()} messages to topic {self._topic} failed ({reasons}){waiting}: "
                f"sending stopped{last_error}"
            )

    def _on_delivery(self, error: BrokerError | None, _: Message) -> None:
        if error is not None:
            self._failures[error.str()] += 1

    def _on_error(self, error: BrokerError) -> None:
        self._last_error = error.str()

    def _partitions(self, config: Mapping[str, str]) -> list[int]:
        servers = config.get("bootstrap.servers", "")
        try:
            topics = self._admin.list_topics(timeout=_TIMEOUT_SECONDS).topics
        except KafkaException as error:
            raise KafkaError(
                f"no Kafka answers at {servers} ({_reason(error)}): start it (`k2flow kafka start`), "
                "or set K2FLOW_KAFKA_BOOTSTRAP_SERVERS"
            ) from error
        if self._topic not in topics:
            raise KafkaError(f"topic {self._topic} does not exist at {servers}: create it, or set the exchange's topic")
        return sorted(topics[self._topic].partitions)

    def _ends(self, partitions: list[int]) -> dict[int, int]:
        """Return the next offset of each partition. Raises KafkaError."""
        asked = {TopicPartition(self._topic, partition): OffsetSpec.latest() for partition in partitions}
        try:
            for attempt in Retrying(  # a new topic may have no leaders yet
                retry=retry_if_exception(_is_retryable),
                stop=stop_after_delay(_TIMEOUT_SECONDS),
                wait=wait_fixed(0.2),
                reraise=True,
            ):
                with attempt:
                    found = self._admin.list_offsets(asked, request_timeout=_TIMEOUT_SECONDS)
                    ends = {place.partition: int(future.result().offset) for place, future in found.items()}
            return ends
        except KafkaException as error:
            raise KafkaError(f"the offsets of topic {self._topic} cannot be read: {_reason(error)}") from error


def _is_retryable(error: BaseException) -> bool:
    codes = (
        BrokerError.LEADER_NOT_AVAILABLE,
        BrokerError.NOT_LEADER_FOR_PARTITION,
        BrokerError.UNKNOWN_TOPIC_OR_PART,
        BrokerError.FENCED_LEADER_EPOCH,
        BrokerError.UNKNOWN_LEADER_EPOCH,
    )
    return isinstance(error, KafkaException) and error.args[0].code() in codes


def _reason(error: KafkaException) -> str:
    return str(error.args[0].str()) if error.args else str(error)
