"""All settings: the only place that reads them from the environment.

| variable | where it is read |
|---|---|
| `K2FLOW_<NAME>` | `Settings` |
| `K2FLOW_KAFKA_<NAME>` | `Settings.kafka`: librdkafka's own properties, `_` for `.` |
| `K2FLOW_SCHEMA_REGISTRY_<NAME>` | `Settings.schema_registry`: properties of Confluent's registry client, `_` for `.` |
| `K2FLOW_<EXCHANGE>_<NAME>` | `ExchangeSettings`, over the values that flows/<exchange>.py declares |
| files in `K2FLOW_SECRETS_DIR` | k2flow.config.secret_files, which puts them into the environment |
| `PYICEBERG_*`, `.pyiceberg.yaml` | PyIceberg itself: k2flow.config.pyiceberg_file, k2flow.iceberg.catalog |
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from k2flow.config import secret_files
from k2flow.errors import SettingsError

PREFIX = "K2FLOW_"
KAFKA_PREFIX = "K2FLOW_KAFKA_"
REGISTRY_PREFIX = "K2FLOW_SCHEMA_REGISTRY_"
REGISTRY_PROPERTIES = {
    "basic.auth.user.info": "name and password for basic authentication, as `name:password`",
    "bearer.auth.token": "a bearer token",
    "bearer.auth.client.id": "OAuth: the client, whose credentials are exchanged for a token",
    "bearer.auth.client.secret": "OAuth: the secret of the client",
    "bearer.auth.scope": "OAuth: the scope of the token",
    "bearer.auth.issuer.endpoint.url": "OAuth: the address that issues the token",
    "bearer.auth.issuer.endpoint.query": "OAuth by Azure's metadata service: the query",
    "bearer.auth.credentials.source": "`STATIC_TOKEN`, `OAUTHBEARER` (each the default with its properties) or "
    "`OAUTHBEARER_AZURE_IMDS`",
    "bearer.auth.logical.cluster": "Confluent Cloud: the cluster of the registry",
    "bearer.auth.identity.pool.id": "Confluent Cloud: the identity pool",
    "ssl.ca.location": "certificate authorities: a file or folder; default `REQUESTS_CA_BUNDLE`, else certifi's",
    "ssl.certificate.location": "the client's certificate (PEM)",
    "ssl.key.location": "the client's private key (PEM)",
    "ssl.key.password": "the password of the private key",
    "proxy": "address of an HTTP proxy",
}
"""The properties of Confluent's SchemaRegistryClient that can be set, with their descriptions."""
REGISTRY_VARIABLES = {REGISTRY_PREFIX + name.upper().replace(".", "_"): name for name in REGISTRY_PROPERTIES}
"""The variables that set these properties."""
SERVERS = f"{KAFKA_PREFIX}BOOTSTRAP_SERVERS"
DEFAULT_SERVERS = "127.0.0.1:9092"
MIN_SIMILARITY = 0.75
"""Of a misspelt setting to the one that an error suggests; 1 is the same."""
WINDOW_MEMORY_IDS = 4_000_000
SECRET = re.compile(
    r"passw|passphrase|secret(?!s[_.]dir)|token|credential|jaas|key\.pem|(access|account|api)[-_.]key|connection[-_.]string"
    r"|user\.?info|header|auth$|sas$",
    re.IGNORECASE,
)
PASSWORD_IN_URL = re.compile(r"(?<=://)([^/:@\s]*):([^@/\s]+)@")
PASSWORD_IN_QUERY = re.compile(r"([?&;](?:password|passwd|pwd|token|secret)=)[^&;\s]+", re.IGNORECASE)


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_ids(value: tuple[int, ...]) -> tuple[int, ...]:
    if not value or any(not 0 <= i < 2**32 for i in value):
        raise ValueError("must be one or more ids from 0 to 4294967295")
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class Settings(BaseSettings):
    """Settings for all exchanges. Use `load_settings`: the constructor raises pydantic's ValidationError."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True)

    home: Path = Path(".k2flow")
    """Folder for all files of k2flow on this machine: the local Kafka and the default catalog."""
    cache_dir: Path | None = None
    """Folder of files that may be lost: older ids of the window, what audits have proven. Default: `cache` in home."""
    window_memory_ids: int = Field(default=WINDOW_MEMORY_IDS, ge=1)
    """Ids of a worker's deduplication window in memory, about; older ones are in K2FLOW_CACHE_DIR."""
    secrets_dir: Path | None = None
    """Folder of secrets: each file has the name of a variable and holds its value."""
    schema_ids: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split), AfterValidator(_check_ids)] = (1,)
    """Without a registry: the schema ids of TradeV2, separated by commas."""
    schema_registry_url: str | None = None
    """Schema registry (Confluent API) for writer schemas."""
    schema_wait_seconds: float = Field(default=10, ge=0, le=600)
    """With a registry: seconds in which an id that it lacks may appear, before its messages are dead letters."""
    accept_lost_tables: bool = False
    """Create missing tables although the storage has tables of these names: a lost catalog's. Their files stay."""
    candles_trigger_seconds: float = Field(default=1, ge=0.1, le=3600)
    """The candles flow: seconds between commits, about."""
    until_caught_up: bool = False
    """Drain, commit and stop at the offsets that end the topic at start-up."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = "INFO"
    """The least severe messages that are logged."""
    log_format: Literal["text", "json"] = "text"
    """text: lines for people; json: one object per line, for log collectors."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port for /metrics, /healthz and /readyz. Under bytewax.run each process adds its number."""
    metrics_host: str = "127.0.0.1"
    """Address for the metrics port."""
    traces: bool = False
    """Send an OpenTelemetry trace per batch, to the collector in OTEL_*. Needs the extra `traces`."""
    start_seconds: float = Field(default=60, gt=0)
    """`k2flow run`: seconds that the processes of an exchange may take to connect."""
    stop_seconds: float = Field(default=60, gt=0)
    """`k2flow run`: seconds for a flow to drain and commit before it is killed."""
    peer_seconds: float = Field(default=30, ge=1)
    """Seconds without a sign of life before another process of a flow counts as lost."""
    cluster: str | None = None
    """Cluster: the addresses of a flow's processes on all hosts, as host:port;host:port."""
    process_id: int | None = Field(default=None, ge=0)
    """Cluster: this host's index in the addresses. Without it: the digits at the end of its name."""
    debug: bool = False
    """Show tracebacks of errors."""
    failpoints: str = ""
    """For tests: points at which the process dies, fails, hangs or stops."""

    @property
    def cache(self) -> Path:
        """The folder of K2FLOW_CACHE_DIR."""
        return self.cache_dir or self.home / "cache"

    @cached_property
    def kafka(self) -> dict[str, str]:
        """Properties for librdkafka: those in K2FLOW_KAFKA_*, over the default broker address."""
        given = {
            name[len(KAFKA_PREFIX) :].lower().replace("_", "."): value
            for name, value in os.environ.items()
            if name.startswith(KAFKA_PREFIX)
        }
        return {"bootstrap.servers": DEFAULT_SERVERS, **given}

    @cached_property
    def schema_registry(self) -> dict[str, str]:
        """Properties for Confluent's SchemaRegistryClient; empty without K2FLOW_SCHEMA_REGISTRY_URL."""
        if not self.schema_registry_url:
            return {}
        given = {name: os.environ[variable] for variable, name in REGISTRY_VARIABLES.items() if variable in os.environ}
        defaults: dict[str, str] = {}
        if "REQUESTS_CA_BUNDLE" in os.environ:  # PyIceberg's REST client reads it too
            defaults["ssl.ca.location"] = os.environ["REQUESTS_CA_BUNDLE"]
        for name, source in (("bearer.auth.token", "STATIC_TOKEN"), ("bearer.auth.client.id", "OAUTHBEARER")):
            if name in given:
                defaults |= {"bearer.auth.credentials.source": source, "bearer.auth.logical.cluster": ""}
        return {"url": self.schema_registry_url, **defaults, **given}


