"""`k2flow kafka`."""

import os
from typing import Annotated

import typer
from rich.filesize import decimal

from k2flow.config.settings import KAFKA_PREFIX, Settings, load_settings
from k2flow.errors import KafkaError
from k2flow.exchange import all_exchanges, exchange_names
from k2flow.kafka.admin import Admin
from k2flow.sandbox.kafka.local import LocalKafka, Status

kafka_app = typer.Typer(help="A real local Apache Kafka (KRaft, one node).", no_args_is_help=True)

DEFAULT_PORT = 9092
LOOPBACK = ("127.0.0.1", "localhost")
SERVERS = f"{KAFKA_PREFIX}BOOTSTRAP_SERVERS"

Port = Annotated[int | None, typer.Option(help=f"Port of 127.0.0.1; default: that of {SERVERS}, or {DEFAULT_PORT}.")]


@kafka_app.command()
def start(port: Port = None) -> None:
    """Start the broker unless it runs, and make the exchanges' topics; or use the one that the settings name."""
    settings = load_settings(exchange_names())
    topics = {e.settings.topic: e.settings.partitions for e in all_exchanges()}
    local = _local(settings, port)
    named = os.environ.get(SERVERS)
    if named and port is None and (local is None or local.status().state == "stopped") and _answers(settings):
        for note in Admin(named, config=settings.kafka).create(topics):
            print(note)
        print(f"uses the broker at {named}, which {SERVERS} names; it has {', '.join(topics)}")
        return
    if local is None:
        raise KafkaError(f"no broker answers at {named}, which {SERVERS} names: start it there, or unset {SERVERS}")
    _show(local.start(topics))


@kafka_app.command()
def stop(port: Port = None) -> None:
    """Stop the local broker; its data is kept."""
    local = _local(load_settings(exchange_names()), port)
    if local is None:
        raise KafkaError(f"{SERVERS} names a broker that k2flow did not start: stop it where it runs")
    local.stop()
    _show(local.status())


@kafka_app.command()
def status(port: Port = None) -> None:
    """Whether the local broker runs, and its topics."""
    settings = load_settings(exchange_names())
    local = _local(settings, port)
    found = local.status() if local else None
    if found and found.state != "stopped":
        _show(found)
    elif os.environ.get(SERVERS) and _answers(settings):
        print(f"the broker at {os.environ[SERVERS]}, which {SERVERS} names, answers; k2flow did not start it")
    elif found:
        _show(found)
    else:
        raise KafkaError(f"no broker answers at {os.environ[SERVERS]}, which {SERVERS} names")


def _local(settings: Settings, port: int | None) -> LocalKafka | None:
    """The local broker; None where the settings name one that cannot be on this machine."""
    if port is None:
        host, _, number = settings.kafka["bootstrap.servers"].rpartition(":")
        if host not in LOOPBACK or not number.isdigit():
            return None
        port = int(number)
    return LocalKafka(settings.home / "kafka", port)


def _answers(settings: Settings) -> bool:
    return Admin(settings.kafka["bootstrap.servers"], 3.0, settings.kafka).answers(None, 3.0)


def _show(found: Status) -> None:
    memory = f", {decimal(found.memory_bytes)} resident" if found.memory_bytes else ""
    process = f" (process {found.pid}{memory})" if found.pid else ""
    print(f"Kafka {found.version} is {found.state} at {found.bootstrap}{process}")
    for name, partitions in sorted((found.topics or {}).items()):
        print(f"  {name}: {partitions} partition(s)")
    for note in found.notes:
        print(f"  {note}")
    print(f"  data and log: {found.home}")
