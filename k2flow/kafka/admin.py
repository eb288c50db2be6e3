"""What is asked of a broker beside messages: is it the right one, which topics has it, make these."""

import logging
from collections.abc import Mapping

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic
from confluent_kafka.error import KafkaError as BrokerError

from k2flow.errors import KafkaError
from k2flow.observability.logs import ClientLog

log = logging.getLogger(__name__)


class Admin:
    """Questions to one broker, each given `timeout_seconds`. librdkafka's own lines are logged at DEBUG."""

    def __init__(self, bootstrap: str, timeout_seconds: float = 10.0, config: Mapping[str, str] | None = None) -> None:
        """`config`: more of librdkafka's properties, such as those of SASL and TLS."""
        self._bootstrap = bootstrap
        self._timeout = timeout_seconds
        timeout_ms = int(timeout_seconds * 1000)
        own = {"bootstrap.servers": bootstrap, "log_level": 3, "socket.timeout.ms": timeout_ms}
        self._client = AdminClient({**(config or {}), **own}, logger=ClientLog(log))

    def answers(self, cluster: str | None, timeout_seconds: float) -> bool:
        """True if a broker of this cluster, and of no other, answers within `timeout_seconds`; None: any."""
        try:
            found = self._client.list_topics(timeout=timeout_seconds).cluster_id
        except KafkaException:
            return False
        return cluster is None or bool(found == cluster)

    def topics(self) -> dict[str, int]:
        """The topics that are not Kafka's own, each with its number of partitions. Raises KafkaError."""
        try:
            found = self._client.list_topics(timeout=self._timeout).topics
        except KafkaException as error:
            raise KafkaError(f"no answer from Kafka at {self._bootstrap}: {_reason(error)}") from error
        names = sorted(name for name in found if not name.startswith("__"))
        return {name: len(found[name].partitions) for name in names}

    def create(self, wanted: Mapping[str, int]) -> list[str]:
        """Makes the topics that are missing; existing ones are left as they are.

        Returns one sentence for each topic that exists with another number of partitions. Raises KafkaError.
        """
        existing = self.topics()
        missing = [NewTopic(name, count, 1) for name, count in wanted.items() if name not in existing]
        if missing:
            for name, future in self._client.create_topics(missing, operation_timeout=self._timeout).items():
                try:
                    future.result(self._timeout)
                except KafkaException as error:
                    if error.args[0].code() != BrokerError.TOPIC_ALREADY_EXISTS:
                        raise KafkaError(f"topic {name} could not be made: {_reason(error)}") from error
                except TimeoutError:
                    raise KafkaError(f"topic {name} could not be made within {self._timeout} s") from None
        return [
            f"topic {name} has {existing[name]} partitions, {count} were asked for: it is left as it is"
            for name, count in wanted.items()
            if existing.get(name, count) != count
        ]


def _reason(error: KafkaException) -> str:
    return str(error.args[0].str()) if error.args else str(error)
