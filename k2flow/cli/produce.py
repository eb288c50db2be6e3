"""`k2flow produce`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from k2flow.config.settings import load_settings
from k2flow.errors import ProduceError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.sandbox.producer import Manifest, ProduceOptions, produce
from k2flow.sandbox.producer.replay import Target, replay


def produce_command(
    exchange: Annotated[
        str | None, typer.Argument(help="Exchange whose topic gets the trades; none with --replay.")
    ] = None,
    count: Annotated[int, typer.Option(help="Messages in all, bad ones and duplicates included.")] = 100_000,
    rate: Annotated[float, typer.Option(help="Messages a second; 0: as fast as possible.")] = 0.0,
    bad: Annotated[float, typer.Option(help="Share of bad records, of every kind in turn.")] = 0.0,
    duplicates: Annotated[
        float, typer.Option(help="Share of duplicates: exact copies and ones at another time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed and start time give the same messages.")] = 0,
    schema_id: Annotated[int, typer.Option(help="Schema id in the messages' header.")] = 1,
    manifest: Annotated[Path | None, typer.Option(help="File to write what was sent into, as JSON.")] = None,
    replay_csv: Annotated[
        Path | None, typer.Option("--replay", help="CSV of recorded trades to send instead, moved in time to end now.")
    ] = None,
) -> None:
    """Send realistic trades to an exchange's topic, or recorded ones to every exchange's; delivery is checked."""
    settings = load_settings(exchange_names())
    if manifest is not None and (manifest.is_dir() or not manifest.parent.is_dir()):
        raise ProduceError(f"the manifest {manifest} cannot be written: name a file in a folder that is there")
    if replay_csv is not None:
        if exchange is not None:
            raise ProduceError("--replay sends to each exchange that the file names: give no exchange")
        targets = {e.name: Target(e.code, e.settings.topic) for e in all_exchanges()}
        with _progress(None) as sent:
            manifests = replay(replay_csv, targets, settings.kafka, schema_id, progress=sent)
        for name, one in manifests.items():
            _report(one, manifest.with_stem(f"{manifest.stem}-{name}") if manifest else None)
        return
    if exchange is None:
        raise ProduceError("name an exchange, or give --replay a CSV file of recorded trades")
    found = find_exchange(exchange)
    options = ProduceOptions(count, rate, bad, duplicates, seed, schema_id=schema_id)
    with _progress(count) as sent:
        made = produce(found.code, found.settings.topic, settings.kafka, options, sent)
    _report(made, manifest)


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, and what to tell it how many more were sent."""
    columns = (TextColumn("sending"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("sending", total=total)
        yield lambda more: bar.advance(task, more)


def _report(sent: Manifest, path: Path | None) -> None:
    rate = sent.sent / max(sent.seconds, 0.001)
    print(f"{sent.sent:,} messages to {sent.topic} in {sent.seconds:.1f} s ({rate:,.0f}/s), all acknowledged:")
    print(f"  {sent.silver:,} valid, of which {sent.silver - sent.originals:,} duplicates; {sent.dlq:,} bad")
    if path is not None:
        path.write_text(sent.to_json() + "\n", "utf-8")
        print(f"  manifest: {path}")
