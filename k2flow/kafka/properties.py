"""The properties of every consumer: what exactly-once delivery needs, and k2flow's defaults."""

import logging
from collections.abc import Mapping

from k2flow.config.settings import KAFKA_PREFIX
from k2flow.errors import SettingsError

log = logging.getLogger(__name__)
FORCED = {
    "enable.auto.commit": "false",
    "auto.offset.reset": "error",
    "enable.partition.eof": "true",
    "isolation.level": "read_committed",
    "log.connection.close": "true",  # what was read is doubted once librdkafka says that a connection was lost
}
"""Exactly-once delivery requires these values; a setting with another value is an error."""

CHECK_CRCS = "check.crcs"
DEFAULTS = {
    CHECK_CRCS: "true",  # bytes that have changed on a broker's disk are an error, not another value
    # Prefetched messages take twice their bytes: each has a structure of its own, and a response stays in memory until
    # its last message is consumed.
    "fetch.max.bytes": "4194304",
    "max.partition.fetch.bytes": "1048576",
    "queued.min.messages": "20000",
    "queued.max.messages.kbytes": "8192",
    "fetch.queue.backoff.ms": "5",  # wait before the next fetch once the queue is full; by default a second
    "max.poll.interval.ms": "86400000",  # a commit that waits for the catalog must not end the consumer
}


def consumer_properties(given: Mapping[str, str], group: str) -> dict[str, str]:
    """Return librdkafka's properties for a consumer of group `group`, from the properties the user set.

    Raises SettingsError if a property contradicts exactly-once delivery.
    """
    for name, needed in FORCED.items():
        if given.get(name, needed) != needed:
            variable = KAFKA_PREFIX + name.upper().replace(".", "_")
            raise SettingsError(f"{variable} must be {needed}: exactly-once delivery needs it")
    if given.get(CHECK_CRCS, "true") != "true":
        log.warning("%sCHECK_CRCS is off: values that have changed on a broker's disk are not noticed", KAFKA_PREFIX)
    return {**DEFAULTS, "group.id": group, **given, **FORCED}
