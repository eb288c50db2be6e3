"""The form of arguments and options, those that several commands share, and the settings of every group of commands."""

import re
from datetime import datetime
from typing import Annotated, Any, Literal

import typer

import k2flow

TIME = ["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def group(name: str, text: str) -> typer.Typer:
    """Return an empty group of commands, whose help needs no slow import."""
    return typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich takes longer than all other imports together
        # Without a value for help, typer 0.29 imports pydantic to convert None before it runs a command's own help.
        context_settings={"max_content_width": 100, "default_map": {"help": False}},
    )


def argument(metavar: str, text: str) -> Any:
    """Return an argument with this help."""
    return typer.Argument(metavar=metavar, help=text)


def option(metavar: str, text: str, *names: str, **limits: Any) -> Any:
    """Return an option that takes a value. Without `names`, it has the name of its parameter."""
    return typer.Option(*names, metavar=metavar, help=text, **limits)


def flag(name: str, text: str) -> Any:
    """Return an option that takes no value."""
    return typer.Option(name, help=text)


def duration(text: str) -> Any:
    """Return an option that takes a duration such as 5m, and gives seconds. `text` names the default."""
    return option("DURATION", text, parser=parse_duration, show_default=False)


def day(name: str, text: str) -> Any:
    """Return an option that takes a day such as 2026-01-31."""
    return option("DATE", text, name, formats=["%Y-%m-%d"])


def moment(name: str, text: str) -> Any:
    """Return an option that takes a time such as 2026-01-31T12:00."""
    return option("TIME", text, name, formats=TIME)


def parse_duration(value: str | float) -> float:
    """Return the seconds of text such as "90s", "5m", "1h" or "7d". A number is in seconds already."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value.strip())
    if not found:
        raise typer.BadParameter(f"{value!r} is not a duration: give a number and s, m, h or d, such as 5m")
    return float(found[1]) * DURATION_UNITS[found[2]]


def show_version(asked: bool) -> None:
    """Print the version and exit, if it is asked for."""
    if asked:
        print(f"k2flow {k2flow.__version__}")
        raise typer.Exit


Debug = Annotated[bool, flag("--debug", "Show tracebacks of errors.")]
Version = Annotated[bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)]
Format = Literal["table", "csv", "json", "parquet", "arrow"]
"""A format of query results. `json` is one object per line, `arrow` an IPC stream."""
Exchanges = Annotated[list[str] | None, argument("EXCHANGE", "Exchanges. Default: all.")]
Flows = Annotated[list[str] | None, argument("FLOW", "Exchanges, or `candles`. Default: all.")]
StoppedExchange = Annotated[str, argument("EXCHANGE", "Exchange. Its flow must be stopped.")]
AsJson = Annotated[bool, flag("--json", "Print one JSON object.")]
Since = Annotated[
    datetime | None,
    option("TIME", "Check only messages ingested since this time, and their rows. Default zone: UTC.", formats=TIME),
]
AuditEvery = Annotated[
    float | None, duration("Repeat the audit, for example every 1h or 1d. The log has each verdict.")
]
FullAudit = Annotated[bool, flag("--full", "Read everything, also what earlier audits have proven.")]
Sample = Annotated[
    float, option("SHARE", "Of the data files that earlier audits have proven, the share to read again.", min=0, max=1)
]
Seed = Annotated[int | None, option("N", "Choose the same files again. Default: other ones each time.", min=0)]
Port = Annotated[
    int | None, option("PORT", "Port on 127.0.0.1. Default: the port of K2FLOW_KAFKA_BOOTSTRAP_SERVERS, or 9092.")
]
