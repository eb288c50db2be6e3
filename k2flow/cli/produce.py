"""`k2flow produce`."""

from pathlib import Path

from k2flow.cli.progress import progress_bars
from k2flow.config.settings import load_settings
from k2flow.errors import ProduceError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.sandbox.producer import Manifest, ProduceOptions, produce
from k2flow.sandbox.producer.replay import Target, replay


def produce_trades(exchange: str | None, options: ProduceOptions, path: Path | None) -> None:
    """Send simulated trades to an exchange's topic, and write the manifest to `path`."""
    settings = load_settings(exchange_names())
    _check_writable(path)
    if exchange is None:
        raise ProduceError("no exchange is given: name one, or give --replay a CSV file of recorded trades")
    found = find_exchange(exchange)
    with progress_bars() as advance:
        manifest = produce(
            found.code,
            found.settings.topic,
            settings.kafka,
            options,
            lambda sent: advance("sending", sent, options.count),
        )
    _report(manifest, path)


def replay_trades(csv: Path, exchange: str | None, schema_id: int, path: Path | None) -> None:
    """Send recorded trades to the topics of their exchanges, and write each exchange's manifest next to `path`."""
    settings = load_settings(exchange_names())
    _check_writable(path)
    if exchange is not None:
        raise ProduceError("--replay sends to every exchange in the file: omit the exchange")
    targets = {e.name: Target(e.code, e.settings.topic) for e in all_exchanges()}
    with progress_bars() as advance:
        manifests = replay(
            csv, targets, settings.kafka, schema_id, progress=lambda sent: advance("sending", sent, None)
        )
    for name, manifest in manifests.items():
        _report(manifest, path.with_stem(f"{path.stem}-{name}") if path else None)


def _check_writable(path: Path | None) -> None:
    """Raise ProduceError before anything is sent: messages without their manifest are useless to who asked for one."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ProduceError(f"the manifest {path} cannot be written: name a file in a folder that exists")


def _report(sent: Manifest, path: Path | None) -> None:
    rate = sent.sent / max(sent.seconds, 0.001)
    print(f"{sent.sent:,} messages to {sent.topic} in {sent.seconds:.1f} s ({rate:,.0f}/s), all acknowledged:")
    print(f"  {sent.silver:,} valid, {sent.silver - sent.originals:,} of them duplicates; {sent.dlq:,} bad")
    if path is not None:
        path.write_text(sent.to_json() + "\n", "utf-8")
        print(f"  manifest: {path}")
