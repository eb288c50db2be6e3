"""A topic as the broker describes it: whether it exists, its partitions, and the offsets it still has."""

import logging
import socket
import ssl
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from confluent_kafka import IsolationLevel, KafkaException, TopicCollection, TopicPartition
from confluent_kafka import KafkaError as ConfluentError
from confluent_kafka.admin import AdminClient, ListOffsetsResultInfo, OffsetSpec
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from k2flow.config.settings import KAFKA_PREFIX
from k2flow.errors import KafkaError, KafkaRefusedError, NoTopicError, SettingsError
from k2flow.iceberg.ledger import NO_TOPIC_IDS, Ledger
from k2flow.observability.logs import ClientLog
from k2flow.retryable import Verdict, kafka_verdict

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 10.0
TLS_TIMEOUT_SECONDS = 5.0
_DEFAULT_PORT = 9092  # librdkafka's
POLL_SECONDS = 0.1
_NO_LEADER = ConfluentError._NOENT  # of a request for offsets; elsewhere it is fatal
_COMMITTED = IsolationLevel.READ_COMMITTED
_UNANSWERED = {
    ConfluentError._TIMED_OUT,
    ConfluentError._TRANSPORT,
    ConfluentError._RESOLVE,
    ConfluentError._ALL_BROKERS_DOWN,
}
_REFUSED = {ConfluentError._AUTHENTICATION, ConfluentError._SSL}
TOKEN = "OAUTHBEARER token"
"""In librdkafka's error if it got no token: an outage of the token's issuer, not a refusal by the broker."""


@dataclass(frozen=True)
class Topic:
    """A topic as it is now. `id` is Kafka's own: a topic that was deleted and created again has another one.

    It is empty if the broker knows no topic ids (Kafka before 2.8, some compatible brokers).
    """

    name: str
    id: str
    partitions: tuple[int, ...]

    def same_as(self, topic_id: str) -> bool:
        """Whether a ledger with this topic id is of this very topic. An unknown id counts as the same."""
        return not (self.id and topic_id) or self.id == topic_id

    def held(self, ledger: Ledger) -> Ledger:
        """Return the ledger, or one without offsets if it is of an earlier topic (see `Ledger.of_topic`)."""
        return ledger.of_topic(self.id)


class BrokerDownError(Exception):
    """No broker answers; one may later."""


def wait_for_topic(config: Mapping[str, str], name: str, was_read: Callable[[], bool] = lambda: False) -> Topic:
    """Return the topic as soon as a broker answers and may be asked for it. Log that it waits.

    A topic that `was_read` may come back. Any other missing one is misspelt: KafkaError. Also raises KafkaError for an
    error that cannot pass, SettingsError if librdkafka does not know a property.
    """
    client = _TopicClient(config)

    def describe() -> Topic:
        try:
            return client.describe(name)
        except NoTopicError as error:
            if not was_read():
                raise
            raise KafkaRefusedError(str(error)) from error

    return _retrying()(describe)


def find_topic(config: Mapping[str, str], name: str) -> Topic:
    """Return the topic as it is now. Raises as `wait_for_topic`, and what that waits for.

    That is BrokerDownError if no broker answers, KafkaRefusedError if one refuses.
    """
    return _TopicClient(config).describe(name)


