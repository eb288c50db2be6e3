"""`k2flow config`: the settings in use, and the reference of all settings, docs/configuration.md."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from k2flow.cli.output import console, new_table
from k2flow.config.settings import (
    DEFAULT_SERVERS,
    KAFKA_PREFIX,
    PREFIX,
    REGISTRY_PREFIX,
    REGISTRY_PROPERTIES,
    REGISTRY_VARIABLES,
    ExchangeSettings,
    Settings,
    load_settings,
    mask,
    origins,
    property_origins,
)
from k2flow.exchange import Exchange, all_exchanges, exchange_names
from k2flow.iceberg.catalog import CATALOG, SQLITE_BUSY_SECONDS, configured, default_properties
from k2flow.kafka.properties import DEFAULTS, FORCED

TYPES = {str: "text", int: "whole number", float: "number", bool: "0 or 1", Path: "path"}
BOUNDS = {"gt": "more than {}", "ge": "from {}", "le": "to {}", "min_length": "not empty"}
KAFKA_DEFAULTS = {"bootstrap.servers": DEFAULT_SERVERS, "group.id": "k2flow-<exchange>", **DEFAULTS}
VARIABLE = f"PYICEBERG_CATALOG__{CATALOG.upper()}__"

INTRODUCTION = f"""\
# Configuration

A setting is an environment variable, or a file of that name in `{PREFIX}SECRETS_DIR` ([security.md](security.md)).
`k2flow config` shows the value and the source of each setting, with secrets masked. An unknown or wrong setting is an
error that names it.

`k2flow config --markdown` prints this page. To change a description, edit `k2flow/config/settings.py`.

## All exchanges
"""

FOR_EACH = f"""\
## One exchange

The variable is `{PREFIX}<EXCHANGE>_<NAME>`. It overrides the value that `flows/<exchange>.py` declares, which overrides
the default. A setting without a default must be declared or set.
"""

KAFKA = f"""\
## Kafka

`{KAFKA_PREFIX}<NAME>` sets the librdkafka property of that name, in lower case and with `.` instead of `_`.
`{KAFKA_PREFIX}SECURITY_PROTOCOL` sets `security.protocol`. Flows, `produce`, `status` and `audit` use all of these
properties. An unknown property is an error.

These defaults differ from librdkafka's. All commands use the first one, and flows use all of them:
"""

REGISTRY = f"""\
## The schema registry

`{REGISTRY_PREFIX}URL` turns it on. Name and password may be part of the URL. Further variables set properties of
Confluent's registry client; any other is an error.
"""

CATALOG_TEXT = f"""\
## The catalog

PyIceberg configures the catalog `{CATALOG}`. It reads `{VARIABLE}<NAME>`, where `__` means `.` and `_`
means `-`, or `.pyiceberg.yaml` in `PYICEBERG_HOME`, the home folder or the working folder.

Without either, the catalog is SQLite and the warehouse is a folder, both under `{PREFIX}HOME`. SQLite waits
{SQLITE_BUSY_SECONDS} s for other processes. The most common variables:

| variable | meaning |
| --- | --- |
| `{VARIABLE}TYPE` | `sql`, `rest`, or another type of PyIceberg |
| `{VARIABLE}URI` | address of the catalog; for PostgreSQL install the extra `postgres` |
| `{VARIABLE}WAREHOUSE` | location of the tables: a folder, a bucket, or the warehouse name of a REST catalog |
| `{VARIABLE}CREDENTIAL`, `{VARIABLE}TOKEN` | credentials of a REST catalog |
| `{VARIABLE}S3__ENDPOINT`, `{VARIABLE}S3__REGION` | endpoint and region of an S3 store |
| `{VARIABLE}S3__ACCESS_KEY_ID`, `{VARIABLE}S3__SECRET_ACCESS_KEY` | keys of the S3 store |
"""


def show_settings() -> None:
    """Show every setting, its value and its source. Secrets are masked."""
    settings = load_settings(exchange_names())
    table = new_table("setting", "value", "from")
    for origin in [*origins(settings, PREFIX, {}, ""), *property_origins(settings)]:
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
    console().print(table)


def print_reference() -> None:
    """Print docs/configuration.md. It depends on definitions and declarations alone, never on the environment."""
    registry = ((f"`{name}`", REGISTRY_PROPERTIES[key]) for name, key in REGISTRY_VARIABLES.items())
    parts = [
        INTRODUCTION,
        _markdown_table(("variable", "type", "default", "meaning"), _rows(PREFIX, Settings.model_fields)),
        FOR_EACH,
        _markdown_table(("name", "type", "default", "meaning"), _rows("", ExchangeSettings.model_fields)),
        *(part for exchange in all_exchanges() for part in _declared(exchange)),
        KAFKA,
        _markdown_table(("variable", "default"), _kafka(KAFKA_DEFAULTS)),
        "Exactly-once delivery requires these values; any other value is an error:\n",
        _markdown_table(("variable", "must be"), _kafka(FORCED)),
        REGISTRY,
        _markdown_table(("variable", "meaning"), registry),
        CATALOG_TEXT,
    ]
    print("\n".join(parts), end="")


def _rows(prefix: str, fields: Mapping[str, FieldInfo]) -> Iterable[tuple[str, ...]]:
    for name, field in fields.items():
        default = "" if field.is_required() else _value(field.default)
        yield f"`{prefix}{name.upper()}`", _type(field), default, field.description or ""


def _type(field: FieldInfo) -> str:
    given = get_args(field.annotation) if NoneType in get_args(field.annotation) else (field.annotation,)
    (kind,) = (each for each in given if each is not NoneType)
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"{TYPES[get_args(kind)[0]]}s"
    limits = [(text, getattr(limit, name, None)) for limit in field.metadata for name, text in BOUNDS.items()]
    bounds = " ".join(text.format(f"{value:,g}") for text, value in limits if value is not None)
    return f"{TYPES[kind]}, {bounds}" if bounds else TYPES[kind]


def _value(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{int(value) if isinstance(value, bool) else value}`"


def _declared(exchange: Exchange) -> Iterable[str]:
    yield f"### Declared by `flows/{exchange.name}.py`\n"
    prefix = f"{PREFIX}{exchange.name.upper()}_"
    rows = ((f"`{prefix}{name.upper()}`", _value(value)) for name, value in exchange.declared.items())
    yield _markdown_table(("variable", "declared"), rows)


def _kafka(properties: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return ((f"`{KAFKA_PREFIX}{name.upper().replace('.', '_')}`", f"`{value}`") for name, value in properties.items())


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
