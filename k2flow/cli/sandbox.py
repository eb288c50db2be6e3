"""`k2flow kafka` and `k2flow produce`: a local broker, and messages for it."""

import os
from pathlib import Path

from humanize import naturalsize

from k2flow.cli.output import progress_bars
from k2flow.cli.process import exit_on_error
from k2flow.config.settings import KAFKA_PREFIX, Settings, load_settings
from k2flow.errors import KafkaError, MissingExtraError, ProduceError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.kafka.admin import Admin
from k2flow.sandbox.kafka.local import BrokerStatus, LocalKafka
from k2flow.sandbox.producer import Manifest, ProduceOptions, produce
from k2flow.sandbox.producer.replay import Target, replay

EXIT_NOT_INSTALLED = 2  # the extra `local` is missing
LOOPBACK = ("127.0.0.1", "localhost")
SERVERS = f"{KAFKA_PREFIX}BOOTSTRAP_SERVERS"


def start_broker(port: int | None) -> None:
    """Start the local broker, or use the broker that the settings name; create the exchanges' topics.

    Exits with 2 if the extra `local` is needed and is not installed.
    """
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
    with exit_on_error(EXIT_NOT_INSTALLED, kind=MissingExtraError):
        started = local.start(topics)
    _show_broker(started)


def stop_broker(port: int | None) -> None:
    """Stop the local broker. Raises KafkaError if the settings name a broker on another machine."""
    local = _local(load_settings(exchange_names()), port)
    if local is None:
        raise KafkaError(f"the broker from {SERVERS} was not started by k2flow: stop it where it runs")
    local.stop()
    _show_broker(local.status())


def show_broker(port: int | None) -> None:
    """Show the local broker, or whether the broker that the settings name answers."""
    settings = load_settings(exchange_names())
    local = _local(settings, port)
    found = local.status() if local else None
    named = os.environ.get(SERVERS)
    if named and (found is None or found.state == "stopped") and _answers(settings):
        print(f"the broker at {named} from {SERVERS} answers; k2flow did not start it")
    elif found:
        _show_broker(found)
    else:
        raise KafkaError(f"no broker answers at {named} from {SERVERS}: start it there, or unset {SERVERS}")


def produce_trades(exchange: str | None, options: ProduceOptions, path: Path | None) -> None:
    """Send simulated trades to an exchange's topic, and write the manifest to `path`."""
    settings = load_settings(exchange_names())
    _check_writable(path)
    if exchange is None:
        raise ProduceError("no exchange is given: name one, or give --replay a CSV file of recorded trades")
    found = find_exchange(exchange)
    topic = found.settings.topic
    with progress_bars() as advance:
        manifest = produce(
            found.code,
            topic,
            settings.kafka,
            options,
            lambda n: advance("sending", n, options.messages),
            found.dedup_key,
        )
    _show_manifest(manifest, path)


def replay_trades(csv: Path, exchange: str | None, schema_id: int, path: Path | None) -> None:
    """Send recorded trades to the topics of their exchanges, and write each exchange's manifest next to `path`."""
    settings = load_settings(exchange_names())
    _check_writable(path)
    if exchange is not None:
        raise ProduceError("--replay sends to every exchange in the file: omit the exchange")
    targets = {e.name: Target(e.code, e.settings.topic, e.dedup_key) for e in all_exchanges()}
    with progress_bars() as advance:
        manifests = replay(csv, targets, settings.kafka, schema_id, progress=lambda n: advance("sending", n, None))
    for name, manifest in manifests.items():
        _show_manifest(manifest, path.with_stem(f"{path.stem}-{name}") if path else None)


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


def _show_broker(found: BrokerStatus) -> None:
    memory = f", {naturalsize(found.memory_bytes)} resident" if found.memory_bytes else ""
    process = f" (process {found.pid}{memory})" if found.pid else ""
    print(f"Kafka {found.version} is {found.state} at {found.bootstrap}{process}")
    for name, partitions in sorted((found.topics or {}).items()):
        print(f"  {name}: {partitions} partition(s)")
    for note in found.notes:
        print(f"  {note}")
    print(f"  data and log: {found.home}")


def _check_writable(path: Path | None) -> None:
    """Raise ProduceError before anything is sent: messages without their manifest are useless to who asked for one."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ProduceError(f"the manifest {path} cannot be written: name a file in a folder that exists")


def _show_manifest(sent: Manifest, path: Path | None) -> None:
    rate = sent.sent / max(sent.seconds, 0.001)
    print(f"{sent.sent:,} messages to {sent.topic} in {sent.seconds:.1f} s ({rate:,.0f}/s), all acknowledged:")
    print(f"  {sent.silver:,} valid, {sent.silver - sent.originals:,} of them duplicates; {sent.dlq:,} bad")
    if sent.handlers > 1:
        key = " and ".join(sent.dedup_key)
        print(f"  {sent.handlers} handlers, {sent.trades:,} trades: {sent.gold:,} rows in Gold by {key}")
    if path is not None:
        path.write_text(sent.to_json() + "\n", "utf-8")
        print(f"  manifest: {path}")
