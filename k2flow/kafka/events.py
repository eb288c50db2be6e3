"""The events that come in place of messages, other than the end of a partition."""

import logging

from confluent_kafka import KafkaError as ConfluentError

from k2flow.errors import KafkaError, LostOffsetsError
from k2flow.kafka.consumer import PartitionEvent

log = logging.getLogger(__name__)

_LOST = {ConfluentError._AUTO_OFFSET_RESET, ConfluentError.OFFSET_OUT_OF_RANGE}
_MISSING = {ConfluentError.UNKNOWN_TOPIC_OR_PART, ConfluentError._UNKNOWN_PARTITION}
_FATAL = {
    ConfluentError._FATAL,
    ConfluentError.TOPIC_AUTHORIZATION_FAILED,
    ConfluentError.GROUP_AUTHORIZATION_FAILED,
}


def check_event(event: PartitionEvent, topic: str, position: int | None) -> None:
    """Log an event from which librdkafka recovers by itself; `position` is the next offset of its partition.

    Raises:
        LostOffsetsError: Kafka no longer has the next offset.
        KafkaError: librdkafka cannot recover.
    """
    where = f"{topic}[{event.partition}]"
    if event.code in _LOST:
        raise LostOffsetsError(
            f"{where}: Kafka no longer has offset {position}, which is the next to read ({event.text}); start again to "
            "see what is lost"
        )
    if event.code in _MISSING:
        raise KafkaError(f"{where}: the partition no longer exists ({event.text}); start again to see what is lost")
    if event.code in _FATAL:
        raise KafkaError(f"{topic}: {event.text}")
    log.warning("%s: %s; librdkafka keeps trying", topic, event.text)
