"""What Kafka says of a topic: whether it is there, its partitions, and the offsets it still has."""

import logging
from collections.abc import Mapping
from concurrent.futures import wait
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaException, TopicCollection, TopicPartition
from confluent_kafka import KafkaError as ConfluentError
from confluent_kafka.admin import AdminClient
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from k2flow.config.settings import KAFKA_PREFIX
from k2flow.errors import KafkaError, LostOffsetsError, SettingsError
from k2flow.iceberg.ledger import Ledger, start_offsets
from k2flow.kafka.tls import distrust

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
POLL_SECONDS = 0.1
_FATAL = {
    ConfluentError._AUTHENTICATION,
    ConfluentError.TOPIC_AUTHORIZATION_FAILED,
    ConfluentError.CLUSTER_AUTHORIZATION_FAILED,
    ConfluentError.SASL_AUTHENTICATION_FAILED,
    ConfluentError.TOPIC_EXCEPTION,
}
_UNANSWERED = {ConfluentError._TIMED_OUT, ConfluentError._TRANSPORT, ConfluentError._ALL_BROKERS_DOWN}
TOKEN = "OAUTHBEARER token"
"""What librdkafka speaks of where a token could not be had, which passes, and is no broker's refusal."""
_REFUSED = {ConfluentError._AUTHENTICATION, ConfluentError._SSL}


@dataclass(frozen=True)
class Topic:
    """A topic as it is now. `id` is Kafka's own (another one after the topic was deleted and made again)."""

    name: str
    id: str
    partitions: tuple[int, ...]

    def same_as(self, topic_id: str) -> bool:
        """Whether a ledger with this topic id speaks of this very topic; an unknown id may be of any."""
        return not (self.id and topic_id) or self.id == topic_id

    def held(self, ledger: Ledger) -> Ledger:
        """What a ledger says of this very topic: nothing, if it speaks of an earlier one."""
        return ledger if self.same_as(ledger.topic_id) else Ledger(self.name)


class BrokerDownError(Exception):
    """No broker answers; it may come back."""


def wait_for_topic(config: Mapping[str, str], name: str) -> Topic:
    """The topic, as soon as a broker answers; says in the log that it waits.

    Raises KafkaError where the broker answers but the topic is missing or may not be read, SettingsError for a property
    that librdkafka does not know.
    """
    return _waiting()(_Asker(config).describe, name)


def find_topic(config: Mapping[str, str], name: str) -> Topic:
    """The topic as it is now, without waiting. Raises BrokerDownError, and what `wait_for_topic` raises."""
    return _Asker(config).describe(name)


def checked(config: Mapping[str, str]) -> dict[str, str]:
    """`config`, if librdkafka knows its properties. Raises SettingsError."""
    try:
        AdminClient(dict(config), logger=log)
    except KafkaException as error:
        reason = error.args[0].str()
        raise SettingsError(f"a {KAFKA_PREFIX}* setting is wrong: {reason}") from error
    return dict(config)