def check_properties(config: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `config`. Raises SettingsError if librdkafka does not know a property."""
    try:
        AdminClient(dict(config), logger=log)
    except KafkaException as error:
        raise SettingsError(f"a {KAFKA_PREFIX}* setting is wrong: {error.args[0].str()}") from error
    return dict(config)


class _TopicClient:
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
        topic_id = str(found.topic_id)
        return Topic(name, "" if topic_id in NO_TOPIC_IDS else topic_id, tuple(sorted(p.id for p in found.partitions)))

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
        if error.code() == ConfluentError._SSL and (problem := _certificate_problem(self._config)):
            return BrokerDownError(f"a Kafka broker's certificate is not trusted: {problem} (ssl.ca.location)")
        if error.code() == ConfluentError.UNKNOWN_TOPIC_OR_PART:
            return NoTopicError(
                f"topic {name} does not exist on {self._servers}: create it, or set K2FLOW_<EXCHANGE>_TOPIC"
            )
        if error.code() not in _UNANSWERED:
            refused_for_now = kafka_verdict(error.code()) is Verdict.RETRIED
            text = f"topic {name} on {self._servers} cannot be used: {error.str()}"
            return (KafkaRefusedError if refused_for_now else KafkaError)(text)
        return BrokerDownError(f"no Kafka broker answers at {self._servers} ({error.str()})")


def _certificate_problem(config: Mapping[str, str]) -> str | None:
    """Return what is wrong with the first untrusted certificate among the brokers of `bootstrap.servers`.

    librdkafka does not report it. None if all certificates are trusted, or no broker answers.
    """
    authority = config.get("ssl.ca.location")
    folder = authority is not None and Path(authority).is_dir()
    with suppress(OSError, ValueError):
        context = ssl.create_default_context(cafile=None if folder else authority, capath=authority if folder else None)
        for server in filter(None, map(str.strip, config["bootstrap.servers"].split(","))):
            at = urlsplit(server if "://" in server else f"//{server}")
            host = at.hostname or ""
            try:
                with (
                    socket.create_connection((host, at.port or _DEFAULT_PORT), TLS_TIMEOUT_SECONDS) as connection,
                    context.wrap_socket(connection, server_hostname=host),
                ):
                    pass
            except ssl.SSLCertVerificationError as error:
                return f"{server}: {error.verify_message}"
    return None


def _retrying() -> Retrying:
    return Retrying(
        retry=retry_if_exception_type((BrokerDownError, KafkaRefusedError)),
        wait=wait_exponential_jitter(initial=0.5, max=10),
        before_sleep=_log_waiting,
    )


def _log_waiting(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, KafkaRefusedError):
        log.warning("%s; waiting, nothing is skipped meanwhile", error)
    else:
        log.warning(
            "%s; waiting for it (start one with `k2flow kafka start`, or set K2FLOW_KAFKA_BOOTSTRAP_SERVERS)", error
        )


def find_watermarks(
    config: Mapping[str, str], topic: str, partitions: Collection[int], seconds: float = TIMEOUT_SECONDS
) -> dict[int, tuple[int, int]]:
    """Return, by partition, the first offset that Kafka has, and the one of the next committed message.

    A client of its own asks: one that has heard of a partition without a leader does not ask for its leader again, and
    after a broker's disk was restored it takes the new leader for an old one. Raises BrokerDownError if the cause may
    pass, else KafkaError.
    """
    places = [TopicPartition(topic, p) for p in partitions]
    if not places:
        return {}
    try:
        client = offsets_client(config, topic, seconds)
    except KafkaException as error:
        raise _no_offsets(topic, error) from error
    asked = [
        client.list_offsets(dict.fromkeys(places, offset), isolation_level=_COMMITTED, request_timeout=seconds)
        for offset in (OffsetSpec.earliest(), OffsetSpec.latest())
    ]
    low, high = ({place.partition: _offset(place, future) for place, future in answers.items()} for answers in asked)
    return {p: (low[p], high[p]) for p in partitions}


def offsets_client(config: Mapping[str, str], topic: str, seconds: float = TIMEOUT_SECONDS) -> AdminClient:
    """Return a new client that knows the leaders of a topic: it would wait 3 s for them before a request for offsets.

    Raises KafkaException.
    """
    client = AdminClient({**config, "allow.auto.create.topics": "false"}, logger=ClientLog(log))
    client.list_topics(topic, timeout=seconds)
    return client


def _offset(place: TopicPartition, future: Future[ListOffsetsResultInfo]) -> int:
    try:
        return int(future.result().offset)
    except KafkaException as error:
        raise _no_offsets(f"{place.topic}[{place.partition}]", error) from error


def _no_offsets(where: str, error: KafkaException) -> KafkaError | BrokerDownError:
    reason, code = f"{where}: no offsets from Kafka ({error.args[0].str()})", error.args[0].code()
    # That a client or broker knows no such partition passes: it has not heard of a new one, or of its leader, yet.
    passes = code == _NO_LEADER or kafka_verdict(code) is Verdict.RETRIED
    return BrokerDownError(reason) if passes else KafkaError(reason)


def wait_for_watermarks(
    config: Mapping[str, str], topic: str, partitions: Collection[int]
) -> dict[int, tuple[int, int]]:
    """Return the same as `find_watermarks` as soon as Kafka answers. Log that it waits. Raises KafkaError."""
    return _retrying()(find_watermarks, config, topic, partitions)