class ExchangeSettings(BaseSettings):
    """Settings of one exchange: declared in flows/<exchange>.py, overridden by K2FLOW_<EXCHANGE>_*."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    topic: str = Field(min_length=1)
    """Kafka topic."""
    partitions: int = Field(default=1, ge=1)
    """Partitions of the topic on the local Kafka."""
    trigger_seconds: float = Field(default=10, ge=0.1, le=3600)
    """Seconds between commits."""
    processes: int = Field(default=1, ge=1, le=64)
    """Number of processes under `k2flow run`."""
    bronze_retention_days: int = Field(ge=1)
    """Days that Bronze keeps rows."""
    bronze_file_size_mb: int = Field(ge=1)
    """Target size of a Bronze file, in MiB."""
    silver_retention_days: int = Field(default=30, ge=1)
    """Days that Silver keeps rows."""
    silver_file_size_mb: int = Field(default=128, ge=1)
    """Target size of a Silver file, in MiB."""
    dlq_retention_days: int = Field(default=30, ge=1)
    """Days that the dead-letter table keeps rows."""
    dlq_file_size_mb: int = Field(default=32, ge=1)
    """Target size of a dead-letter file, in MiB."""
    dedup_window_hours: int = Field(default=24, ge=1)
    """Hours, back from the newest trade in Gold up to Kafka's time, in which a deduplication key is unique."""
    batch_rows: int = Field(default=100_000, ge=1)
    """Messages per batch, at most."""
    batch_mb: int = Field(default=64, ge=1)
    """MiB of payload per batch, at most; a larger message is a batch of its own."""
    commit_batches: int = Field(default=10, ge=1, le=100)
    """Full batches per commit (group commit) during catch-up, when they arrive faster than the trigger."""
    unknown_fields: Literal["keep", "ignore"] = "keep"
    """Fields that TradeV2 does not have: keep them in vendor_data, or ignore them."""
    accept_lost_offsets: bool = False
    """Continue although Kafka no longer has messages that were never committed."""
    after_rollback: Literal["stop", "reread", "accept"] = "stop"
    """A table's main branch was moved: stop, read the offsets again, or accept the loss of their rows."""


