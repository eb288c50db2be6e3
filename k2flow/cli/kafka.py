"""`k2flow kafka`."""

import os

from humanize import naturalsize

from k2flow.config.settings import KAFKA_PREFIX, Settings, load_settings
from k2flow.errors import KafkaError
from k2flow.exchange import all_exchanges, exchange_names
from k2flow.kafka.admin import Admin
from k2flow.sandbox.kafka.local import BrokerStatus, LocalKafka

LOOPBACK = ("127.0.0.1", "localhost")
SERVERS = f"{KAFKA_PREFIX}BOOTSTRAP_SERVERS"


def start_broker(port: int | None) -> None:
    """Start the local broker, or use the broker that the settings name; create the exchanges' topics."""
    settings = load_settings(exchange_names())
    topics = {e.settings.topic: e.settings.partitions for e in all_exchanges()}
    local = _local(settings, port)
    named = os.environ.get(SERVERS)
    if named and port is None and (local is None or local.status().state == "stopped") and _answers(settings):
        for note in Admin(named, config=settings.kafka).create(topics):
            print(note)
        print(f"using the broker at {named} from {SERVERS}; its topics: {', '.join(topics)}")
        return
    if local is None:
        raise KafkaError(f"no broker answers at {named} from {SERVERS}: start it there, or unset {SERVERS}")
    _show(local.start(topics))


def stop_broker(port: int | None) -> None:
    """Stop the local broker. Raises KafkaError if the settings name a broker on another machine."""
    local = _local(load_settings(exchange_names()), port)
    if local is None:
        raise KafkaError(f"the broker from {SERVERS} was not started by k2flow: stop it where it runs")
    local.stop()
    _show(local.status())


def show_broker(port: int | None) -> None:
    """Show the local broker, or whether the broker that the settings name answers."""
    settings = load_settings(exchange_names())
    local = _local(settings, port)
    found = local.status() if local else None
    named = os.environ.get(SERVERS)
    if named and (found is None or found.state == "stopped") and _answers(settings):
        print(f"the broker at {named} from {SERVERS} answers; k2flow did not start it")
    elif found:
        _show(found)
    else:
        raise KafkaError(f"no broker answers at {named} from {SERVERS}: start it there, or unset {SERVERS}")


def _local(settings: Settings, port: int | None) -> LocalKafka | None:
    """Return the local broker, or None if the settings name a broker on another machine."""
    if port is None:
        host, _, number = settings.kafka["bootstrap.servers"].rpartition(":")
        if host not in LOOPBACK or not number.isdigit():
            return None
        port = int(number)
    return LocalKafka(settings.home / "kafka", port)


def _answers(settings: Settings) -> bool:
    return Admin(settings.kafka["bootstrap.servers"], 3.0, settings.kafka).answers(None, 3.0)


def _show(found: BrokerStatus) -> None:
    memory = f", {naturalsize(found.memory_bytes)} resident" if found.memory_bytes else ""
    process = f" (process {found.pid}{memory})" if found.pid else ""
    print(f"Kafka {found.version} is {found.state} at {found.bootstrap}{process}")
    for name, partitions in sorted((found.topics or {}).items()):
        print(f"  {name}: {partitions} partition(s)")
    for note in found.notes:
        print(f"  {note}")
    print(f"  data and log: {found.home}")
