"""The groups of commands of `k2flow`, as `commands` declares the others. This module imports no slow library."""

from datetime import datetime
from typing import Annotated

from k2flow.cli.options import AsJson, Port, StoppedExchange, argument, day, flag, group, option

tables_app = group("tables", "Create or list the Iceberg tables.")
dlq_app = group("dlq", "Inspect and replay dead letters, the rejected messages.")
kafka_app = group("kafka", "Run a real Apache Kafka on this machine: KRaft, one node.")


@dlq_app.command("list")
def dlq_list(
    exchange: Annotated[str | None, argument("EXCHANGE", "Exchange. Default: all.")] = None,
    as_json: Annotated[bool, flag("--json", "Print one line of JSON per reason.")] = False,
) -> None:
    """Count dead letters by reason, with the newest example."""
    from k2flow.cli.reprocess import list_dead_letters

    list_dead_letters(exchange, as_json)


@dlq_app.command("show")
def dlq_show(
    exchange: Annotated[str, argument("EXCHANGE", "Exchange.")],
    partition: Annotated[int, argument("PARTITION", "Partition of its topic.")],
    offset: Annotated[int, argument("OFFSET", "Offset of the message.")],
) -> None:
    """Show one dead letter, field by field.

    The output has the fields that can be decoded, the position of the defect, and the result with today's schemas and
    rules.
    """
    from k2flow.cli.reprocess import show_dead_letter

    show_dead_letter(exchange, partition, offset)


@dlq_app.command("replay")
def dlq_replay(
    exchange: StoppedExchange,
    reason: Annotated[list[str] | None, option("REASON", "Replay only this reason. Repeatable.")] = None,
    first: Annotated[datetime | None, day("--from", "First day (UTC) of failure.")] = None,
    last: Annotated[datetime | None, day("--to", "Last day (UTC) of failure.")] = None,
    dry_run: Annotated[
        bool, flag("--dry-run", "Only show which messages would be replayed. The flow may run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Move dead letters that are valid today into Silver and Gold.

    Use it after a schema or a rule was fixed. Each message moves exactly once, whatever crashes in between.
    """
    from k2flow.cli.reprocess import replay_dead_letters

    days = (first.date() if first else None, last.date() if last else None)
    replay_dead_letters(exchange, reason or [], days, dry_run, as_json)


@tables_app.command("create")
def tables_create(flow: Annotated[str, argument("FLOW", "Exchange, `candles`, or `all`.")] = "all") -> None:
    """Create missing tables and update the columns of existing ones.

    Any other difference from the definition is an error. Nothing is ever dropped.
    """
    from k2flow.cli.tables import create_tables

    create_tables(flow)


@tables_app.command("list")
def tables_list() -> None:
    """List the tables with their rows, files, bytes and last commit."""
    from k2flow.cli.tables import list_tables

    list_tables()


@kafka_app.command("start")
def kafka_start(port: Port = None) -> None:
    """Start the local broker and create the exchanges' topics.

    A broker that runs already is kept. If K2FLOW_KAFKA_BOOTSTRAP_SERVERS names a broker that answers, only create the
    topics there. A start needs the extra `local`; without it the exit code is 2.
    """
    from k2flow.cli.sandbox import start_broker

    start_broker(port)


@kafka_app.command("stop")
def kafka_stop(port: Port = None) -> None:
    """Stop the local broker, and keep its data."""
    from k2flow.cli.sandbox import stop_broker

    stop_broker(port)


@kafka_app.command("status")
def kafka_status(port: Port = None) -> None:
    """Show whether the local broker runs, and its topics."""
    from k2flow.cli.sandbox import show_broker

    show_broker(port)