def load_settings(exchanges: Iterable[str] = ()) -> Settings:
    """Read the settings for all exchanges. Raises SettingsError for a variable that is unknown or wrong.

    Variables of the exchanges named in `exchanges` are known too.
    """
    secret_files.load_into_environment()
    _refuse_unknown(exchanges)
    try:
        return Settings()
    except ValidationError as error:
        raise _settings_error(error, PREFIX) from None


def load_exchange_settings(exchange: str, declared: Mapping[str, Any]) -> ExchangeSettings:
    """Return the values that flows/<exchange>.py declares, overridden by the environment. Raises SettingsError."""
    secret_files.load_into_environment()
    prefix = f"{PREFIX}{exchange.upper()}_"
    rest = {field: value for field, value in declared.items() if f"{prefix}{field.upper()}" not in os.environ}
    try:
        return ExchangeSettings(_env_prefix=prefix, **rest)  # type: ignore[call-arg]
    except ValidationError as error:
        raise _settings_error(error, prefix) from None


def _refuse_unknown(exchanges: Iterable[str]) -> None:
    prefixes: dict[str, type[BaseSettings]] = {PREFIX: Settings}
    prefixes |= {f"{PREFIX}{name.upper()}_": ExchangeSettings for name in exchanges}
    known = {f"{prefix}{field.upper()}" for prefix, model in prefixes.items() for field in model.model_fields}
    known |= REGISTRY_VARIABLES.keys()
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and not name.startswith(KAFKA_PREFIX):
            meant = _closest_setting(name, prefixes, known | {SERVERS})
            hint = f"did you mean {meant}?" if meant else "`k2flow config` lists the known ones"
            raise SettingsError(f"unknown setting {name}: {hint}")


def _closest_setting(name: str, prefixes: Iterable[str], known: Iterable[str]) -> str | None:
    """Return the known setting that a misspelt one most likely means, or None.

    Only settings with the same prefix compete, so that the name of the exchange does not count as similarity. Of equals
    the shortest wins.
    """
    prefix = max((each for each in prefixes if name.startswith(each)), key=len)
    typed = name.removeprefix(prefix)
    scores = {each: _similarity(typed, each.removeprefix(prefix)) for each in known if each.startswith(prefix)}
    best = max(sorted(scores, key=lambda each: (len(each), each)), key=scores.__getitem__)
    return best if scores[best] >= MIN_SIMILARITY else None


def _similarity(typed: str, field: str) -> float:
    """Compare a typed name with a field: with its first words, which count most, its last words, and all of it."""
    words, count = field.split("_"), typed.count("_") + 1
    parts = ((1.0, "_".join(words[:count])), (0.95, "_".join(words[-count:])), (0.95, field))
    return max(weight * difflib.SequenceMatcher(None, typed, part).ratio() for weight, part in parts)


def _settings_error(error: ValidationError, prefix: str) -> SettingsError:
    first = error.errors()[0]
    name = f"{prefix}{'_'.join(str(part) for part in first['loc'][:1]).upper()}"
    value = os.environ.get(name, str(first.get("input")))
    return SettingsError(f"{name}={mask(name, value)!r} is wrong: {first['msg']}")


def mask(name: str, value: str) -> str:
    """Return `value` as it may be printed: whole secrets, and passwords inside URLs, become `****`."""
    if SECRET.search(name.replace("_", ".")) or SECRET.search(name):
        return "****"
    return PASSWORD_IN_QUERY.sub(r"\1****", PASSWORD_IN_URL.sub(r"\1:****@", value))


@dataclass(frozen=True)
class Origin:
    """One setting: its name, its value as it may be printed, and the source of the value."""

    name: str
    value: str
    source: str


def origins(model: BaseSettings, prefix: str, declared: Mapping[str, Any], declared_in: str) -> list[Origin]:
    """Return the settings of a model, each with the source of its value."""
    rows = []
    for field in type(model).model_fields:
        value = getattr(model, field)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        rows.append(_origin(f"{prefix}{field.upper()}", text, declared_in if field in declared else "default"))
    return rows


def property_origins(settings: Settings) -> list[Origin]:
    """Return the properties for librdkafka, then those set for the schema registry's client, each with its source."""
    kafka = {KAFKA_PREFIX + name.upper().replace(".", "_"): value for name, value in sorted(settings.kafka.items())}
    registry = {variable: os.environ[variable] for variable in REGISTRY_VARIABLES if variable in os.environ}
    return [_origin(variable, value, "default") for variable, value in (kafka | registry).items()]


def _origin(variable: str, value: str, unset: str) -> Origin:
    source = "environment" if variable in os.environ else unset
    return Origin(variable, mask(variable, value), "file" if secret_files.is_from_file(variable) else source)
