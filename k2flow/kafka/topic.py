"""A topic as the broker describes it: whether it exists, its partitions, and the offsets it still has."""

import logging
from collections.abc import Mapping
from concurrent.futures import wait
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaException, TopicCollection, TopicPartition
from confluent_kafka import KafkaError as ConfluentError
from confluent_kafka.admin import AdminClient
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from k2flow.config.settings import KAFKA_PREFIX
from k2flow.errors import KafkaError, SettingsError
from k2flow.iceberg.ledger import Ledger
from k2flow.kafka.tls import certificate_problem

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
_REFUSED = {ConfluentError._AUTHENTICATION, ConfluentError._SSL}
TOKEN = "OAUTHBEARER token"
"""In librdkafka's error if it got no token: an outage of the token's issuer, not a refusal by the broker."""


@dataclass(frozen=True)
class Topic:
    """A topic as it is now. `id` is Kafka's own: a topic that was deleted and created again has another one."""

    name: str
    id: str
    partitions: tuple[int, ...]

    def same_as(self, topic_id: str) -> bool:
        """Whether a ledger with this topic id is of this very topic. An unknown id counts as the same."""
        return not (self.id and topic_id) or self.id == topic_id

    def held(self, ledger: Ledger) -> Ledger:
        """Return the ledger, or an empty one if it is of an earlier topic."""
        return ledger if self.same_as(ledger.topic_id) else Ledger(self.name)


class BrokerDownError(Exception):
    """No broker answers; one may later."""


def wait_for_topic(config: Mapping[str, str], name: str) -> Topic:
    """Return the topic as soon as a broker answers. Log that it waits.

    Raises:
        KafkaError: A broker answers, but the topic is missing or cannot be read.
        SettingsError: librdkafka does not know a property.
    """
    return _retrying()(_TopicClient(config).describe, name)


def find_topic(config: Mapping[str, str], name: str) -> Topic:
    """Return the topic as it is now, without waiting.

    Raises:
        BrokerDownError: No broker answers.
        KafkaError: A broker answers, but the topic is missing or cannot be read.
        SettingsError: librdkafka does not know a property.
    """
    return _TopicClient(config).describe(name)


def check_properties(config: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `config`, if librdkafka knows its properties.

    Raises:
        SettingsError: It does not.
    """
    try:
        AdminClient(dict(config), logger=log)
    except KafkaException as error:
        reason = error.args[0].str()
        raise SettingsError(f"a {KAFKA_PREFIX}* setting is wrong: {reason}") from error
    return dict(config)


class _TopicClient:
    """Describes a topic, or says why no broker answered."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self._config = config
        self._servers = config["bootstrap.servers"]
        self._errors: list[ConfluentError] = []
        own = {"error_cb": self._errors.append, "log_level": 0}  # it logs each of its attempts, many per second
        self._admin = AdminClient({**check_properties(config), **own}, logger=log)

    def describe(self, name: str) -> Topic:
        try:
            future = self._admin.describe_topics(TopicCollection([name]), request_timeout=TIMEOUT_SECONDS)[name]
            while not wait([future], POLL_SECONDS).done:
                self._admin.poll(0)
                down = [each for each in self._errors if each.code() == ConfluentError._ALL_BROKERS_DOWN]
                if down and any(each.code() in _REFUSED for each in self._errors):
                    raise self._explained(name, down[-1])
            found = future.result()
        except KafkaException as error:
            raise self._explained(name, error.args[0]) from error
        partitions = tuple(sorted(p.id for p in found.partitions))
        return Topic(name, str(found.topic_id), partitions)

    def _explained(self, name: str, error: ConfluentError) -> KafkaError | BrokerDownError:
        """Return the error to raise. The request only times out if a broker refuses the connection."""
        while self._admin.poll(0):
            pass
        refused = [each for each in self._errors if each.code() in _REFUSED]
        self._errors.clear()
        if refused and error.code() in _UNANSWERED:
            error = refused[-1]
        if error.code() == ConfluentError._AUTHENTICATION and TOKEN in error.str():
            return BrokerDownError(f"no token to show a Kafka broker: {error.str()}")
        if error.code() == ConfluentError._SSL and (problem := certificate_problem(self._config)):
            return BrokerDownError(f"a Kafka broker's certificate is not trusted: {problem} (ssl.ca.location)")
        if error.code() == ConfluentError.UNKNOWN_TOPIC_OR_PART:
            return KafkaError(
                f"topic {name} does not exist on {self._servers}: create it, or set K2FLOW_<EXCHANGE>_TOPIC"
            )
        if error.code() in _FATAL:
            return KafkaError(f"topic {name} on {self._servers} cannot be used: {error.str()}")
        return BrokerDownError(f"no Kafka broker answers at {self._servers} ({error.str()})")


def _retrying() -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(BrokerDownError),
        wait=wait_exponential_jitter(initial=0.5, max=10),
        before_sleep=_log_waiting,
    )


def _log_waiting(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning(
        "%s; waiting for it (start one with `k2flow kafka start`, or set K2FLOW_KAFKA_BOOTSTRAP_SERVERS)", error
    )


def watermarks(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """Return the first offset that Kafka has, and the one that the next committed message will get.

    Raises:
        KafkaError: The broker gives no offsets.
    """
    try:
        return watermarks_now(consumer, topic, partition)
    except BrokerDownError as error:
        raise KafkaError(str(error)) from error


def watermarks_now(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """Return the same as `watermarks`, but keep outages apart.

    Raises:
        BrokerDownError: The cause may pass.
        KafkaError: It does not pass.
    """
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
    """Return the same as `watermarks` as soon as a broker answers. Log that it waits. Raises KafkaError."""
    return _retrying()(watermarks_now, consumer, topic, partition)
