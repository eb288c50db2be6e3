"""Administration of a broker: whether it is the expected one, its topics, the creation of topics."""

import logging
from collections.abc import Mapping

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic
from confluent_kafka.error import KafkaError as BrokerError

from k2flow.errors import KafkaError
from k2flow.observability.logs import ClientLog

log = logging.getLogger(__name__)


class Admin:
    """A client for one broker. librdkafka's own lines are logged at DEBUG."""

    def __init__(self, bootstrap: str, timeout_seconds: float = 10.0, config: Mapping[str, str] | None = None) -> None:
        """Take the broker's address, the timeout of each request, and further properties such as those of SASL."""
        self._bootstrap = bootstrap
        self._timeout = timeout_seconds
        timeout_ms = int(timeout_seconds * 1000)
        own = {"bootstrap.servers": bootstrap, "log_level": 3, "socket.timeout.ms": timeout_ms}
        self._client = AdminClient({**(config or {}), **own}, logger=ClientLog(log))

    def answers(self, cluster: str | None, timeout_seconds: float) -> bool:
        """Whether a broker of this cluster answers within `timeout_seconds`; None means any cluster."""
        try:
            found = self._client.list_topics(timeout=timeout_seconds).cluster_id
        except KafkaException:
            return False
        return cluster is None or bool(found == cluster)

    def topics(self) -> dict[str, int]:
        """Return the topics that are not Kafka's own, with their numbers of partitions. Raises KafkaError."""
        try:
            found = self._client.list_topics(timeout=self._timeout).topics
        except KafkaException as error:
            raise KafkaError(f"no answer from Kafka at {self._bootstrap}: {_reason(error)}") from error
        names = sorted(name for name in found if not name.startswith("__"))
        return {name: len(found[name].partitions) for name in names}

    def create(self, wanted: Mapping[str, int]) -> list[str]:
        """Create missing topics; return a sentence for each with another number of partitions. Raises KafkaError."""
        existing = self.topics()
        missing = [NewTopic(name, count, 1) for name, count in wanted.items() if name not in existing]
        if missing:
            for name, future in self._client.create_topics(missing, operation_timeout=self._timeout).items():
                try:
                    future.result(self._timeout)
                except KafkaException as error:
                    if error.args[0].code() != BrokerError.TOPIC_ALREADY_EXISTS:
                        raise KafkaError(f"topic {name} could not be created: {_reason(error)}") from error
                except TimeoutError:
                    raise KafkaError(f"topic {name} could not be created within {self._timeout} s") from None
        return [
            f"topic {name} has {existing[name]} partitions, not {count}: it is left unchanged"
            for name, count in wanted.items()
            if existing.get(name, count) != count
        ]


def _reason(error: KafkaException) -> str:
    return str(error.args[0].str()) if error.args else str(error)
