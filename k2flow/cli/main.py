"""The command line: `k2flow`, also `python -m k2flow`."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable

from k2flow.cli.audit import audit_command
from k2flow.cli.dlq import dlq_app
from k2flow.cli.kafka import kafka_app
from k2flow.cli.maintain import maintain_command
from k2flow.cli.produce import produce_command
from k2flow.cli.query import query_command
from k2flow.cli.reference import markdown
from k2flow.cli.report import report_command
from k2flow.cli.reprocess import reprocess_command
from k2flow.cli.status import status_command
from k2flow.cli.tables import tables_app
from k2flow.config.settings import PREFIX, Settings, kafka_origins, load_settings, mask, origins
from k2flow.errors import K2flowError, SettingsError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import configured, default_properties
from k2flow.observability.logs import set_up_logging
from k2flow.process_exit import ERROR_PREFIX, EXIT_FAILED

app = typer.Typer(
    name="k2flow",
    help="Crypto trades from Kafka into Apache Iceberg, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(tables_app, name="tables")
app.add_typer(kafka_app, name="kafka")
app.add_typer(dlq_app, name="dlq")
app.command("produce")(produce_command)
app.command("query")(query_command)
app.command("audit")(audit_command)
app.command("maintain")(maintain_command)
app.command("reprocess")(reprocess_command)
app.command("status")(status_command)
app.command("report")(report_command)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Options of all commands, set for the processes that a command starts as well."""
    if debug:
        os.environ[f"{PREFIX}DEBUG"] = "1"


@app.command()
def config(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/configuration.md instead: what settings there are.")
    ] = False,
) -> None:
    """What every setting is, and where it came from; secrets are masked."""
    if as_markdown:
        print(markdown(all_exchanges()), end="")
        return
    settings = load_settings(exchange_names())
    table = RichTable("setting", "value", "from")
    for origin in origins(settings, PREFIX, {}, ""):
        table.add_row(origin.name, origin.value, origin.source)
    for origin in kafka_origins(settings):
        table.add_row(origin.name, origin.value, origin.source)
    catalog, source = configured(settings), "PyIceberg's configuration"
    if not catalog:
        catalog, source = default_properties(settings.home), f"default, under {PREFIX}HOME"
    for key, value in sorted(catalog.items()):
        table.add_row(f"catalog {key}", mask(key, value), source)
    for exchange in all_exchanges():
        prefix, declared_in = f"{PREFIX}{exchange.name.upper()}_", f"flows/{exchange.name}.py"
        for origin in origins(exchange.settings, prefix, exchange.declared, declared_in):
            table.add_row(origin.name, origin.value, origin.source)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
def run(
    exchange: Annotated[list[str], typer.Argument(help="Exchanges, as their files in flows/ are named.")],
    processes: Annotated[
        int | None, typer.Option(min=1, max=64, help="Processes of each; default: the exchange's setting.")
    ] = None,
    trigger: Annotated[float | None, typer.Option(help="Seconds between two commits.")] = None,
    until_caught_up: Annotated[
        bool, typer.Option("--until-caught-up", help="Stop at the offsets that are the end now.")
    ] = False,
    addresses: Annotated[
        str | None, typer.Option(help="Of a cluster: host:port;host:port, one of each process, the same on all hosts.")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(min=0, help="Which of them this host's process has; default: its name's last digits.")
    ] = None,
) -> None:
    """Run the flows of exchanges until SIGTERM or SIGINT, again after a crash; they drain, commit and end.

    Each exchange has processes of its own, and its troubles hold no other up. With --addresses this host runs one
    process of a cluster.
    """
    from k2flow.supervisor import supervise as supervisor

    settings = load_settings(exchange_names())
    set_up_logging(settings.log_level, settings.log_format)
    found = [find_exchange(name) for name in dict.fromkeys(exchange)]
    cluster = addresses or settings.cluster
    if cluster and len(found) > 1:
        raise SettingsError("a cluster's addresses are of one exchange: run each with addresses of its own")
    number = settings.process_id if process_id is None else process_id
    plans = [supervisor.plan(each.name, processes or each.settings.processes, cluster, number) for each in found]
    extra = {f"{PREFIX}UNTIL_CAUGHT_UP": "1"} if until_caught_up else {}
    if trigger is not None:
        extra |= {f"{PREFIX}{each.name.upper()}_TRIGGER_SECONDS": f"{trigger:g}" for each in found}
    supervisor.run(plans, settings, extra)


def main() -> None:
    """The entry point: an error is one line on stderr and exit code 1, and a traceback only where asked for."""
    try:
        app()
    except K2flowError as error:
        if "--debug" in sys.argv or _debug_set():
            raise
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None


def _debug_set() -> bool:
    try:
        return Settings().debug
    except ValueError:
        return False
