"""The settings as a page of documentation: docs/configuration.md, which `k2flow config --markdown` prints.

It follows from the settings' definitions and from what the exchanges declare alone, never from the environment.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from k2flow.config.settings import DEFAULT_SERVERS, KAFKA_PREFIX, PREFIX, ExchangeSettings, Settings
from k2flow.exchange import Exchange
from k2flow.flow.source import DEFAULTS, FORCED
from k2flow.iceberg.catalog import CATALOG, SQLITE_BUSY_SECONDS

TYPES = {str: "text", int: "whole number", float: "number", bool: "0 or 1", Path: "path"}
BOUNDS = {"gt": "more than {}", "ge": "from {}", "le": "to {}", "min_length": "not empty"}
KAFKA_DEFAULTS = {"bootstrap.servers": DEFAULT_SERVERS, "group.id": "k2flow-<exchange>", **DEFAULTS}
VARIABLE = f"PYICEBERG_CATALOG__{CATALOG.upper()}__"

INTRODUCTION = f"""\
# Configuration

Every setting is an environment variable, or a file of its name in `{PREFIX}SECRETS_DIR` ([security.md](security.md)).
`k2flow config` prints what each one is now and where that came from, secrets masked. An unknown or wrong one is an
error that names it.

This page is what `k2flow config --markdown` prints: change the descriptions in `k2flow/settings.py`.

## For all exchanges
"""

FOR_EACH = f"""\
## For each exchange

`{PREFIX}<EXCHANGE>_<NAME>`, over what `flows/<exchange>.py` declares, over these defaults. What has no default must be
declared or set.
"""

KAFKA = f"""\
## Kafka

`{KAFKA_PREFIX}<NAME>` is librdkafka's own property, in lower case and with `.` for `_`: `security.protocol` is
`{KAFKA_PREFIX}SECURITY_PROTOCOL`. Flows, the producer, `status` and `audit` use them all. A property that librdkafka
does not know is an error. The defaults that differ from its own are those of flows; the first one is everyone's:
"""

CATALOG_TEXT = f"""\
## The catalog

PyIceberg configures it, as the catalog `{CATALOG}`: by `{VARIABLE}<NAME>`, where `__` is `.` and `_` is
`-`, or by `.pyiceberg.yaml` in `PYICEBERG_HOME`, the home folder or the working folder. With neither: SQLite (waits
{SQLITE_BUSY_SECONDS} s for other processes) and a warehouse folder, both under `{PREFIX}HOME`. What most people need:

| variable | meaning |
| --- | --- |
| `{VARIABLE}TYPE` | `sql`, `rest`, or another one that PyIceberg knows |
| `{VARIABLE}URI` | where it is; for PostgreSQL install the extra `postgres` |
| `{VARIABLE}WAREHOUSE` | where the tables go: a folder, a bucket, or what a REST catalog calls it |
| `{VARIABLE}CREDENTIAL`, `{VARIABLE}TOKEN` | for a REST catalog |
| `{VARIABLE}S3__ENDPOINT`, `{VARIABLE}S3__REGION` | an S3 store |
| `{VARIABLE}S3__ACCESS_KEY_ID`, `{VARIABLE}S3__SECRET_ACCESS_KEY` | its keys |
"""


def markdown(exchanges: Sequence[Exchange]) -> str:
    """The whole page, with what these exchanges declare."""
    parts = [
        INTRODUCTION,
        _table(("variable", "type", "default", "meaning"), _rows(PREFIX, Settings.model_fields)),
        FOR_EACH,
        _table(("name", "type", "default", "meaning"), _rows("", ExchangeSettings.model_fields)),
        *(part for exchange in exchanges for part in _declared(exchange)),
        KAFKA,
        _table(("variable", "default"), _kafka(KAFKA_DEFAULTS)),
        "What exactly-once needs; another value is an error:\n",
        _table(("variable", "must be"), _kafka(FORCED)),
        CATALOG_TEXT,
    ]
    return "\n".join(parts)


def _rows(prefix: str, fields: Mapping[str, FieldInfo]) -> Iterable[tuple[str, ...]]:
    for name, field in fields.items():
        yield f"`{prefix}{name.upper()}`", _type(field), _default(field), field.description or ""


def _type(field: FieldInfo) -> str:
    """A field's type and bounds, in words."""
    given = get_args(field.annotation) if NoneType in get_args(field.annotation) else (field.annotation,)
    (kind,) = (each for each in given if each is not NoneType)
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"{TYPES[get_args(kind)[0]]}s"
    bounds = [
        text.format(f"{getattr(limit, name):,g}")
        for limit in field.metadata
        for name, text in BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([TYPES[kind], *([" ".join(bounds)] if bounds else [])])


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() else _value(field.default)


def _value(value: Any) -> str:
    """As it is written in an environment variable."""
    if value is None or value == "":
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{int(value) if isinstance(value, bool) else value}`"


def _declared(exchange: Exchange) -> Iterable[str]:
    yield f"### What `flows/{exchange.name}.py` declares\n"
    prefix = f"{PREFIX}{exchange.name.upper()}_"
    rows = ((f"`{prefix}{name.upper()}`", _value(value)) for name, value in exchange.declared.items())
    yield _table(("variable", "declared"), rows)


def _kafka(properties: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return ((f"`{KAFKA_PREFIX}{name.upper().replace('.', '_')}`", f"`{value}`") for name, value in properties.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