class _Asker:
    """Asks for a topic, and knows why it got no answer."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self._config = config
        self._servers = config["bootstrap.servers"]
        self._complaints: list[ConfluentError] = []
        own = {"error_cb": self._complaints.append, "log_level": 0}  # it logs each of its attempts, many a second
        self._admin = AdminClient({**checked(config), **own}, logger=log)

    def describe(self, name: str) -> Topic:
        try:
            future = self._admin.describe_topics(TopicCollection([name]), request_timeout=TIMEOUT_SECONDS)[name]
            while not wait([future], POLL_SECONDS).done:
                self._admin.poll(0)
                down = [each for each in self._complaints if each.code() == ConfluentError._ALL_BROKERS_DOWN]
                if down and any(each.code() in _REFUSED for each in self._complaints):
                    raise self._explained(name, down[-1])
            found = future.result()
        except KafkaException as error:
            raise self._explained(name, error.args[0]) from error
        partitions = tuple(sorted(p.id for p in found.partitions))
        return Topic(name, str(found.topic_id), partitions)

    def _explained(self, name: str, error: ConfluentError) -> KafkaError | BrokerDownError:
        """The request itself has only timed out where the broker does not let anybody in."""
        while self._admin.poll(0):
            pass
        refused = [each for each in self._complaints if each.code() in _REFUSED]
        self._complaints.clear()
        if refused and error.code() in _UNANSWERED:
            error = refused[-1]
        if error.code() == ConfluentError._AUTHENTICATION and TOKEN in error.str():
            return BrokerDownError(f"no token to show a Kafka broker: {error.str()}")
        if error.code() == ConfluentError._SSL and (why := distrust(self._config)):
            return BrokerDownError(f"a Kafka broker's certificate is not trusted: {why} (ssl.ca.location)")
        if error.code() == ConfluentError.UNKNOWN_TOPIC_OR_PART:
            return KafkaError(
                f"topic {name} does not exist on {self._servers}: create it, or set K2FLOW_<EXCHANGE>_TOPIC"
            )
        if error.code() in _FATAL:
            return KafkaError(f"topic {name} on {self._servers} cannot be used: {error.str()}")
        return BrokerDownError(f"no Kafka broker answers at {self._servers} ({error.str()})")


def _waiting() -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(BrokerDownError),
        wait=wait_exponential_jitter(initial=0.5, max=10),
        before_sleep=_say_waiting,
    )


def _say_waiting(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning(
        "%s; waiting for it (start one with `k2flow kafka start`, or set K2FLOW_KAFKA_BOOTSTRAP_SERVERS)", error
    )


def watermarks(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """The first offset that Kafka has, and the one that the next committed message will get. Raises KafkaError."""
    try:
        return watermarks_now(consumer, topic, partition)
    except BrokerDownError as error:
        raise KafkaError(str(error)) from error


def watermarks_now(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """`watermarks`, which raises BrokerDownError where that may pass, KafkaError where it does not."""
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=TIMEOUT_SECONDS)
    except KafkaException as error:
        reason = f"{topic}[{partition}]: no offsets from Kafka ({error.args[0].str()})"
        # That the client itself knows no such partition passes: it has not heard of a new one, or of its leader, yet.
        if error.args[0].code() in {*_FATAL, ConfluentError.UNKNOWN_TOPIC_OR_PART}:
            raise KafkaError(reason) from error
        raise BrokerDownError(reason) from error
    return low, high


def wait_for_watermarks(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """`watermarks`, as soon as a broker answers; says in the log that it waits. Raises KafkaError."""
    return _waiting()(watermarks_now, consumer, topic, partition)


def check_same_topic(topic: Topic, ledgers: Mapping[str, Ledger], accept_lost: bool, setting: str) -> None:
    """Raises LostOffsetsError where a table's ledger speaks of an earlier topic of the same name."""
    for table, ledger in ledgers.items():
        if not topic.same_as(ledger.topic_id) and not accept_lost:
            ends = ", ".join(f"[{p}] before {e.next}" for p, e in sorted(ledger.partitions.items()))
            raise LostOffsetsError(
                f"topic {topic.name} was deleted and made again: {table} holds the old "
                f"one's partitions {ends}; what the old one had beyond is gone. To go on with the new topic from "
                f"its first offset set {setting}=1 for one start"
            )


def first_offset(
    topic: Topic, partition: int, wanted: int | None, low: int, high: int, accept_lost: bool, setting: str
) -> int:
    """Where to begin a partition: `wanted`, or the first that Kafka has for a partition never read before.

    Raises LostOffsetsError, with the exact offsets, where Kafka no longer has `wanted` and the loss is not accepted.
    """
    if wanted is None:
        return low
    if low <= wanted <= high:
        return wanted
    where = f"{topic.name}[{partition}]"
    if wanted > high:
        raise LostOffsetsError(
            f"{where}: the tables end before offset {wanted} but the topic ends before {high}: it was made "
            "again or cut off. Restore the topic, or write to new tables"
        )
    if not accept_lost:
        raise LostOffsetsError(
            f"{where}: offsets {wanted} to {low - 1} ({low - wanted} of them) were never committed and Kafka "
            f"no longer has them. To go on without them set {setting}=1 for one start"
        )
    log.error("%s: offsets %d to %d are lost; going on, as %s says", where, wanted, low - 1, setting)
    return low


def begin_offsets(topic: Topic, ledgers: Mapping[str, Ledger]) -> dict[int, int]:
    """The smallest next offset over the tables, by partition; what a table holds of an earlier topic does not count."""
    return start_offsets(map(topic.held, ledgers.values()))
