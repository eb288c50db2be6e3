"""All settings, read from the environment in this one place.

| variable | read by |
|---|---|
| `K2FLOW_<NAME>` | `Settings` |
| `K2FLOW_KAFKA_<NAME>` | `Settings.kafka`: librdkafka's own properties, `_` for `.` |
| `K2FLOW_<EXCHANGE>_<NAME>` | `ExchangeSettings`, over what flows/<exchange>.py declares |
| files in `K2FLOW_SECRETS_DIR` | k2flow.config.secret_files, as if they stood in the environment |
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

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from k2flow.config import secret_files
from k2flow.errors import SettingsError

PREFIX = "K2FLOW_"
KAFKA_PREFIX = "K2FLOW_KAFKA_"
DEFAULT_SERVERS = "127.0.0.1:9092"
SECRET = re.compile(
    r"passw|passphrase|secret(?!s[_.]dir)|token|credential|jaas|key\.pem|(access|account|api)[-_.]key|connection[-_.]string"
    r"|userinfo|header|auth$|sas$",
    re.IGNORECASE,
)
PASSWORD_IN_URL = re.compile(r"(?<=://)([^/:@\s]*):([^@/\s]+)@")
PASSWORD_IN_QUERY = re.compile(r"([?&;](?:password|passwd|pwd|token|secret)=)[^&;\s]+", re.IGNORECASE)


class Settings(BaseSettings):
    """What holds for all exchanges. Raises pydantic's ValidationError; use `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    home: Path = Field(
        default=Path(".k2flow"),
        description="Folder of everything k2flow keeps on this machine: the local Kafka, the default catalog.",
    )
    secrets_dir: Path | None = Field(
        default=None, description="Folder of files that are each named as a variable and hold its value: secrets."
    )
    schema_ids: Annotated[tuple[int, ...], NoDecode] = Field(
        default=(1,), description="Without a registry: the schema ids that mean TradeV2, separated by commas."
    )
    schema_registry_url: str | None = Field(
        default=None, description="Schema registry (Confluent API) that gives writer schemas by id."
    )
    until_caught_up: bool = Field(
        default=False, description="Stop, drained and committed, at the offsets that were the end at the start."
    )
    log_level: str = Field(default="INFO", description="DEBUG, INFO, WARNING or ERROR.")
    log_format: Literal["text", "json"] = Field(
        default="text", description="text: a line for people; json: one object a line, for log collectors."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Serve /metrics, /healthz and /readyz; under bytewax.run each process on this port + its number.",
    )
    metrics_host: str = Field(default="127.0.0.1", description="Address that the metrics are served on.")
    traces: bool = Field(
        default=False, description="Send OpenTelemetry traces of each batch, where OTEL_* variables say; extra: traces."
    )
    start_seconds: float = Field(
        default=60, gt=0, description="`k2flow run`: how long the processes of an exchange may take to find each other."
    )
    stop_seconds: float = Field(
        default=60, gt=0, description="`k2flow run`: how long a flow may take to drain and commit before it is killed."
    )
    peer_seconds: float = Field(
        default=30, ge=1, description="How long another process of a flow may be silent before it counts as lost."
    )
    cluster: str | None = Field(
        default=None, description="Addresses (host:port;host:port) of a flow's processes on several hosts, all of them."
    )
    process_id: int | None = Field(
        default=None, ge=0, description="Which of the cluster's addresses is this host's; else its name's last digits."
    )
    debug: bool = Field(default=False, description="Show tracebacks.")
    failpoints: str = Field(default="", description="For tests: where the process dies, fails or hangs.")

    @field_validator("schema_ids", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("schema_ids")
    @classmethod
    def _at_least_one(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(not 0 <= i < 2**32 for i in value):
            raise ValueError("needs one or more ids from 0 to 4294967295")
        return value

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
        return value.upper()

    @cached_property
    def kafka(self) -> dict[str, str]:
        """Librdkafka's properties, as K2FLOW_KAFKA_* gives them, over the default broker address."""
        given = {
            name[len(KAFKA_PREFIX) :].lower().replace("_", "."): value
            for name, value in os.environ.items()
            if name.startswith(KAFKA_PREFIX)
        }
        return {"bootstrap.servers": DEFAULT_SERVERS, **given}


class ExchangeSettings(BaseSettings):
    """What one exchange's flow is set to: declared in flows/<exchange>.py, overridden by K2FLOW_<EXCHANGE>_*."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    topic: str = Field(min_length=1, description="Kafka topic.")
    partitions: int = Field(default=1, ge=1, description="Partitions the local Kafka makes the topic with.")
    trigger_seconds: float = Field(default=10, ge=0.1, le=3600, description="Seconds between two commits.")
    processes: int = Field(default=1, ge=1, le=64, description="Processes that `k2flow run` starts.")
    bronze_retention_days: int = Field(ge=1, description="Days that Bronze keeps.")
    bronze_file_size_mb: int = Field(ge=1, description="Target size of a Bronze file, in MiB.")
    silver_retention_days: int = Field(default=30, ge=1, description="Days that Silver keeps.")
    silver_file_size_mb: int = Field(default=128, ge=1, description="Target size of a Silver file, in MiB.")
    dlq_retention_days: int = Field(default=30, ge=1, description="Days that the dead-letter table keeps.")
    dlq_file_size_mb: int = Field(default=32, ge=1, description="Target size of a dead-letter file, in MiB.")
    dedup_window_hours: int = Field(
        default=24, ge=1, description="Hours back from Gold's newest in which a message_id is unique."
    )
    batch_rows: int = Field(default=100_000, ge=1, description="Messages in one batch at the most.")
    batch_mb: int = Field(default=64, ge=1, description="MiB of payload in one batch at the most, or one message.")
    commit_batches: int = Field(
        default=10,
        ge=1,
        le=100,
        description="Full batches that are committed together, where they come before the trigger.",
    )
    unknown_fields: Literal["keep", "ignore"] = Field(
        default="keep", description="Fields that TradeV2 does not know: keep them in vendor_data, or ignore them."
    )
    accept_lost_offsets: bool = Field(
        default=False, description="Go on although Kafka no longer has messages that were never committed."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def load_settings(exchanges: Iterable[str] = ()) -> Settings:
    """Reads `Settings`; `exchanges` are the names whose variables are known beside them.

    Raises SettingsError for an unknown or wrong variable.
    """
    secret_files.adopt()
    _refuse_unknown(exchanges)
    try:
        return Settings()
    except ValidationError as error:
        raise _explained(error, PREFIX) from None


def load_exchange_settings(exchange: str, declared: Mapping[str, Any]) -> ExchangeSettings:
    """What flows/<exchange>.py declares, overridden by the environment. Raises SettingsError."""
    secret_files.adopt()
    prefix = f"{PREFIX}{exchange.upper()}_"
    try:
        return ExchangeSettings(_env_prefix=prefix, **declared)  # type: ignore[call-arg]
    except ValidationError as error:
        raise _explained(error, prefix) from None


def _refuse_unknown(exchanges: Iterable[str]) -> None:
    prefixes: dict[str, type[BaseSettings]] = {
        PREFIX: Settings,
        **{f"{PREFIX}{name.upper()}_": ExchangeSettings for name in exchanges},
    }
    known = {f"{prefix}{field.upper()}" for prefix, model in prefixes.items() for field in model.model_fields}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and not name.startswith(KAFKA_PREFIX):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "`k2flow config` lists the known ones"
            raise SettingsError(f"unknown setting {name}: {hint}")


def _explained(error: ValidationError, prefix: str) -> SettingsError:
    first = error.errors()[0]
    name = f"{prefix}{'_'.join(str(part) for part in first['loc'][:1]).upper()}"
    value = mask(name, str(first.get("input")))
    return SettingsError(f"{name}={value!r} is wrong: {first['msg']}")


def mask(name: str, value: str) -> str:
    """`value` as it may be printed: whole secrets and passwords inside URLs are replaced by `****`."""
    if SECRET.search(name.replace("_", ".")) or SECRET.search(name):
        return "****"
    return PASSWORD_IN_QUERY.sub(r"\1****", PASSWORD_IN_URL.sub(r"\1:****@", value))


@dataclass(frozen=True)
class Origin:
    """One setting in force: its name, its value as it may be printed, and where it came from."""

    name: str
    value: str
    source: str


def origins(model: BaseSettings, prefix: str, declared: Mapping[str, Any], declared_in: str) -> list[Origin]:
    """The fields of a settings model, each with where its value came from."""
    rows = []
    for field in type(model).model_fields:
        name = f"{prefix}{field.upper()}"
        value = getattr(model, field)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        rows.append(Origin(name, mask(name, text), _source(name, declared_in if field in declared else "default")))
    return rows


def kafka_origins(settings: Settings) -> list[Origin]:
    """Librdkafka's properties in force, each with where it came from."""
    rows = []
    for name, value in sorted(settings.kafka.items()):
        variable = KAFKA_PREFIX + name.upper().replace(".", "_")
        rows.append(Origin(variable, mask(name, value), _source(variable, "default")))
    return rows


def _source(variable: str, otherwise: str) -> str:
    """Where a variable's value came from; `otherwise` if it is not set."""
    if secret_files.adopted(variable):
        return "file"
    return "environment" if variable in os.environ else otherwise
